"""What people have half written on tasks. Each change is marked for the organization."""

from dataclasses import dataclass
from typing import Any

from branchline.v1.common_pb2 import Prompt
from branchline.v1.errors_pb2 import ERROR_REASON_QUOTA_EXCEEDED
from branchline.v1.users_pb2 import Draft
from branchline_internal.user.v1.user_pb2 import DraftState
from sqlalchemy import bindparam, delete, func, select

from services.runtime.clock import Clock
from services.runtime.database import Statement, Tx, upsert
from services.runtime.errors import InvalidArgument, ResourceExhausted
from services.runtime.spine.outbox import Mark, Outbox
from services.user.tables import any_or, drafts

DRAFT_BYTES = 64 * 1024
"""Most that one person may have half written on one task, attachments included, over all its sessions."""

KEEP_SECONDS = 7 * 24 * 3600.0
"""How long the revisions of forgotten drafts are remembered."""

_FORGOTTEN_AT_ONCE = 500

_c = drafts.c
_OF_TASK = (_c.user_id == bindparam("user"), _c.task_id == bindparam("task"))
_THIS = Statement(select(_c.revision).where(*_OF_TASK, _c.session_id == bindparam("session")).with_for_update())
_OTHERS = Statement(
    select(func.coalesce(func.sum(_c.size_bytes), 0)).where(
        *_OF_TASK, _c.session_id != bindparam("session"), _c.deleted.is_(False)
    )
)
_PUT = Statement(upsert(drafts, ["user_id", "task_id", "session_id"], newer="revision"))
_FORGOTTEN = Statement(
    select(_c.user_id, _c.revision, _c.payload)
    .where(
        _c.organization_id == bindparam("organization"),
        any_or(_c.task_id, "task"),
        any_or(_c.user_id, "user"),
        _c.deleted.is_(False),
    )
    .limit(_FORGOTTEN_AT_ONCE)
)
_OLD = Statement(delete(drafts).where(_c.deleted.is_(True), _c.change_time < bindparam("before")))


@dataclass(frozen=True, slots=True)
class Drafts:
    """The drafts, keyed by (user, task, session)."""

    outbox: Outbox
    clock: Clock

    def set(self, tx: Tx, user_id: str, organization_id: str, given: Draft) -> Draft:
        """Keep a draft; an empty prompt forgets it. Raise ResourceExhausted if the person has too much on the task."""
        draft = Draft()
        draft.CopyFrom(given)
        tx.take_turn("drafts", f"{user_id}/{draft.task_id}")
        of = {"user": user_id, "task": draft.task_id, "session": draft.session_id}
        draft.revision = tx.value(_THIS, of) or 0
        draft.update_time.CopyFrom(self.clock.timestamp())
        size, others = draft.prompt.ByteSize(), tx.value(_OTHERS, of) or 0
        if size > DRAFT_BYTES:
            raise InvalidArgument("draft.prompt", f"holds {size} bytes; at most {DRAFT_BYTES} are kept for one task")
        if size and size + others > DRAFT_BYTES:
            sentence = f"drafts on one task may hold {DRAFT_BYTES} bytes together"
            raise ResourceExhausted(ERROR_REASON_QUOTA_EXCEEDED, sentence, limit="draft_bytes")
        self._save(tx, user_id, organization_id, draft, deleted=not size)
        return draft

    def forget_some(self, tx: Tx, organization_id: str, user_id: str, task_id: str) -> int:
        """Forget some drafts of an organization, of one person or task alone if these are given; return how many."""
        given = {"organization": organization_id, "user": user_id, "task": task_id}
        rows: list[Any] = tx.rows(_FORGOTTEN, given)
        for row in rows:
            draft = Draft.FromString(row.payload)
            draft.revision = row.revision
            draft.prompt.CopyFrom(Prompt())
            self._save(tx, row.user_id, organization_id, draft, deleted=True)
        return len(rows)

    def prune(self, tx: Tx) -> None:
        """Forget the revisions of drafts that were forgotten long ago."""
        tx.change(_OLD, {"before": self.clock.seconds() - KEEP_SECONDS})

    def _save(self, tx: Tx, user_id: str, organization_id: str, draft: Draft, *, deleted: bool) -> None:
        draft.revision += 1
        row = {
            "user_id": user_id,
            "task_id": draft.task_id,
            "session_id": draft.session_id,
            "organization_id": organization_id,
            "revision": draft.revision,
            "size_bytes": draft.prompt.ByteSize(),
            "deleted": deleted,
            "change_time": self.clock.seconds(),
            "payload": draft.SerializeToString(),
        }
        tx.change_each(_PUT, [row])
        state = DraftState(user_id=user_id, organization_id=organization_id, draft=draft)
        self.outbox.mark(tx, [Mark(draft_id(state), draft.revision, state, deleted=deleted)])


def draft_id(state: DraftState) -> str:
    """Return the id under which a draft is pushed and indexed."""
    return "/".join((state.user_id, state.draft.task_id, state.draft.session_id))
