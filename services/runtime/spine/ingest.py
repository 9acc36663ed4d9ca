"""The coordinator's end of an edge: what children push becomes rows.

Batches that wait at the same moment are applied in one function. An entry whose handler raises anything is tried
alone, and refused with its reason if it still does: it never holds up or undoes its neighbours, whatever the bug.
Only what the database itself cannot do is no entry's fault; the child sends it again.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grpc
import structlog
from branchline.spine.v1 import push_pb2, push_pb2_grpc
from google.protobuf.message import Message

from services.runtime.database import Database, DatabaseError, Tx
from services.runtime.errors import reason_of

log = structlog.get_logger()

_MERGED_ENTRIES = 1024
_AHEAD_BATCHES = 8

M = TypeVar("M", bound=Message)
Entries = Sequence[push_pb2.PushEntry]
Refused = dict[int, str]
"""Reasons by the place of an entry in its batch."""


class RejectedEntryError(Exception):
    """The entry is bad data and will be refused however often it comes."""


@dataclass(frozen=True, slots=True)
class Pushed(Generic[M]):
    """One entry as a handler gets it: the newest state of a child's entity."""

    id: str
    revision: int
    deleted: bool
    state: M


@dataclass(frozen=True, slots=True)
class Handler:
    """What a coordinator does with one type of state: with all entries of a batch at once, in their order.

    `apply` may raise for any entry: they are then tried one by one.
    """

    type: type[Message]
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
    done: "asyncio.Future[Refused]"


class Ingest:
    """Applies what the children push."""

    def __init__(self, database: Database, *handlers: Handler) -> None:
        """Entries of a batch are applied type by type, in the order in which the handlers are given."""
        self._database = database
        self._handlers: Mapping[str, Handler] = {handler.type.DESCRIPTOR.full_name: handler for handler in handlers}
        self._waiting: list[_Batch] = []
        self._applying: asyncio.Task[None] | None = None

    def submit(self, entries: Entries) -> "asyncio.Future[Refused]":
        """Apply a batch; the future holds the refused entries' places with reasons, after the commit."""
        batch = _Batch(entries, asyncio.get_running_loop().create_future())
        self._waiting.append(batch)
        if self._applying is None or self._applying.done():
            self._applying = asyncio.create_task(self._apply_waiting())
        return batch.done

    async def _apply_waiting(self) -> None:
        while self._waiting:
            batches = [self._waiting.pop(0)]
            count = len(batches[0].entries)
            while self._waiting and count < _MERGED_ENTRIES:
                batches.append(self._waiting.pop(0))
                count += len(batches[-1].entries)
            try:
                refused = await self._database.write(
                    self._apply, [entry for batch in batches for entry in batch.entries]
                )
            except BaseException as error:  # noqa: BLE001 - the children will send it again
                for batch in batches:
                    if not batch.done.done():
                        batch.done.set_exception(error)
                continue
            first = 0
            for batch in batches:
                last = first + len(batch.entries)
                if not batch.done.done():
                    batch.done.set_result({k - first: why for k, why in refused.items() if first <= k < last})
                first = last

    def _apply(self, tx: Tx, entries: Entries) -> Refused:
        try:
            with tx.savepoint():
                self._apply_together(tx, entries)
                return {}
        except DatabaseError:
            raise
        except Exception as error:
            if len(entries) == 1:
                return {0: self._refuse(tx, entries[0], error)}
        refused: Refused = {}
        for place, entry in enumerate(entries):
            try:
                with tx.savepoint():
                    self._apply_together(tx, [entry])
            except DatabaseError:
                raise
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
        by_type: dict[str, list[push_pb2.PushEntry]] = {name: [] for name in self._handlers}
        for entry in entries:
            name = entry.state.type_url.rpartition("/")[2]
            if name not in by_type:
                raise RejectedEntryError(f"this coordinator takes no {name}")
            by_type[name].append(entry)
        for name, found in by_type.items():
            if found:
                handler = self._handlers[name]
                handler.apply(tx, [_pushed(handler.type, entry) for entry in found])


def _pushed(state: type[Message], entry: push_pb2.PushEntry) -> Pushed[Message]:
    return Pushed(entry.id, entry.revision, entry.deleted, state.FromString(entry.state.value))


class PushServicer(push_pb2_grpc.PushServiceServicer):
    """Serves the push streams of all children."""

    def __init__(self, ingest: Ingest) -> None:
        self._ingest = ingest

    async def Push(
        self, request_iterator: AsyncIterator[push_pb2.PushRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[push_pb2.PushResponse]:
        """Apply batches and acknowledge each after its commit, in order. Those that came meanwhile go together."""
        applied: asyncio.Queue[tuple[push_pb2.PushRequest, asyncio.Future[Refused]] | None]
        applied = asyncio.Queue(_AHEAD_BATCHES)

        async def read() -> None:
            async for request in request_iterator:
                await applied.put((request, self._ingest.submit(request.entries)))
            await applied.put(None)

        reading = asyncio.create_task(read())
        try:
            while True:
                getting = asyncio.ensure_future(applied.get())
                await asyncio.wait({getting, reading}, return_when=asyncio.FIRST_COMPLETED)
                if not getting.done():
                    reading.result()  # raises if the stream broke
                taken = await getting
                if taken is None:
                    return
                request, future = taken
                refused = await future
                rejected = [
                    push_pb2.RejectedEntry(outbox_seq=request.entries[place].outbox_seq, reason=reason)
                    for place, reason in refused.items()
                ]
                yield push_pb2.PushResponse(batch=request.batch, rejected=rejected)
        finally:
            reading.cancel()
