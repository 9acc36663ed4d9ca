"""The status machines of a task and of its sessions. Pure."""

from collections.abc import Mapping, Set

from branchline.v1.sessions_pb2 import SESSION_STATUS_RUNNING, SESSION_STATUS_WAITING, SessionStatus
from branchline.v1.tasks_pb2 import (
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
from branchline.v1.vocabulary_pb2 import ERROR_REASON_TASK_STATUS

from services.runtime.errors import FailedPrecondition
from services.runtime.statuses import Status

SessionStanding = SessionStatus.ValueType

_END = {TASK_STATUS_ARCHIVING, TASK_STATUS_KILLING}

TRANSITIONS: Mapping[Status, Set[Status]] = {
    TASK_STATUS_PENDING: {TASK_STATUS_PROVISIONING, TASK_STATUS_ERROR, *_END},
    TASK_STATUS_PROVISIONING: {TASK_STATUS_IDLE, TASK_STATUS_ERROR, *_END},
    TASK_STATUS_IDLE: {TASK_STATUS_RUNNING, TASK_STATUS_ERROR, *_END},
    TASK_STATUS_RUNNING: {TASK_STATUS_IDLE, TASK_STATUS_WAITING, TASK_STATUS_ERROR, *_END},
    TASK_STATUS_WAITING: {TASK_STATUS_RUNNING, TASK_STATUS_IDLE, TASK_STATUS_ERROR, *_END},
    TASK_STATUS_ERROR: {TASK_STATUS_PENDING, TASK_STATUS_RUNNING, *_END},
    TASK_STATUS_ARCHIVING: {TASK_STATUS_ARCHIVED, TASK_STATUS_KILLING},
    # Its sandbox is gone and its branch may be another task's by now: it takes neither back on its way.
    TASK_STATUS_ARCHIVED: {TASK_STATUS_KILLED},
    TASK_STATUS_KILLING: {TASK_STATUS_KILLED},
    TASK_STATUS_KILLED: set(),
}

ENDED: Mapping[Status, Status] = {
    TASK_STATUS_ARCHIVING: TASK_STATUS_ARCHIVED,
    TASK_STATUS_KILLING: TASK_STATUS_KILLED,
}
"""What becomes of a task once its sandbox is gone."""

PROVISIONING = frozenset({TASK_STATUS_PENDING, TASK_STATUS_PROVISIONING})
SESSION_WORKING = frozenset({SESSION_STATUS_RUNNING, SESSION_STATUS_WAITING})


def status_name(status: Status) -> str:
    """Return the status as people and history know it, such as "running"."""
    return TaskStatus.Name(status).removeprefix("TASK_STATUS_").lower()


def check_transition(old: Status, new: Status) -> None:
    """Raise FailedPrecondition unless a task may go from one status to the other."""
    if new not in TRANSITIONS[old]:
        raise refused(old, f"a task that is {status_name(old)} cannot become {status_name(new)}")


def refused(status: Status, words: str) -> FailedPrecondition:
    """Return the error for what a task's status does not allow."""
    return FailedPrecondition(ERROR_REASON_TASK_STATUS, words, status=status_name(status))
