"""What is known of blobs: one row for each, from before its first byte until after its last.

A row is made before any bytes, says only of those that they are there which are, and leaves after them. So there are no
bytes without a row for long, and no row of a complete blob without its bytes.
"""

from dataclasses import dataclass
from typing import Any

from branchline.v1.blobs_pb2 import BLOB_STATE_COMPLETE, BLOB_STATE_UPLOADING, Blob
from branchline.v1.common_pb2 import ENTITY_KIND_BLOB
from branchline.v1.errors_pb2 import ERROR_REASON_QUOTA_EXCEEDED
from sqlalchemy import bindparam, delete, exists, select, update

from services.organization.claims import GRACE_SECONDS
from services.organization.tables import blob_claims, blob_usage, blobs
from services.runtime.actors import current_actor
from services.runtime.clock import Clock
from services.runtime.database import Raced, Reader, Statement, Tx, insert, insert_new, is_in
from services.runtime.errors import NotFound, ResourceExhausted
from services.runtime.principal import current_principal
from services.runtime.spine.resources import Held

BLOB_LEAST_BYTES = 4096
"""What the smallest blob counts against the quota: a file's block."""

UPLOADS_AT_ONCE = 32
"""Most unfinished uploads of one member in an organization: each counts with its whole size. The oldest give way."""

COLLECTED_AT_ONCE = 200

BLOBS = Held(blobs, Blob, ENTITY_KIND_BLOB)

_c, _u = blobs.c, blob_usage.c
_ADD = Statement(insert(blobs))
_SAVE = Statement(
    update(blobs)
    .where(_c.id == bindparam("blob"), _c.revision == bindparam("held"), _c.deleted.is_(False))
    .values(
        complete=bindparam("complete"),
        touch_time=bindparam("now"),
        revision=bindparam("next"),
        payload=bindparam("state"),
    )
)
_UPLOADS = Statement(
    select(_c.id, _c.revision, _c.charged_bytes, _c.payload)
    .where(
        _c.organization_id == bindparam("organization"),
        _c.creator_id == bindparam("creator"),
        _c.complete.is_(False),
        _c.deleted.is_(False),
    )
    .order_by(_c.touch_time.desc(), _c.id.desc())
)
_GIVE_WAY = Statement(
    update(blobs)
    .where(_c.id == bindparam("blob"), _c.revision == bindparam("held"), _c.deleted.is_(False))
    .values(deleted=True, named=False, touch_time=0.0, charged_bytes=bindparam("left"))
)
_BEGIN_USAGE = Statement(insert_new(blob_usage, ["organization_id"]))
_CHARGE = Statement(
    update(blob_usage)
    .where(_u.organization_id == bindparam("organization"), _u.charged_bytes + bindparam("size") <= bindparam("quota"))
    .values(charged_bytes=_u.charged_bytes + bindparam("size"))
)
_REFUND = Statement(
    update(blob_usage)
    .where(_u.organization_id == bindparam("organization"))
    .values(charged_bytes=_u.charged_bytes - bindparam("size"))
)
_END_USAGE = Statement(delete(blob_usage).where(_u.organization_id == bindparam("organization"), _u.charged_bytes <= 0))
_ROW = Statement(
    select(_c.organization_id, _c.charged_bytes)
    .where(_c.id == bindparam("blob"), _c.deleted.is_(True))
    .with_for_update()
)
_DROP = Statement(delete(blobs).where(_c.id == bindparam("blob"), _c.deleted.is_(True)))
_DISCARD = Statement(update(blobs).where(is_in(_c.id, "ids")).values(deleted=True, named=False, touch_time=0.0))
_unnamed = (_c.named.is_(False), ~exists().where(blob_claims.c.blob_id == _c.id))
OLD = Statement(
    select(_c.id)
    .where(*_unnamed, _c.touch_time < bindparam("before"))
    .order_by(_c.touch_time, _c.id)
    .limit(COLLECTED_AT_ONCE)
)
_DISCARD_OLD = Statement(
    update(blobs)
    .where(_c.id == bindparam("blob"), *_unnamed, _c.touch_time < bindparam("before"))
    .values(deleted=True, touch_time=0.0)
)
_OF_ORGANIZATION = Statement(
    select(_c.id).where(_c.organization_id == bindparam("organization"), _c.deleted.is_(False)).limit(COLLECTED_AT_ONCE)
)
_KNOWN = Statement(select(_c.id).where(is_in(_c.id, "ids")))


@dataclass(frozen=True, slots=True)
class Blobs:
    """The blobs of every organization."""

    clock: Clock
    quota_bytes: int

    def begin(self, tx: Tx, blob: Blob) -> Blob:
        """Store a new blob without bytes, which counts with its size from now on; raise ResourceExhausted.

        The caller's uploads that were not written to for longest give way to it, so that nobody is kept from uploading
        by what nobody will finish.
        """
        creator_id = current_principal().user_id
        if creator_id:
            self._make_room(tx, blob.organization_id, creator_id)
        charged = max(blob.size_bytes, BLOB_LEAST_BYTES)
        self._charge(tx, blob.organization_id, charged)
        blob.id = self.clock.new_id("blob")
        blob.state = BLOB_STATE_UPLOADING
        blob.creator.CopyFrom(current_actor())
        blob.create_time.CopyFrom(self.clock.timestamp())
        blob.revision = 1
        row = {
            "id": blob.id,
            "organization_id": blob.organization_id,
            "creator_id": creator_id,
            "sha256": blob.sha256,
            "charged_bytes": charged,
            "complete": False,
            "named": False,
            "deleted": False,
            "touch_time": self.clock.seconds(),
            "revision": blob.revision,
            "payload": blob.SerializeToString(),
        }
        tx.change(_ADD, row)
        return blob

    def of(self, tx: Reader, organization_id: str, blob_id: str) -> Blob:
        """Return a blob of an organization; raise NotFound if it, or the caller, is of another."""
        blob = BLOBS.get(tx, blob_id)
        if blob.organization_id != organization_id or not current_principal().sees(organization_id):
            raise NotFound(ENTITY_KIND_BLOB, blob_id)
        return blob

    def to_upload(self, tx: Reader, organization_id: str, blob_id: str) -> Blob:
        """Return a blob that the caller uploads; raise NotFound, also for what another uploads."""
        blob = self.of(tx, organization_id, blob_id)
        if blob.state != BLOB_STATE_COMPLETE and blob.creator.user_id != current_principal().user_id:
            raise NotFound(ENTITY_KIND_BLOB, blob_id)
        return blob

    def save(self, tx: Tx, blob: Blob, received: int) -> Blob:
        """Note how much of a blob is there; with all of it, it is complete. Raise Raced if it was changed."""
        new = Blob()
        new.CopyFrom(blob)
        new.received_bytes = received
        new.revision += 1
        new.state = BLOB_STATE_COMPLETE if received == blob.size_bytes else BLOB_STATE_UPLOADING
        given: dict[str, Any] = {
            "blob": blob.id,
            "held": blob.revision,
            "complete": new.state == BLOB_STATE_COMPLETE,
            "now": self.clock.seconds(),
            "next": new.revision,
            "state": new.SerializeToString(),
        }
        if not tx.change(_SAVE, given):
            raise Raced
        return new

    def discard(self, tx: Tx, blob_id: str) -> None:
        """Take a blob away from everybody. Its bytes, then its row, are collected."""
        tx.change(_DISCARD, {"ids": [blob_id]})

    def discard_old(self, tx: Tx, blob_id: str) -> bool:
        """Take a blob away that nothing has named for the time of grace; say whether it is, now or before."""
        return tx.change(_DISCARD_OLD, {"blob": blob_id, "before": self.clock.seconds() - GRACE_SECONDS}) > 0

    def discard_of(self, tx: Tx, organization_id: str) -> bool:
        """Take some blobs of an organization away; say whether there may be more."""
        ids = [row.id for row in tx.rows(_OF_ORGANIZATION, {"organization": organization_id})]
        tx.change(_DISCARD, {"ids": ids})
        return len(ids) == COLLECTED_AT_ONCE

    def old(self, tx: Reader) -> list[str]:
        """Return some blobs that nothing has named for the time of grace, or that were discarded."""
        return [row.id for row in tx.rows(OLD, {"before": self.clock.seconds() - GRACE_SECONDS})]

    def drop(self, tx: Tx, blob_id: str) -> None:
        """Forget a discarded blob, whose bytes are gone: it counts no more."""
        row: Any = tx.row(_ROW, {"blob": blob_id})
        if row is None or not tx.change(_DROP, {"blob": blob_id}):
            return
        tx.change(_REFUND, {"organization": row.organization_id, "size": row.charged_bytes})
        tx.change(_END_USAGE, {"organization": row.organization_id})

    def unknown(self, tx: Reader, ids: set[str]) -> set[str]:
        """Return those of some ids that no row has."""
        return ids - {row.id for row in tx.rows(_KNOWN, {"ids": sorted(ids)})}

    def _make_room(self, tx: Tx, organization_id: str, creator_id: str) -> None:
        """Discard a member's oldest uploads but for one less than the most; what they never got counts no more."""
        tx.take_turn("blob_uploads", f"{organization_id}/{creator_id}")
        held: list[Any] = tx.rows(_UPLOADS, {"organization": organization_id, "creator": creator_id})
        for row in held[UPLOADS_AT_ONCE - 1 :]:
            received = Blob.FromString(row.payload).received_bytes
            left = max(received, BLOB_LEAST_BYTES) if received else 0
            if not tx.change(_GIVE_WAY, {"blob": row.id, "held": row.revision, "left": left}):
                raise Raced  # it was written to
            tx.change(_REFUND, {"organization": organization_id, "size": row.charged_bytes - left})

    def _charge(self, tx: Tx, organization_id: str, size: int) -> None:
        tx.change(_BEGIN_USAGE, {"organization_id": organization_id, "charged_bytes": 0})
        given = {"organization": organization_id, "size": size, "quota": self.quota_bytes}
        if not tx.change(_CHARGE, given):
            words = f"the blobs of an organization may have {self.quota_bytes} bytes together"
            raise ResourceExhausted(ERROR_REASON_QUOTA_EXCEEDED, words, limit="blob_bytes")
