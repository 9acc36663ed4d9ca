"""What people have open, unread and half written, as the user service pushes it: indexed for them alone.

A state may arrive when its task or its membership is gone, from a call that had begun before or knew no better. Then
the user service is told to forget it, or it would stay for ever.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from branchline.v1.users_pb2 import UserTaskState
from branchline.v1.vocabulary_pb2 import ENTITY_KIND_USER_TASK_STATE
from branchline_internal.user.v1.user_pb2 import ForgetTaskStatesRequest
from sqlalchemy import select

from services.organization.destinations import TO_USER
from services.organization.tables import members, task_lookup
from services.runtime.database import Reader, Statement, Tx, is_in
from services.runtime.spine.index import Entry, Index
from services.runtime.spine.ingest import Pushed
from services.runtime.spine.outbox import Mark, Outbox

_PLACES = Statement(
    select(task_lookup.c.task_id, members.c.user_id)
    .join(members, members.c.scope == task_lookup.c.organization_id)
    .where(is_in(task_lookup.c.task_id, "tasks"), is_in(members.c.user_id, "users"), members.c.deleted.is_(False))
)


@dataclass(frozen=True, slots=True)
class TaskStates:
    """The index of people's own states."""

    index: Index
    outbox: Outbox

    def take(self, tx: Tx, pushed: Sequence[Pushed[UserTaskState]]) -> None:
        """Index pushed states, and have those forgotten that have no place any more."""
        self.index.put_many(tx, [_entry(one) for one in pushed])
        self.outbox.mark(tx, [_forget(one) for one in _strays(tx, pushed)])


def _strays(tx: Reader, pushed: Sequence[Pushed[UserTaskState]]) -> list[Pushed[UserTaskState]]:
    """Return the states of tasks that are gone, or of people who are no members."""
    present = [one for one in pushed if not one.deleted]
    if not present:
        return []
    given = {
        "tasks": sorted({one.state.task_id for one in present}),
        "users": sorted({one.state.user_id for one in present}),
    }
    places = {(row.task_id, row.user_id) for row in tx.rows(_PLACES, given)}
    return [one for one in present if (one.state.task_id, one.state.user_id) not in places]


def _entry(one: Pushed[UserTaskState]) -> Entry:
    return Entry(
        ENTITY_KIND_USER_TASK_STATE,
        one.state.organization_id,
        one.id,
        one.revision,
        one.state,
        viewer_id=one.state.user_id,
        task_id=one.state.task_id,
        deleted=one.deleted,
    )


def _forget(one: Pushed[UserTaskState]) -> Mark:
    state = one.state
    forget = ForgetTaskStatesRequest(
        organization_id=state.organization_id, user_id=state.user_id, task_id=state.task_id
    )
    return Mark(one.id, one.revision, forget, TO_USER)
