"""Statuses of a task by what they mean, for all who read them. Pure."""

from branchline.v1.tasks_pb2 import (
    TASK_STATUS_ARCHIVED,
    TASK_STATUS_ARCHIVING,
    TASK_STATUS_KILLED,
    TASK_STATUS_KILLING,
    TASK_STATUS_RUNNING,
    TASK_STATUS_UNSPECIFIED,
    TASK_STATUS_WAITING,
    TaskStatus,
)

Status = TaskStatus.ValueType
Statuses = frozenset[Status]

ENDED: Statuses = frozenset({TASK_STATUS_ARCHIVED, TASK_STATUS_KILLED})
"""It is put away: not in the sidebar unless asked for, and its branch is free."""

ENDING: Statuses = ENDED | {TASK_STATUS_ARCHIVING, TASK_STATUS_KILLING}
"""Nothing that agents or provisioning report matters any more."""

WORKING: Statuses = frozenset({TASK_STATUS_RUNNING, TASK_STATUS_WAITING})
"""An agent has a turn."""

HOLDS_BRANCH: Statuses = frozenset(TaskStatus.values()) - ENDED - {TASK_STATUS_UNSPECIFIED}
"""It keeps its branch from other tasks. One that gave it up, being archived, does not get it back by being killed."""
