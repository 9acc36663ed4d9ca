"""The child's end of an edge: one long-lived stream to the coordinator, batches up, acknowledgements down.

At least once and in order. After a break it begins again with what was not acknowledged; the coordinator's revision
guard makes the repetition harmless.
"""

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import grpc
from branchline_internal.spine.v1 import push_pb2, push_pb2_grpc

from services.runtime.logging import get_logger
from services.runtime.loops import being_cancelled
from services.runtime.retry import Backoff
from services.runtime.spine.outbox import COORDINATOR, Outbox, OutboxRow

log = get_logger(__name__)

BATCH_ENTRIES = 128
UNACKNOWLEDGED_BATCHES = 4


@dataclass(slots=True)
class PushClient:
    """Pushes a service's outbox to its coordinator for as long as the service runs."""

    outbox: Outbox
    stub: push_pb2_grpc.PushServiceStub
    child: str
    _backoff: Backoff = field(default_factory=Backoff)

    async def run(self) -> None:
        """Push for ever, connecting again after every break, of the stream or of the database."""
        while True:
            try:
                await self._stream()
            except (Exception, asyncio.CancelledError) as error:
                if being_cancelled():
                    raise
                log.info("push stream broke", child=self.child, error=_words(error))
            self.outbox.line(COORDINATOR).fall_behind()
            await asyncio.sleep(self._backoff.next_seconds())

    async def _stream(self) -> None:
        call: Any = self.stub.Push()
        window = asyncio.Semaphore(UNACKNOWLEDGED_BATCHES)
        in_flight: deque[list[OutboxRow]] = deque()
        writing = asyncio.create_task(self._write(call, window, in_flight))
        writing.add_done_callback(lambda _: call.cancel())  # ends the reading half
        try:
            await self._read(call, window, in_flight)
        finally:
            call.cancel()
            writing.cancel()
            await asyncio.wait({writing})
            if not writing.cancelled() and (error := writing.exception()) is not None:
                log.info("pushing failed", child=self.child, error=_words(error))

    async def _write(self, call: Any, window: asyncio.Semaphore, in_flight: deque[list[OutboxRow]]) -> None:
        line = self.outbox.line(COORDINATOR)
        number = 0
        while True:
            await window.acquire()
            rows = await line.take(BATCH_ENTRIES)
            number += 1
            in_flight.append(rows)
            request = push_pb2.PushRequest(child=self.child, batch=number)
            for row in rows:
                entry = request.entries.add(
                    outbox_seq=row.seq, id=row.entity_id, revision=row.revision, deleted=row.deleted
                )
                entry.state.type_url, entry.state.value = row.type_url, row.payload
            await call.write(request)

    async def _read(self, call: Any, window: asyncio.Semaphore, in_flight: deque[list[OutboxRow]]) -> None:
        while True:
            response = await call.read()
            if response is grpc.aio.EOF:
                raise ConnectionError(f"the coordinator ended the stream: {await call.code()}")
            self._backoff.reset()
            sent = in_flight.popleft()
            refused = {entry.outbox_seq: entry.reason for entry in response.rejected}
            self.outbox.arrived([row for row in sent if row.seq not in refused])
            for row in sent:
                if row.seq in refused:
                    log.error("entry parked", child=self.child, entity=row.entity_id, reason=refused[row.seq])
                    await self.outbox.park(row, refused[row.seq])
            window.release()


def _words(error: BaseException) -> str:
    return f"{error.code().name}: {error.details()}" if isinstance(error, grpc.aio.AioRpcError) else repr(error)
