"""Carries outbox rows to a child by idempotent unary calls: one row at a time, a lane per entity.

What concerns one entity is delivered in order; what concerns others does not wait for it. A row that the receiver
will never take is parked; one that failed is tried again, later each time, and parked after many attempts. While the
receiver cannot be reached at all, nothing is counted and everything waits.
"""

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import grpc
import structlog

from services.runtime.errors import is_permanent, reason_of
from services.runtime.loops import cancelled_from_outside
from services.runtime.retry import Backoff
from services.runtime.spine.outbox import Outbox, OutboxRow

log = structlog.get_logger()

DEADLINE_SECONDS = 30.0
ATTEMPTS = 12
_PARALLEL = 64
_LANES = 1024

Deliver = Callable[[OutboxRow], Awaitable[None]]
DeliverAll = Callable[[Sequence[OutboxRow]], Awaitable[None]]


@dataclass(slots=True)
class Courier:
    """Delivers the rows of one destination for as long as the service runs."""

    outbox: Outbox
    destination: str
    deliver: Deliver
    deadline_seconds: float = DEADLINE_SECONDS
    attempts: int = ATTEMPTS
    _lanes: dict[str, list[OutboxRow]] = field(default_factory=dict[str, list[OutboxRow]])
    _free: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_PARALLEL))
    _room: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Deliver for ever."""
        line = self.outbox.line(self.destination)
        backoff = Backoff()
        async with asyncio.TaskGroup() as group:
            while True:
                try:
                    while len(self._lanes) >= _LANES:
                        self._room.clear()
                        await self._room.wait()
                    rows = await line.take(1)
                    backoff.reset()
                except Exception as error:  # noqa: BLE001 - the database; the row stays in the table
                    log.warning("outbox not read", destination=self.destination, reason=reason_of(error))
                    await asyncio.sleep(backoff.next_seconds())
                    continue
                for row in rows:
                    if row.entity_id in self._lanes:
                        self._lanes[row.entity_id].append(row)
                    else:
                        self._lanes[row.entity_id] = [row]
                        group.create_task(self._run_lane(row.entity_id), context=contextvars.Context())

    async def _run_lane(self, entity_id: str) -> None:
        waiting = self._lanes[entity_id]
        try:
            while waiting:
                row = waiting.pop(0)
                if not any(later.key == row.key and later.seq >= row.seq for later in waiting):
                    await self._carry(row)
        finally:
            del self._lanes[entity_id]
            self._room.set()

    async def _carry(self, row: OutboxRow) -> None:
        """Deliver one row, or park it."""
        backoff = Backoff(first_seconds=0.05, most_seconds=30.0)
        tried = row.attempts
        while True:
            try:
                async with self._free, asyncio.timeout(self.deadline_seconds):
                    await self.deliver(row)
                self.outbox.arrived([row])
                return
            except (Exception, asyncio.CancelledError) as error:
                if cancelled_from_outside(error):
                    raise
                reason = reason_of(error)
                unreachable = isinstance(error, grpc.aio.AioRpcError) and error.code() == grpc.StatusCode.UNAVAILABLE
                tried += 0 if unreachable else 1
                if is_permanent(error) or tried >= self.attempts:
                    if await self._park(row, reason):
                        return
                elif not unreachable:
                    self.outbox.count_attempt(row, tried)
                log.info("delivery failed", destination=self.destination, entity=row.entity_id, reason=reason)
            await asyncio.sleep(backoff.next_seconds())

    async def _park(self, row: OutboxRow, reason: str) -> bool:
        try:
            await self.outbox.park(row, reason)
        except Exception as error:  # noqa: BLE001 - the database; it is tried again
            log.warning("row not parked", destination=self.destination, reason=reason_of(error))
            return False
        log.error("delivery parked", destination=self.destination, entity=row.entity_id, reason=reason)
        return True


@dataclass(slots=True)
class BatchCourier:
    """Delivers the rows of one destination many at a time, in order: for logs, whose order is their meaning."""

    outbox: Outbox
    destination: str
    deliver: DeliverAll
    batch: int = 128
    deadline_seconds: float = DEADLINE_SECONDS
    linger_seconds: float = 0.02
    """Time that a batch waits for company."""

    async def run(self) -> None:
        """Deliver for ever."""
        line = self.outbox.line(self.destination)
        backoff = Backoff()
        while True:
            try:
                rows = await line.take(1)
                await asyncio.sleep(self.linger_seconds)
                if self.batch > 1 and line.waiting:
                    rows += await line.take(self.batch - 1)
                await self._carry(rows)
                backoff.reset()
            except (Exception, asyncio.CancelledError) as error:
                if cancelled_from_outside(error):
                    raise
                log.info("delivery failed", destination=self.destination, reason=reason_of(error))
                line.fall_behind()
                await asyncio.sleep(backoff.next_seconds())

    async def _carry(self, rows: Sequence[OutboxRow]) -> None:
        try:
            async with asyncio.timeout(self.deadline_seconds):
                await self.deliver(rows)
        except Exception as error:
            if not is_permanent(error):
                raise
            if len(rows) == 1:
                log.error("delivery parked", destination=self.destination, reason=reason_of(error))  # noqa: TRY400
                await self.outbox.park(rows[0], reason_of(error))
                return
            for row in rows:  # find the one that is refused
                await self._carry([row])
            return
        self.outbox.arrived(rows)
