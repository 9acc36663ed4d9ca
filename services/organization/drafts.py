"""What people have half written, as the user service pushes it: read by them alone. Blobs that it names are kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from branchline.v1.common_pb2 import ENTITY_KIND_DRAFT
from branchline.v1.users_pb2 import Draft
from branchline_internal.user.v1.user_pb2 import DraftState
from sqlalchemy import bindparam, delete, select

from services.organization.claims import Claims
from services.organization.places import Own, send_back, strays
from services.organization.tables import drafts
from services.runtime.clock import Clock
from services.runtime.database import Reader, Statement, Tx, is_in, upsert
from services.runtime.prompts import blob_ids
from services.runtime.spine.hub import Hub
from services.runtime.spine.index import TOMBSTONE_SECONDS
from services.runtime.spine.ingest import Pushed
from services.runtime.spine.outbox import Outbox

_c = drafts.c
_PUT = Statement(upsert(drafts, ["id"], newer="revision"))
_DRAFT = Statement(
    select(_c.payload).where(_c.id == bindparam("draft"), _c.user_id == bindparam("user"), _c.deleted.is_(False))
)
_OF_TASKS = Statement(delete(drafts).where(is_in(_c.task_id, "tasks")))
_SOME = Statement(
    delete(drafts).where(_c.id.in_(select(_c.id).where(_c.organization_id == bindparam("of")).limit(bindparam("most"))))
)
_OLD = Statement(delete(drafts).where(_c.deleted.is_(True), _c.change_time < bindparam("before")))


@dataclass(frozen=True, slots=True)
class Drafts:
    """The index of drafts."""

    hub: Hub
    outbox: Outbox
    claims: Claims
    clock: Clock

    def take(self, tx: Tx, pushed: Sequence[Pushed[DraftState]]) -> None:
        """Index pushed drafts, and have those forgotten that have no place any more."""
        lost = strays(tx, [_own(one) for one in pushed if not one.deleted])
        placeless = {one.id for one in lost}
        for one in pushed:
            self._take(tx, one, keeps=not one.deleted and one.id not in placeless)
            tx.after_commit(partial(self.hub.announce, ENTITY_KIND_DRAFT, one.id))
        send_back(tx, self.outbox, lost)

    def _take(self, tx: Tx, one: Pushed[DraftState], *, keeps: bool) -> None:
        draft = one.state.draft
        row = {
            "id": one.id,
            "user_id": one.state.user_id,
            "task_id": draft.task_id,
            "organization_id": one.state.organization_id,
            "revision": one.revision,
            "deleted": one.deleted,
            "change_time": self.clock.seconds(),
            "payload": b"" if one.deleted else draft.SerializeToString(),
        }
        if tx.change(_PUT, row):
            named = blob_ids(draft.prompt) if keeps else []
            self.claims.set_draft(tx, one.state.organization_id, draft.task_id, one.id, named)

    def of(self, tx: Reader, user_id: str, task_id: str, session_id: str) -> Draft:
        """Return what a person has half written; an empty one if nothing."""
        payload = tx.value(_DRAFT, {"draft": f"{user_id}/{task_id}/{session_id}", "user": user_id})
        return Draft.FromString(payload) if payload else Draft(task_id=task_id, session_id=session_id)

    def drop_of_tasks(self, tx: Tx, task_ids: Sequence[str]) -> None:
        """Forget the drafts of tasks that are gone."""
        tx.change(_OF_TASKS, {"tasks": task_ids})

    def forget_of(self, tx: Tx, organization_id: str, most: int) -> int:
        """Forget some drafts of an organization; return how many."""
        return tx.change(_SOME, {"of": organization_id, "most": most})

    def prune(self, tx: Tx) -> None:
        """Forget which drafts were forgotten. The user service remembers their revisions for longer than that."""
        tx.change(_OLD, {"before": self.clock.seconds() - TOMBSTONE_SECONDS})


def _own(one: Pushed[DraftState]) -> Own:
    state = one.state
    return Own(one.id, one.revision, state.organization_id, state.user_id, state.draft.task_id)
