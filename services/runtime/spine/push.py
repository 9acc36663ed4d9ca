"""The child's end of an edge: one long-lived stream to the coordinator, batches up, acknowledgements down.

At least once and in order. After a break it begins again with what was not acknowledged; the coordinator's revision
guard makes the repetition harmless.
"""

import asyncio
from collections import deque
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

import grpc
import structlog
from branchline.spine.v1 import push_pb2, push_pb2_grpc

from services.runtime.loops import cancelled_from_outside
from services.runtime.retry import Backoff
from services.runtime.spine.outbox import COORDINATOR, Outbox, OutboxRow

log = structlog.get_logger()

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
        me = asyncio.current_task()
        assert me is not None
        while True:
            try:
                # In a task of its own: on Python 3.11 a task group that failed leaves its task looking cancelled, and
                # one that fails while it is being cancelled raises its failure alone.
                await asyncio.create_task(self._stream())
            except (Exception, asyncio.CancelledError) as error:
                if me.cancelling():
                    raise asyncio.CancelledError from error
                log.info("push stream broke", child=self.child, error=_words(error))
            self.outbox.line(COORDINATOR).fall_behind()
            await asyncio.sleep(self._backoff.next_seconds())

    async def _stream(self) -> None:
        call: Any = self.stub.Push()
        window = asyncio.Semaphore(UNACKNOWLEDGED_BATCHES)
        in_flight: deque[list[OutboxRow]] = deque()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_until_it_breaks(self._write(call, window, in_flight)))
                group.create_task(_until_it_breaks(self._read(call, window, in_flight)))
        except* Exception as errors:
            raise _first(errors) from errors
        finally:
            call.cancel()

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


async def _until_it_breaks(half: Coroutine[Any, Any, None]) -> None:
    """Run one half of the stream. A call that gRPC cancels must end the other half, too."""
    try:
        await half
    except asyncio.CancelledError as error:
        if cancelled_from_outside(error):
            raise
        raise ConnectionError("the call was cancelled") from error


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


def _words(error: BaseException) -> str:
    return f"{error.code().name}: {error.details()}" if isinstance(error, grpc.aio.AioRpcError) else repr(error)
