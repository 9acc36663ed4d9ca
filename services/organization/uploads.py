"""Blobs as they come in, are read and leave: their rows and their bytes, in an order that any stop may interrupt.

What has begun to write goes on to its end when its caller leaves, so nothing is written any more once a blob's lane is
free; a stop of the process leaves no more than bytes that the next write writes again.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from branchline.v1.blobs_pb2 import BLOB_STATE_COMPLETE, Blob
from branchline.v1.common_pb2 import ENTITY_KIND_BLOB
from branchline.v1.errors_pb2 import (
    ERROR_REASON_DIGEST_MISMATCH,
    ERROR_REASON_OFFSET_GAP,
    ERROR_REASON_OVERLOADED,
)

from services.organization.blob_bytes import SEGMENT_BYTES, BlobBytes
from services.organization.blobs import Blobs
from services.organization.claims import GRACE_SECONDS, Claims
from services.runtime.clock import Clock
from services.runtime.database import Database, Reader
from services.runtime.errors import DataLoss, InvalidArgument, NotFound, OutOfRange, Unavailable
from services.runtime.lanes import Lanes, Turns
from services.runtime.logging import get_logger
from services.runtime.loops import for_each

log = get_logger(__name__)

T = TypeVar("T")

_CHECKED_AT_ONCE = 2
_CHECK_WAIT_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Uploads:
    """The blobs of every organization, with their bytes."""

    database: Database
    clock: Clock
    blobs: Blobs
    claims: Claims
    kept: BlobBytes
    _lanes: Lanes = field(default_factory=Lanes)
    _checks: Turns = field(default_factory=partial(Turns, _CHECKED_AT_ONCE))
    _running: "set[asyncio.Task[Any]]" = field(default_factory=set["asyncio.Task[Any]"])

    async def write(self, organization_id: str, blob_id: str, offset: int, data: bytes) -> Blob:
        """Put the next part of a blob; what was received before is passed over.

        Raise NotFound, OutOfRange behind a gap, InvalidArgument beyond the end, Unavailable while another part is
        written, and DataLoss, with the upload forgotten, if the whole has another digest.
        """
        if self._lanes.busy(blob_id):  # else who sends without waiting would fill the memory
            raise Unavailable(ERROR_REASON_OVERLOADED, "another part of the blob is being written; try again")
        return await self._to_its_end(self._write(organization_id, blob_id, offset, data))

    async def _write(self, organization_id: str, blob_id: str, offset: int, data: bytes) -> Blob:
        async with self._lanes.hold(blob_id):
            blob = await self.database.read(self.blobs.to_upload, organization_id, blob_id)
            received = blob.received_bytes
            if offset > received:
                words = f"{received} bytes were received; those before {offset} are missing"
                raise OutOfRange(ERROR_REASON_OFFSET_GAP, words, offset=str(received))
            if offset + len(data) > blob.size_bytes:
                raise InvalidArgument("data", f"goes beyond the blob's {blob.size_bytes} bytes")
            fresh = data[received - offset :]
            if blob.state == BLOB_STATE_COMPLETE or not fresh:
                return blob
            await self.kept.append(blob_id, received, fresh)
            if received + len(fresh) == blob.size_bytes:
                await self._check(blob)
            blob = await self.database.write(self.blobs.save, blob, received + len(fresh))
            await self.kept.drop_tail(blob_id, received)
            return blob

    async def _check(self, blob: Blob) -> None:
        """Have all bytes of a blob kept; raise DataLoss, with the blob forgotten, if they are others."""
        try:
            async with self._checks.hold(blob.organization_id, _CHECK_WAIT_SECONDS):
                found = await self.kept.digest(blob.id, blob.size_bytes)
        except TimeoutError:
            raise Unavailable(ERROR_REASON_OVERLOADED, "too many blobs are checked at this moment") from None
        if found == blob.sha256:
            await self.kept.make_durable(blob.id, blob.size_bytes)
            return
        await self._discard(blob.id)
        words = "what was uploaded has another digest; the upload is forgotten"
        raise DataLoss(ERROR_REASON_DIGEST_MISMATCH, words, sha256=found)

    async def store(self, shown: Blob, task_id: str, offset: int, data: bytes) -> Blob:
        """Put the next part of something that a task names once it is whole; the first makes its blob.

        What the task names with the same digest already is that blob.
        """
        return await self._to_its_end(self._store(shown, task_id, offset, data))

    async def _store(self, shown: Blob, task_id: str, offset: int, data: bytes) -> Blob:
        async with self._lanes.hold(f"{task_id}/{shown.sha256}"):
            known = await self.database.read(self.claims.of_digest, shown.organization_id, task_id, shown.sha256)
            if known is not None:
                return known
            blob_id = shown.id or (await self.database.write(self.blobs.begin, shown)).id
            try:
                blob = await self._write(shown.organization_id, blob_id, offset, data)
            except Exception:  # whoever shows it gives up: nobody goes on with it
                await self._discard(blob_id)
                raise
            if blob.state == BLOB_STATE_COMPLETE:
                await self.database.write(self.claims.name, blob, task_id)
            return blob

    async def read(self, blob: Blob, offset: int, length: int = SEGMENT_BYTES) -> bytes:
        """Return a part of a complete blob, at most a segment; nothing behind its end."""
        wanted = min(length or SEGMENT_BYTES, SEGMENT_BYTES)
        try:
            return await self.kept.read(blob.id, blob.size_bytes, offset, wanted)
        except FileNotFoundError:  # collected at this moment
            raise NotFound(ENTITY_KIND_BLOB, blob.id) from None

    async def collect(self) -> None:
        """Drop the claims of what is gone, and delete the blobs that nothing has named for the time of grace."""
        await self._all(self.claims.gone, "drop a task's claims", self._drop_claims)
        while await self.database.write(self.claims.confirm_some):
            pass
        await self._all(self.blobs.old, "collect a blob", self._collect)

    async def _all(
        self, some: Callable[[Reader], Sequence[str]], name: str, work: Callable[[str], Awaitable[None]]
    ) -> None:
        """Do something with all that there is, some at a time, until one fails: it would come up again."""
        failed = False

        async def tried(one: str) -> None:
            nonlocal failed
            try:
                await work(one)
            except Exception:
                failed = True
                raise

        while not failed and (found := await self.database.read(some)):
            await for_each(found, name, tried, parallel=4)

    async def _drop_claims(self, task_id: str) -> None:
        while await self.database.write(self.claims.drop_gone, task_id):
            pass

    async def _collect(self, blob_id: str) -> None:
        async with self._lanes.hold(blob_id):
            if await self.database.write(self.blobs.discard_old, blob_id):
                await self._forget(blob_id)

    async def collect_strays(self) -> None:
        """Delete bytes of which nothing is known: a database was put back, or a store was late."""
        async for ids in self.kept.kept_since(self.clock.seconds() - GRACE_SECONDS):
            for blob_id in await self.database.read(self.blobs.unknown, ids):
                log.warning("bytes of an unknown blob deleted", blob_id=blob_id)
                await self.kept.forget(blob_id)

    async def _discard(self, blob_id: str) -> None:
        await self.database.write(self.blobs.discard, blob_id)
        await self._forget(blob_id)

    async def _forget(self, blob_id: str) -> None:
        await self.kept.forget(blob_id)
        await self.database.write(self.blobs.drop, blob_id)

    async def _to_its_end(self, work: Coroutine[Any, Any, T]) -> T:
        """Do something to its end, also if the caller leaves."""
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return await asyncio.shield(task)

    async def settle(self) -> None:
        """Wait for what has begun to write."""
        await asyncio.gather(*self._running, return_exceptions=True)
