"""What people have open and unread on tasks. Each change is marked for the organization."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from branchline.v1.users_pb2 import UserTaskState
from sqlalchemy import bindparam, delete, func, select

from services.runtime.clock import Clock
from services.runtime.database import Statement, Tx, insert_new, is_in, upsert
from services.runtime.errors import InvalidArgument
from services.runtime.spine.outbox import Mark, Outbox
from services.user.tables import any_or, applied_events, task_states

SESSIONS_PER_TASK = 256
"""Most sessions of one task that one person may have a state of."""

KEEP_SECONDS = 7 * 24 * 3600.0
"""How long applied events, and the revisions of forgotten states, are remembered."""

FORGOTTEN_AT_ONCE = 500

_KEY = ["user_id", "task_id", "session_id"]
_c = task_states.c
_OF_TASK = (_c.user_id == bindparam("user"), _c.task_id == bindparam("task"))
_STATE = Statement(
    select(_c.revision, _c.deleted, _c.payload)
    .where(*_OF_TASK, _c.session_id == bindparam("session"))
    .with_for_update()
)
_STATES = Statement(
    select(_c.user_id, _c.revision, _c.deleted, _c.payload)
    .where(is_in(_c.user_id, "users"), _c.task_id == bindparam("task"), _c.session_id == bindparam("session"))
    .order_by(_c.user_id)
    .with_for_update()
)
_OTHERS = Statement(select(func.count()).where(*_OF_TASK, _c.session_id != bindparam("session"), _c.deleted.is_(False)))
_PUT = Statement(upsert(task_states, _KEY, newer="revision"))
_FORGOTTEN = Statement(
    select(_c.revision, _c.payload)
    .where(
        _c.organization_id == bindparam("organization"),
        any_or(_c.task_id, "task"),
        any_or(_c.user_id, "user"),
        _c.deleted.is_(False),
    )
    .limit(FORGOTTEN_AT_ONCE)
)
_APPLY = Statement(insert_new(applied_events, ["event_id"]))
_OLD_EVENTS = Statement(delete(applied_events).where(applied_events.c.apply_time < bindparam("before")))
_OLD_STATES = Statement(delete(task_states).where(_c.deleted.is_(True), _c.change_time < bindparam("before")))


@dataclass(frozen=True, slots=True)
class TaskStates:
    """The per-user workbench state, keyed by (user, task, session)."""

    outbox: Outbox
    clock: Clock

    def take(self, tx: Tx, key: UserTaskState) -> UserTaskState:
        """Return the state of (user, task, session), which may be new, to be changed."""
        given = {"user": key.user_id, "task": key.task_id, "session": key.session_id}
        return _present(key, tx.row(_STATE, given))

    def save(self, tx: Tx, state: UserTaskState) -> None:
        """Store a new state; raise InvalidArgument if there are too many."""
        tx.take_turn("task_states", f"{state.user_id}/{state.task_id}")
        given = {"user": state.user_id, "task": state.task_id, "session": state.session_id}
        if (tx.value(_OTHERS, given) or 0) >= SESSIONS_PER_TASK:
            raise InvalidArgument("session_id", f"at most {SESSIONS_PER_TASK} sessions of a task have a state")
        self._save(tx, [state])

    def mark_unread(self, tx: Tx, event_id: str, user_ids: Sequence[str], of: UserTaskState) -> None:
        """Mark a task unread for people, once for each event."""
        if not tx.change(_APPLY, {"event_id": event_id, "apply_time": self.clock.seconds()}):
            return
        given = {"users": list(user_ids), "task": of.task_id, "session": of.session_id}
        held = {row.user_id: row for row in tx.rows(_STATES, given)}
        changed: list[UserTaskState] = []
        for user_id in dict.fromkeys(user_ids):
            key = UserTaskState(
                user_id=user_id, organization_id=of.organization_id, task_id=of.task_id, session_id=of.session_id
            )
            state = _present(key, held.get(user_id))
            if not state.unread:
                state.unread = True
                changed.append(state)
        self._save(tx, changed)

    def forget_some(self, tx: Tx, organization_id: str, user_id: str, task_id: str) -> int:
        """Forget some states of an organization, of one person or task alone if these are given; return how many."""
        given = {"organization": organization_id, "user": user_id, "task": task_id}
        states = [_with_revision(UserTaskState.FromString(row.payload), row) for row in tx.rows(_FORGOTTEN, given)]
        self._save(tx, states, deleted=True)
        return len(states)

    def _save(self, tx: Tx, states: Sequence[UserTaskState], *, deleted: bool = False) -> None:
        for state in states:
            state.revision += 1
        tx.change_each(_PUT, [_row(state, self.clock.seconds(), deleted=deleted) for state in states])
        self.outbox.mark(tx, [Mark(task_state_id(state), state.revision, state, deleted=deleted) for state in states])

    def prune(self, tx: Tx) -> None:
        """Forget applied events and forgotten states that are old."""
        before = self.clock.seconds() - KEEP_SECONDS
        tx.change(_OLD_EVENTS, {"before": before})
        tx.change(_OLD_STATES, {"before": before})


def task_state_id(state: UserTaskState) -> str:
    """Return the id under which a per-user state is pushed and indexed."""
    return "/".join((state.user_id, state.task_id, state.session_id))


def _present(key: UserTaskState, row: Any) -> UserTaskState:
    """Return a state as it is held; a fresh one where there is none, whose revisions go on where it was forgotten."""
    state = UserTaskState()
    state.CopyFrom(key)
    if row is None:
        return state
    return _with_revision(state if row.deleted else UserTaskState.FromString(row.payload), row)


def _with_revision(state: UserTaskState, row: Any) -> UserTaskState:
    state.revision = row.revision
    return state


def _row(state: UserTaskState, now: float, *, deleted: bool) -> dict[str, Any]:
    return {
        "user_id": state.user_id,
        "task_id": state.task_id,
        "session_id": state.session_id,
        "organization_id": state.organization_id,
        "revision": state.revision,
        "deleted": deleted,
        "change_time": now,
        "payload": state.SerializeToString(),
    }
