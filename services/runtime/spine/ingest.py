"""The coordinator's end of an edge: what children push becomes rows.

Batches that wait at the same moment are applied in one transaction (group commit). An entry that cannot be
applied is refused with a reason and never holds up or undoes its neighbours.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import grpc
import structlog
from branchline.spine.v1 import push_pb2, push_pb2_grpc
from google.protobuf.message import DecodeError, Message

from services.runtime.database import Database, Transaction

log = structlog.get_logger()

_MERGED_ENTRIES = 1024

M = TypeVar("M", bound=Message)


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
    """What a coordinator does with one type of state."""

    type: type[Message]
    apply: Callable[[Transaction, Pushed[Any]], Awaitable[None]]


@dataclass(slots=True)
class _Batch:
    entries: Sequence[push_pb2.PushEntry]
    done: asyncio.Future[dict[int, str]]


@dataclass(slots=True)
class Ingest:
    """Applies what the children push, in the service's one writer."""

    database: Database
    handlers: Mapping[str, Handler]
    _waiting: asyncio.Queue[_Batch] = field(default_factory=asyncio.Queue[_Batch])

    async def submit(self, entries: Sequence[push_pb2.PushEntry]) -> dict[int, str]:
        """Apply a batch; return the refused entries' outbox numbers with reasons, after the commit."""
        batch = _Batch(entries, asyncio.get_running_loop().create_future())
        await self._waiting.put(batch)
        return await batch.done

    async def run(self) -> None:
        """Apply for ever."""
        while True:
            batches = [await self._waiting.get()]
            count = len(batches[0].entries)
            while count < _MERGED_ENTRIES and not self._waiting.empty():
                batches.append(self._waiting.get_nowait())
                count += len(batches[-1].entries)
            await self._apply(batches)

    async def _apply(self, batches: Sequence[_Batch]) -> None:
        try:
            try:
                rejected = await self._commit(batches, one_by_one=False)
            except (RejectedEntryError, DecodeError):
                rejected = await self._commit(batches, one_by_one=True)
        except Exception as error:  # the database refused: the children will send it again
            log.exception("batch not applied")
            for batch in batches:
                if not batch.done.cancelled():
                    batch.done.set_exception(error)
            return
        for batch, refused in zip(batches, rejected, strict=True):
            if not batch.done.cancelled():
                batch.done.set_result(refused)

    async def _commit(self, batches: Sequence[_Batch], *, one_by_one: bool) -> list[dict[int, str]]:
        rejected: list[dict[int, str]] = []
        async with self.database.transaction() as tx:
            for batch in batches:
                refused: dict[int, str] = {}
                for entry in batch.entries:
                    if not one_by_one:
                        await self._apply_entry(tx, entry)
                        continue
                    try:
                        async with tx.savepoint():
                            await self._apply_entry(tx, entry)
                    except (RejectedEntryError, DecodeError) as error:
                        refused[entry.outbox_seq] = str(error)
                rejected.append(refused)
        return rejected

    async def _apply_entry(self, tx: Transaction, entry: push_pb2.PushEntry) -> None:
        name = entry.state.type_url.rpartition("/")[2]
        handler = self.handlers.get(name)
        if handler is None:
            raise RejectedEntryError(f"this coordinator takes no {name}")
        state = handler.type()
        state.ParseFromString(entry.state.value)
        await handler.apply(tx, Pushed(entry.id, entry.revision, entry.deleted, state))


def handlers(*wanted: Handler) -> dict[str, Handler]:
    """Return the handlers by the full names of their types."""
    return {handler.type.DESCRIPTOR.full_name: handler for handler in wanted}


class PushServicer(push_pb2_grpc.PushServiceServicer):
    """Serves the push streams of all children."""

    def __init__(self, ingest: Ingest) -> None:
        self._ingest = ingest

    async def Push(
        self, request_iterator: AsyncIterator[push_pb2.PushRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[push_pb2.PushResponse]:
        """Apply batches and acknowledge each after its commit, in order."""
        async for request in request_iterator:
            refused = await self._ingest.submit(request.entries)
            rejected = [push_pb2.RejectedEntry(outbox_seq=seq, reason=reason) for seq, reason in refused.items()]
            yield push_pb2.PushResponse(batch=request.batch, rejected=rejected)
