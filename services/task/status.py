"""The status machine of a task. Pure."""

from collections.abc import Mapping, Set

from branchline.resource.v1.task_pb2 import (
    TASK_STATUS_ARCHIVED,
    TASK_STATUS_ARCHIVING,
    TASK_STATUS_ERROR,
    TASK_STATUS_IDLE,
    TASK_STATUS_KILLED,
    TASK_STATUS_KILLING,
    TASK_STATUS_PENDING,
    TASK_STATUS_PROVISIONING,
    TASK_STATUS_RUNNING,
    TASK_STATUS_WAITING,
    TaskStatus,
)

from services.runtime.errors import FailedPrecondition

Status = TaskStatus.ValueType

_END = {TASK_STATUS_ARCHIVING, TASK_STATUS_KILLING}

TRANSITIONS: Mapping[Status, Set[Status]] = {
    TASK_STATUS_PENDING: {TASK_STATUS_PROVISIONING, TASK_STATUS_ERROR, *_END},
    TASK_STATUS_PROVISIONING: {TASK_STATUS_IDLE, TASK_STATUS_RUNNING, TASK_STATUS_ERROR, *_END},
    TASK_STATUS_IDLE: {TASK_STATUS_RUNNING, TASK_STATUS_ERROR, *_END},
    TASK_STATUS_RUNNING: {TASK_STATUS_IDLE, TASK_STATUS_WAITING, TASK_STATUS_ERROR, *_END},
    TASK_STATUS_WAITING: {TASK_STATUS_RUNNING, TASK_STATUS_IDLE, TASK_STATUS_ERROR, *_END},
    TASK_STATUS_ERROR: {TASK_STATUS_PENDING, TASK_STATUS_RUNNING, TASK_STATUS_IDLE, *_END},
    TASK_STATUS_ARCHIVING: {TASK_STATUS_ARCHIVED, TASK_STATUS_KILLING},
    TASK_STATUS_ARCHIVED: {TASK_STATUS_KILLING},
    TASK_STATUS_KILLING: {TASK_STATUS_KILLED},
    TASK_STATUS_KILLED: set(),
}

ENDING = frozenset({TASK_STATUS_ARCHIVING, TASK_STATUS_ARCHIVED, TASK_STATUS_KILLING, TASK_STATUS_KILLED})
"""Statuses in which nothing that agents or provisioning report matters any more."""

WORKING = frozenset({TASK_STATUS_RUNNING, TASK_STATUS_WAITING})


def status_name(status: Status) -> str:
    """Return the status as people and history know it, such as "running"."""
    return TaskStatus.Name(status).removeprefix("TASK_STATUS_").lower()


def check_transition(old: Status, new: Status) -> None:
    """Raise FailedPrecondition unless a task may go from one status to the other."""
    if new not in TRANSITIONS[old]:
        words = f"a task that is {status_name(old)} cannot become {status_name(new)}"
        raise FailedPrecondition("TASK_STATUS", words, status=status_name(old))
