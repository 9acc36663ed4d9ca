"""States of a task by what they mean, for all who read them. Pure."""

from branchline.v1.tasks_pb2 import (
    TASK_ACTIVITY_RUNNING,
    TASK_ACTIVITY_WAITING,
    TASK_STATE_ARCHIVED,
    TASK_STATE_ARCHIVING,
    TASK_STATE_KILLED,
    TASK_STATE_KILLING,
    TASK_STATE_UNSPECIFIED,
    TaskActivity,
    TaskState,
)

State = TaskState.ValueType
Activity = TaskActivity.ValueType
States = frozenset[State]

ENDED: States = frozenset({TASK_STATE_ARCHIVED, TASK_STATE_KILLED})
"""It is put away: not in the sidebar unless asked for, and its branch is free."""

ENDING: States = ENDED | {TASK_STATE_ARCHIVING, TASK_STATE_KILLING}
"""Nothing that agents or provisioning report matters any more."""

WORKING: frozenset[Activity] = frozenset({TASK_ACTIVITY_RUNNING, TASK_ACTIVITY_WAITING})
"""An agent has a turn."""

HOLDS_BRANCH: States = frozenset(TaskState.values()) - ENDED - {TASK_STATE_UNSPECIFIED}
"""It keeps its branch from other tasks. One that gave it up, being archived, does not get it back by being killed."""
