"""What names blobs: tasks, by what was said on them, and drafts. What is named is kept."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from branchline.v1.blobs_pb2 import BLOB_STATE_COMPLETE, Blob
from branchline.v1.common_pb2 import ENTITY_KIND_BLOB, BlobReference
from branchline.v1.errors_pb2 import ERROR_REASON_BLOB_INCOMPLETE
from sqlalchemy import bindparam, delete, exists, select, update

from services.organization.tables import blob_claims, blob_releases, blobs, task_lookup
from services.runtime.clock import Clock
from services.runtime.database import Reader, Statement, Tx, insert_new, is_in
from services.runtime.errors import FailedPrecondition, NotFound

GRACE_SECONDS = 24 * 3600.0
"""How long a blob is kept that nothing names, and a claim of a task that nothing is heard of."""

AT_ONCE = 500
"""Most claims that are dropped in one step."""

_b, _c = blobs.c, blob_claims.c
_key = (_c.task_id, _c.draft_id, _c.blob_id)
_OF_TASK = (_c.task_id == bindparam("task"), _c.draft_id == "")

_of_ids = select(_b.payload).where(is_in(_b.id, "ids"), _b.deleted.is_(False)).order_by(_b.id)
BLOBS_OF_IDS = Statement(_of_ids)
_TAKE_BLOBS = Statement(_of_ids.with_for_update())
_CLAIM = Statement(insert_new(blob_claims, ["task_id", "draft_id", "blob_id"]))
_NAMED = Statement(update(blobs).where(is_in(_b.id, "ids")).values(named=True))
_UNNAMED = Statement(
    update(blobs)
    .where(is_in(_b.id, "ids"), ~exists().where(_c.blob_id == _b.id))
    .values(named=False, touch_time=bindparam("now"))
)
OF_DIGEST = Statement(
    select(_b.payload)
    .where(
        _b.organization_id == bindparam("organization"),
        _b.sha256 == bindparam("digest"),
        _b.deleted.is_(False),
        exists().where(*_OF_TASK, _c.blob_id == _b.id),
    )
    .limit(1)
)
_NAMED_BY = Statement(
    select(_b.payload)
    .join(blob_claims, _c.blob_id == _b.id)
    .where(
        *_OF_TASK,
        _c.blob_id == bindparam("blob"),
        _b.organization_id == bindparam("organization"),
        _b.deleted.is_(False),
    )
)
_DROP = Statement(
    delete(blob_claims).where(
        _c.task_id == bindparam("task"), _c.draft_id == bindparam("draft"), _c.blob_id == bindparam("blob")
    )
)
_BY_DRAFT = Statement(select(*_key).where(_c.task_id == bindparam("task"), _c.draft_id == bindparam("draft")))
_BELOW_TASK = Statement(select(*_key).where(_c.task_id == bindparam("task")).limit(AT_ONCE))
_OF_ORGANIZATION = Statement(select(*_key).where(_c.organization_id == bindparam("organization")).limit(AT_ONCE))
_UNCONFIRMED = Statement(
    select(*_key, task_lookup.c.organization_id.label("place"))
    .outerjoin(task_lookup, task_lookup.c.task_id == _c.task_id)
    .where(_c.confirmed.is_(False), _c.claim_time < bindparam("before"))
    .limit(AT_ONCE)
)
_CONFIRM = Statement(update(blob_claims).where(_c.task_id == bindparam("task")).values(confirmed=True))
_RELEASE = Statement(insert_new(blob_releases, ["task_id"]))
_RELEASED = Statement(select(blob_releases.c.task_id).limit(AT_ONCE))
_RELEASE_DONE = Statement(delete(blob_releases).where(blob_releases.c.task_id == bindparam("task")))


@dataclass(frozen=True, slots=True)
class Claims:
    """Who names which blob."""

    clock: Clock

    def claim(self, tx: Tx, organization_id: str, task_id: str, blob_ids: Sequence[str]) -> list[BlobReference]:
        """Have a task name blobs. Raise what `check` does."""
        told = _checked(_found(tx, _TAKE_BLOBS, organization_id, blob_ids), blob_ids)
        self._claim(tx, organization_id, task_id, "", blob_ids, confirmed=False)
        return told

    def check(self, tx: Reader, organization_id: str, blob_ids: Sequence[str]) -> list[BlobReference]:
        """Return what blobs are. Raise NotFound for the first that is none, FailedPrecondition if it is incomplete."""
        return _checked(_found(tx, BLOBS_OF_IDS, organization_id, blob_ids), blob_ids)

    def name(self, tx: Tx, blob: Blob, task_id: str) -> None:
        """Have a task name a blob that was just made."""
        self._claim(tx, blob.organization_id, task_id, "", [blob.id], confirmed=False)

    def set_draft(self, tx: Tx, organization_id: str, task_id: str, draft_id: str, blob_ids: Sequence[str]) -> None:
        """Have a draft name these blobs alone, those of them that there are."""
        of = {"task": task_id, "draft": draft_id}
        held: list[Any] = tx.rows(_BY_DRAFT, of)
        self._drop(tx, [row for row in held if row.blob_id not in blob_ids])
        new = set(blob_ids) - {row.blob_id for row in held}
        found = _found(tx, _TAKE_BLOBS, organization_id, sorted(new)).values()
        complete = [one.id for one in found if one.state == BLOB_STATE_COMPLETE]
        self._claim(tx, organization_id, task_id, draft_id, complete, confirmed=True)

    def named_by(self, tx: Reader, organization_id: str, task_id: str, blob_id: str) -> Blob:
        """Return a blob that a task names; raise NotFound if it names no such."""
        payload = tx.value(_NAMED_BY, {"organization": organization_id, "task": task_id, "blob": blob_id})
        if payload is None:
            raise NotFound(ENTITY_KIND_BLOB, blob_id)
        return Blob.FromString(payload)

    def of_digest(self, tx: Reader, organization_id: str, task_id: str, sha256: str) -> Blob | None:
        """Return a blob with a digest that a task names, or None."""
        payload = tx.value(OF_DIGEST, {"organization": organization_id, "task": task_id, "digest": sha256})
        return Blob.FromString(payload) if payload is not None else None

    def release_gone(self, tx: Tx, task_ids: Iterable[str]) -> None:
        """Note tasks that are gone: their claims are dropped bit by bit."""
        tx.change_many(_RELEASE, [{"task_id": task_id} for task_id in task_ids])

    def gone(self, tx: Reader) -> list[str]:
        """Return some tasks that are gone and whose claims are still to be dropped."""
        return [row.task_id for row in tx.rows(_RELEASED)]

    def drop_gone(self, tx: Tx, task_id: str) -> bool:
        """Drop some claims of a task that is gone and of its drafts; say whether there may be more."""
        if self._drop(tx, tx.rows(_BELOW_TASK, {"task": task_id})):
            return True
        tx.change(_RELEASE_DONE, {"task": task_id})
        return False

    def drop_of(self, tx: Tx, organization_id: str) -> bool:
        """Drop some claims in an organization; say whether there may be more."""
        return self._drop(tx, tx.rows(_OF_ORGANIZATION, {"organization": organization_id}))

    def confirm_some(self, tx: Tx) -> bool:
        """Confirm old claims of tasks that are known, and drop those of tasks that never were or are gone."""
        rows: list[Any] = tx.rows(_UNCONFIRMED, {"before": self.clock.seconds() - GRACE_SECONDS})
        tx.change_many(_CONFIRM, [{"task": task_id} for task_id in {row.task_id for row in rows if row.place}])
        self._drop(tx, [row for row in rows if not row.place])
        return len(rows) == AT_ONCE

    def _claim(
        self, tx: Tx, organization_id: str, task_id: str, draft_id: str, ids: Sequence[str], *, confirmed: bool
    ) -> None:
        given = {"task_id": task_id, "draft_id": draft_id, "organization_id": organization_id}
        given |= {"claim_time": self.clock.seconds(), "confirmed": confirmed}
        tx.change_many(_CLAIM, [{**given, "blob_id": blob_id} for blob_id in ids])
        if ids:
            tx.change(_NAMED, {"ids": list(ids)})

    def _drop(self, tx: Tx, rows: Sequence[Any]) -> bool:
        """Drop claims; what nothing names any more is kept for the time of grace. Say whether there may be more."""
        tx.change_many(_DROP, [{"task": row.task_id, "draft": row.draft_id, "blob": row.blob_id} for row in rows])
        if rows:
            tx.change(_UNNAMED, {"ids": sorted({row.blob_id for row in rows}), "now": self.clock.seconds()})
        return len(rows) == AT_ONCE


def check_complete(blob: Blob) -> None:
    """Raise FailedPrecondition unless all bytes of a blob are there."""
    if blob.state != BLOB_STATE_COMPLETE:
        words = f"{blob.received_bytes} of {blob.size_bytes} bytes of {blob.id} are uploaded"
        raise FailedPrecondition(ERROR_REASON_BLOB_INCOMPLETE, words, received_bytes=str(blob.received_bytes))


def reference_to(blob: Blob) -> BlobReference:
    """Return a blob as prompts and outputs name it."""
    return BlobReference(
        blob_id=blob.id, display_name=blob.display_name, media_type=blob.media_type, size_bytes=blob.size_bytes
    )


def _checked(found: Mapping[str, Blob], blob_ids: Sequence[str]) -> list[BlobReference]:
    for blob_id in blob_ids:
        if blob_id not in found:
            raise NotFound(ENTITY_KIND_BLOB, blob_id)
        check_complete(found[blob_id])
    return [reference_to(found[blob_id]) for blob_id in blob_ids]


def _found(tx: Reader, blobs_of_ids: Statement, organization_id: str, blob_ids: Sequence[str]) -> dict[str, Blob]:
    """Return the blobs of an organization that there are, by id."""
    if not blob_ids:
        return {}
    found = [Blob.FromString(row.payload) for row in tx.rows(blobs_of_ids, {"ids": list(blob_ids)})]
    return {blob.id: blob for blob in found if blob.organization_id == organization_id}
