"""The state machines of a task and of its sessions. Pure."""

from collections.abc import Mapping, Set
from typing import NamedTuple

from branchline.v1.errors_pb2 import ERROR_REASON_STATE_FORBIDS
from branchline.v1.sessions_pb2 import SESSION_STATE_PENDING, SESSION_STATE_RUNNING, SESSION_STATE_WAITING, SessionState
from branchline.v1.tasks_pb2 import (
    TASK_ACTIVITY_FAILED,
    TASK_ACTIVITY_IDLE,
    TASK_ACTIVITY_RUNNING,
    TASK_ACTIVITY_UNSPECIFIED,
    TASK_ACTIVITY_WAITING,
    TASK_STATE_ACTIVE,
    TASK_STATE_ARCHIVED,
    TASK_STATE_ARCHIVING,
    TASK_STATE_FAILED,
    TASK_STATE_KILLED,
    TASK_STATE_KILLING,
    TASK_STATE_PROVISIONING,
    TASK_STATE_QUEUED,
    Task,
    TaskActivity,
    TaskState,
)

from services.runtime.errors import FailedPrecondition
from services.runtime.states import ENDING, Activity, State

SessionStanding = SessionState.ValueType


class Standing(NamedTuple):
    """Where a task stands: its state, and what its agents do while it is active."""

    state: State
    activity: Activity = TASK_ACTIVITY_UNSPECIFIED

    @property
    def name(self) -> str:
        """The standing as people and history know it, such as "running"; where a turn failed, "turn_failed"."""
        if self.activity == TASK_ACTIVITY_FAILED:
            return "turn_failed"
        if self.state == TASK_STATE_ACTIVE:
            return TaskActivity.Name(self.activity).removeprefix("TASK_ACTIVITY_").lower()
        return TaskState.Name(self.state).removeprefix("TASK_STATE_").lower()


QUEUED = Standing(TASK_STATE_QUEUED)
PROVISIONING = Standing(TASK_STATE_PROVISIONING)
IDLE = Standing(TASK_STATE_ACTIVE, TASK_ACTIVITY_IDLE)
RUNNING = Standing(TASK_STATE_ACTIVE, TASK_ACTIVITY_RUNNING)
WAITING = Standing(TASK_STATE_ACTIVE, TASK_ACTIVITY_WAITING)
TURN_FAILED = Standing(TASK_STATE_ACTIVE, TASK_ACTIVITY_FAILED)
FAILED = Standing(TASK_STATE_FAILED)
ARCHIVING = Standing(TASK_STATE_ARCHIVING)
ARCHIVED = Standing(TASK_STATE_ARCHIVED)
KILLING = Standing(TASK_STATE_KILLING)
KILLED = Standing(TASK_STATE_KILLED)

_END = {ARCHIVING, KILLING}

TRANSITIONS: Mapping[Standing, Set[Standing]] = {
    QUEUED: {PROVISIONING, FAILED, *_END},
    PROVISIONING: {IDLE, FAILED, *_END},
    IDLE: {RUNNING, TURN_FAILED, FAILED, *_END},
    RUNNING: {IDLE, WAITING, TURN_FAILED, FAILED, *_END},
    WAITING: {RUNNING, IDLE, TURN_FAILED, FAILED, *_END},
    TURN_FAILED: {RUNNING, FAILED, *_END},
    FAILED: {QUEUED, *_END},
    ARCHIVING: {ARCHIVED, KILLING},
    # Its sandbox is gone and its branch may be another task's by now: it takes neither back on its way.
    ARCHIVED: {KILLED},
    KILLING: {KILLED},
    KILLED: set(),
}

ENDED: Mapping[Standing, Standing] = {ARCHIVING: ARCHIVED, KILLING: KILLED}
"""What becomes of a task once its sandbox is gone."""

ALIVE = tuple(one for one in TRANSITIONS if one.state not in ENDING)
"""It has not ended and is not being ended."""

UNBORN = frozenset({QUEUED, PROVISIONING})
"""Its sandbox is being made."""

WORKING = frozenset({RUNNING, WAITING})
"""An agent has a turn."""

SESSION_WORKING = frozenset({SESSION_STATE_RUNNING, SESSION_STATE_WAITING})
SESSION_UNDER_WAY = SESSION_WORKING | {SESSION_STATE_PENDING}


def standing_of(task: Task) -> Standing:
    """Return where a task stands."""
    return Standing(task.state, task.activity)


def check_transition(old: Standing, new: Standing) -> None:
    """Raise FailedPrecondition unless a task may go from one standing to the other."""
    if new not in TRANSITIONS[old]:
        allowed = (one for one, following in TRANSITIONS.items() if new in following)
        raise refused(old, f"a task that is {old.name} cannot become {new.name}", *allowed)


def refused(standing: Standing, words: str, *allowed: Standing) -> FailedPrecondition:
    """Return the error for what a task's state does not allow."""
    names = ", ".join(one.name for one in allowed)
    return FailedPrecondition(ERROR_REASON_STATE_FORBIDS, words, state=standing.name, allowed_states=names)
