"""The coordinator's end of an edge: what children push becomes rows.

Batches that wait at the same moment are applied in one transaction (group commit). An entry that cannot be
applied is refused with a reason and never holds up or undoes its neighbours.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
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
    """What a coordinator does with one type of state: with all entries of a batch at once, in their order.

    A refused entry is found by trying them one by one, so `apply` may refuse any for all.
    """

    type: type[Message]
    apply: Callable[[Transaction, Sequence[Pushed[Any]]], Awaitable[None]]


def each(apply: Callable[[Transaction, Pushed[M]], Awaitable[None]]) -> "ApplyAll[M]":
    """Return a handler's `apply` from one that takes a single entry."""

    async def apply_all(tx: Transaction, entries: Sequence[Pushed[M]]) -> None:
        for entry in entries:
            await apply(tx, entry)

    return apply_all


ApplyAll = Callable[[Transaction, Sequence[Pushed[M]]], Awaitable[None]]


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
        async with self.database.transaction() as tx:
            if not one_by_one:
                await self._apply_entries(tx, [entry for batch in batches for entry in batch.entries])
                return [{} for _ in batches]
            rejected: list[dict[int, str]] = []
            for batch in batches:
                refused: dict[int, str] = {}
                for entry in batch.entries:
                    try:
                        async with tx.savepoint():
                            await self._apply_entries(tx, [entry])
                    except (RejectedEntryError, DecodeError) as error:
                        refused[entry.outbox_seq] = str(error)
                rejected.append(refused)
        return rejected

    async def _apply_entries(self, tx: Transaction, entries: Sequence[push_pb2.PushEntry]) -> None:
        """Apply runs of entries of the same type together."""
        for type_url, run in groupby(entries, lambda entry: entry.state.type_url):
            name = type_url.rpartition("/")[2]
            handler = self.handlers.get(name)
            if handler is None:
                raise RejectedEntryError(f"this coordinator takes no {name}")
            await handler.apply(tx, [_pushed(handler.type, entry) for entry in run])


def _pushed(state: type[Message], entry: push_pb2.PushEntry) -> Pushed[Message]:
    return Pushed(entry.id, entry.revision, entry.deleted, state.FromString(entry.state.value))


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
