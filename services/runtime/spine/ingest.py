"""The coordinator's end of an edge: what children push becomes rows.

Batches that wait at the same moment are applied in one function. An entry whose handler raises anything is tried
alone, and refused with its reason if it still does: it never holds up or undoes its neighbours, whatever the bug.
Only what the database itself cannot do is no entry's fault; the child sends it again.
"""

import asyncio
import contextvars
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import grpc
from branchline_internal.spine.v1 import push_pb2, push_pb2_grpc
from google.protobuf.message import Message

from services.runtime.database import Database, Tx
from services.runtime.errors import reason_of
from services.runtime.logging import get_logger
from services.runtime.spine.outbox import type_url_of

log = get_logger(__name__)

_MERGED_ENTRIES = 256
"""Few enough that the batches of an edge move through the levels side by side, not as one."""
_MERGED_BYTES = 8 * 1024 * 1024
_AHEAD_BATCHES = 8

M = TypeVar("M", bound=Message)
Entries = Sequence[push_pb2.PushEntry]
Refused = dict[int, str]
"""Reasons by the place of an entry in its batch."""


class RejectedEntryError(Exception):
    """The entry is bad data and will be refused however often it comes."""


class Pushed(NamedTuple, Generic[M]):
    """One entry as a handler gets it: the newest state of a child's entity."""

    id: str
    revision: int
    deleted: bool
    state: M
    payload: bytes = b""
    """The state as it came."""


@dataclass(frozen=True, slots=True)
class Handler:
    """What a coordinator does with some types of state: with all entries of a batch at once, in their order.

    `apply` may raise for any entry: they are then tried one by one.
    """

    types: type[Message] | tuple[type[Message], ...]
    apply: Callable[[Tx, Sequence[Pushed[Any]]], None]


def each(apply: Callable[[Tx, Pushed[M]], None]) -> Callable[[Tx, Sequence[Pushed[M]]], None]:
    """Return a handler's `apply` from one that takes a single entry."""

    def apply_all(tx: Tx, entries: Sequence[Pushed[M]]) -> None:
        for entry in entries:
            apply(tx, entry)

    return apply_all


@dataclass(slots=True)
class _Batch:
    entries: Entries
    size: int
    done: "asyncio.Future[Refused]"


class Ingest:
    """Applies what the children push."""

    def __init__(self, database: Database, *handlers: Handler) -> None:
        """Entries of a batch are applied handler by handler, in the order in which these are given."""
        self._database = database
        self._handlers = handlers
        self._places: Mapping[str, tuple[int, type[Message]]] = {
            type_url_of(one): (place, one)
            for place, handler in enumerate(handlers)
            for one in (handler.types if isinstance(handler.types, tuple) else (handler.types,))
        }
        self._waiting: deque[_Batch] = deque()
        self._applying: asyncio.Task[None] | None = None

    def submit(self, request: push_pb2.PushRequest) -> "asyncio.Future[Refused]":
        """Apply a batch; the future holds the refused entries' places with reasons, after the commit."""
        batch = _Batch(request.entries, request.ByteSize(), asyncio.get_running_loop().create_future())
        batch.done.add_done_callback(_looked_at)
        self._waiting.append(batch)
        if self._applying is None or self._applying.done():
            self._applying = asyncio.create_task(self._apply_waiting(), context=contextvars.Context())
        return batch.done

    async def _apply_waiting(self) -> None:
        while self._waiting:
            batches = self._merged()
            try:
                refused = await self._database.write(
                    self._apply, [entry for batch in batches for entry in batch.entries]
                )
            except BaseException as error:
                for batch in batches:
                    if not batch.done.done():
                        batch.done.set_exception(error)
                if not isinstance(error, Exception):
                    raise
                continue
            first = 0
            for batch in batches:
                last = first + len(batch.entries)
                if not batch.done.done():
                    batch.done.set_result({k - first: why for k, why in refused.items() if first <= k < last})
                first = last

    def _merged(self) -> list[_Batch]:
        """Take batches that are applied together: one, and others as long as they are not too much."""
        merged: list[_Batch] = []
        entries = size = 0
        while self._waiting:
            batch = self._waiting[0]
            entries += len(batch.entries)
            size += batch.size
            if merged and (entries > _MERGED_ENTRIES or size > _MERGED_BYTES):
                break
            merged.append(self._waiting.popleft())
        return merged

    def _apply(self, tx: Tx, entries: Entries) -> Refused:
        try:
            with tx.savepoint():
                self._apply_together(tx, entries)
                return {}
        except Exception as error:
            if len(entries) == 1:
                return {0: self._refuse(tx, entries[0], error)}
            if tx.is_outage(error):
                raise
        refused: Refused = {}
        for place, entry in sorted(enumerate(entries), key=lambda found: self._rank(found[1])):
            try:
                with tx.savepoint():
                    self._apply_together(tx, [entry])
            except Exception as error:  # noqa: BLE001 - it is parked with its reason
                refused[place] = self._refuse(tx, entry, error)
        return refused

    def _refuse(self, tx: Tx, entry: push_pb2.PushEntry, error: Exception) -> str:
        """Return why an entry is refused. Raise the error if it is the database's, not the entry's."""
        if tx.is_outage(error):
            raise error
        reason = reason_of(error)
        if not isinstance(error, RejectedEntryError):
            log.error("entry not applied", type=entry.state.type_url, entity=entry.id, exc_info=error)
            reason = f"{type(error).__name__}: {reason}"
        return reason

    def _apply_together(self, tx: Tx, entries: Entries) -> None:
        pushed: list[list[Pushed[Any]]] = [[] for _ in self._handlers]
        for entry in entries:
            given = entry.state
            known = self._places.get(given.type_url)
            if known is None:
                raise RejectedEntryError(f"this coordinator takes no {given.type_url.rpartition('/')[2]}")
            place, state = known
            payload = given.value
            pushed[place].append(Pushed(entry.id, entry.revision, entry.deleted, state.FromString(payload), payload))
        for handler, found in zip(self._handlers, pushed, strict=True):
            if found:
                handler.apply(tx, found)

    def _rank(self, entry: push_pb2.PushEntry) -> int:
        known = self._places.get(entry.state.type_url)
        return known[0] if known is not None else len(self._handlers)


def _looked_at(done: "asyncio.Future[Refused]") -> None:
    """Look at a future's error although the stream that waited for it may be gone."""
    if not done.cancelled():
        done.exception()


class PushServicer(push_pb2_grpc.PushServiceServicer):
    """Serves the push streams of all children."""

    def __init__(self, ingest: Ingest) -> None:
        self._ingest = ingest

    async def Push(
        self, request_iterator: AsyncIterator[push_pb2.PushRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[push_pb2.PushResponse]:
        """Apply batches and acknowledge each after its commit, in order. Those that came meanwhile go together."""
        applied: asyncio.Queue[tuple[push_pb2.PushRequest, asyncio.Future[Refused]] | None] = asyncio.Queue()
        ahead = asyncio.Semaphore(_AHEAD_BATCHES)

        async def read() -> None:
            try:
                async for request in request_iterator:
                    await ahead.acquire()
                    applied.put_nowait((request, self._ingest.submit(request)))
            finally:
                applied.put_nowait(None)

        reading = asyncio.create_task(read())
        try:
            while (taken := await applied.get()) is not None:
                request, future = taken
                refused = await future
                ahead.release()
                rejected = [
                    push_pb2.RejectedEntry(outbox_seq=request.entries[place].outbox_seq, reason=reason)
                    for place, reason in refused.items()
                ]
                yield push_pb2.PushResponse(batch=request.batch, rejected=rejected)
            await reading  # raises if the stream broke
        finally:
            reading.cancel()
