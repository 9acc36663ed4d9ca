"""What people have open and unread, as the user service pushes it: indexed for them alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from branchline.v1.common_pb2 import ENTITY_KIND_USER_TASK_STATE
from branchline.v1.users_pb2 import UserTaskState

from services.organization.places import Own, send_back, strays
from services.runtime.database import Tx
from services.runtime.spine.index import Entry, Index
from services.runtime.spine.ingest import Pushed
from services.runtime.spine.outbox import Outbox


@dataclass(frozen=True, slots=True)
class TaskStates:
    """The index of people's own states."""

    index: Index
    outbox: Outbox

    def take(self, tx: Tx, pushed: Sequence[Pushed[UserTaskState]]) -> None:
        """Index pushed states, and have those forgotten that have no place any more."""
        self.index.put_many(tx, [_entry(one) for one in pushed])
        send_back(tx, self.outbox, strays(tx, [_own(one) for one in pushed if not one.deleted]))


def _own(one: Pushed[UserTaskState]) -> Own:
    state = one.state
    return Own(one.id, one.revision, state.organization_id, state.user_id, state.task_id)


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
