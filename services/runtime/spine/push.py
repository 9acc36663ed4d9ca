"""The child's end of an edge: one long-lived stream to the coordinator, batches up, acknowledgements down.

At least once and in order. After a break it begins again with the oldest row that was not acknowledged; the
coordinator's revision guard makes the repetition harmless.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import grpc
import structlog
from branchline.spine.v1 import push_pb2, push_pb2_grpc

from services.runtime.retry import Backoff
from services.runtime.spine.outbox import COORDINATOR, Outbox, OutboxRow

log = structlog.get_logger()

BATCH_ENTRIES = 128
UNACKNOWLEDGED_BATCHES = 4
_POLL_SECONDS = 30.0


@dataclass(slots=True)
class PushClient:
    """Pushes a service's outbox to its coordinator for as long as the service runs."""

    outbox: Outbox
    stub: Callable[[], "push_pb2_grpc.PushServiceStub"]
    child: str
    connected: bool = False
    _backoff: Backoff = field(default_factory=Backoff)

    async def run(self) -> None:
        """Push for ever, connecting again after every break."""
        while True:
            try:
                await self._stream()
            except grpc.aio.AioRpcError as error:
                log.info("push stream broke", child=self.child, code=error.code().name, details=error.details())
            finally:
                self.connected = False
            await asyncio.sleep(self._backoff.next_seconds())

    async def _stream(self) -> None:
        window = asyncio.Semaphore(UNACKNOWLEDGED_BATCHES)
        in_flight: deque[list[int]] = deque()
        call = self.stub().Push(self._batches(window, in_flight))
        try:
            async for response in call:
                self.connected = True
                self._backoff.reset()
                sent = in_flight.popleft()
                parked = {entry.outbox_seq: entry.reason for entry in response.rejected}
                for seq, reason in parked.items():
                    log.error("entry parked", child=self.child, outbox_seq=seq, reason=reason)
                await self.outbox.settle(sent, parked)
                window.release()
        finally:
            call.cancel()

    async def _batches(
        self, window: asyncio.Semaphore, in_flight: deque[list[int]]
    ) -> AsyncIterator[push_pb2.PushRequest]:
        cursor = 0
        number = 0
        while True:
            await window.acquire()
            rows = await self._next_rows(cursor)
            cursor = rows[-1].seq
            number += 1
            in_flight.append([row.seq for row in rows])
            yield push_pb2.PushRequest(child=self.child, batch=number, entries=[_entry(row) for row in rows])

    async def _next_rows(self, cursor: int) -> list[OutboxRow]:
        while True:
            ticket = self.outbox.changed.ticket
            rows = await self.outbox.pending(COORDINATOR, cursor, BATCH_ENTRIES)
            if rows:
                return rows
            await self.outbox.changed.wait(ticket, _POLL_SECONDS)


def _entry(row: OutboxRow) -> push_pb2.PushEntry:
    return push_pb2.PushEntry(
        outbox_seq=row.seq, id=row.entity_id, revision=row.revision, deleted=row.deleted, state=row.state
    )
