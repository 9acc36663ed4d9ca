"""Carries outbox rows to a child by idempotent unary calls: one row at a time, a lane per entity.

What concerns one entity is delivered in order, the newest state of it; what concerns others does not wait for it. A row
that the receiver will never take is parked; one that failed is tried again, later each time, and parked after many
attempts. While the receiver (or the database) cannot be reached at all, nothing is counted and everything waits.
"""

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import grpc

from services.runtime.errors import is_permanent, reason_of
from services.runtime.logging import get_logger
from services.runtime.loops import being_cancelled
from services.runtime.retry import Backoff
from services.runtime.spine.outbox import Key, Outbox, OutboxRow

log = get_logger(__name__)

DEADLINE_SECONDS = 30.0
ATTEMPTS = 12
_PARALLEL = 64
_PARALLEL_AGAIN = 16
"""Deliveries that failed before wait among themselves, so what hangs leaves room for what does not."""

_BATCH = 128
_LANES = 1024
_LANES_BYTES = 16 * 1024 * 1024

Deliver = Callable[[OutboxRow], Awaitable[None]]
DeliverAll = Callable[[Sequence[OutboxRow]], Awaitable[None]]
Lane = dict[Key, OutboxRow]
"""The newest states about one entity, in the order in which they leave; the first is being delivered."""


@dataclass(slots=True)
class Courier:
    """Delivers the rows of one destination for as long as the service runs."""

    outbox: Outbox
    destination: str
    deliver: Deliver
    deadline_seconds: float = DEADLINE_SECONDS
    attempts: int = ATTEMPTS
    _lanes: dict[str, Lane] = field(default_factory=dict[str, Lane])
    _bytes: int = 0
    _first: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_PARALLEL))
    _again: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_PARALLEL_AGAIN))
    _room: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Deliver for ever."""
        line = self.outbox.line(self.destination)
        backoff = Backoff()
        async with asyncio.TaskGroup() as group:
            while True:
                try:
                    await self._room_for_more()
                    rows = await line.take(1)
                    backoff.reset()
                except Exception as error:  # noqa: BLE001 - the database; the row stays in the table
                    log.warning("outbox not read", destination=self.destination, reason=reason_of(error))
                    await asyncio.sleep(backoff.next_seconds())
                    continue
                for row in rows:
                    if row.entity_id not in self._lanes:
                        self._lanes[row.entity_id] = {}
                        group.create_task(self._run_lane(row.entity_id), context=contextvars.Context())
                    self._enter(self._lanes[row.entity_id], row)

    async def _room_for_more(self) -> None:
        while len(self._lanes) >= _LANES or self._bytes >= _LANES_BYTES:
            self._room.clear()
            await self._room.wait()

    def _enter(self, lane: Lane, row: OutboxRow) -> None:
        """Put a row at the end of its lane, in place of an older one of the same thing."""
        held = lane.get(row.key)
        if held is None or held.seq < row.seq:
            self._leave(lane, held)
            lane[row.key] = row
            self._bytes += len(row.payload)

    def _leave(self, lane: Lane, row: OutboxRow | None) -> None:
        if row is not None and lane.get(row.key) is row:
            del lane[row.key]
            self._bytes -= len(row.payload)
            self._room.set()

    async def _run_lane(self, entity_id: str) -> None:
        lane = self._lanes[entity_id]
        try:
            while lane:
                row = next(iter(lane.values()))
                await self._carry(lane, row)
                self._leave(lane, row)
        finally:
            del self._lanes[entity_id]
            self._room.set()

    async def _carry(self, lane: Lane, row: OutboxRow) -> None:
        """Deliver one row, or park it, unless a newer one takes its place."""
        backoff = Backoff(first_seconds=0.05, most_seconds=30.0)
        tried, turns = row.attempts, self._first
        while lane.get(row.key) is row:
            try:
                async with turns, asyncio.timeout(self.deadline_seconds):
                    await self.deliver(row)
                self.outbox.arrived([row])
                return
            except (Exception, asyncio.CancelledError) as error:
                if being_cancelled():
                    raise
                turns, reason = self._again, reason_of(error)
                log.info("delivery failed", destination=self.destination, entity=row.entity_id, reason=reason)
                if not _is_unreachable(error):
                    tried += 1
                    if is_permanent(error) or tried >= self.attempts:
                        if await self._park(row, reason, tried):
                            return
                    else:
                        self.outbox.count_attempt(row, tried)
            await asyncio.sleep(backoff.next_seconds())

    async def _park(self, row: OutboxRow, reason: str, attempts: int) -> bool:
        try:
            await self.outbox.park(row, reason, attempts)
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
    attempts: int = ATTEMPTS
    deadline_seconds: float = DEADLINE_SECONDS
    linger_seconds: float = 0.02
    """Time that a batch waits for company."""

    async def run(self) -> None:
        """Deliver for ever."""
        line = self.outbox.line(self.destination)
        backoff = Backoff()
        failed = 0
        while True:
            try:
                rows = await line.take(1)
                await asyncio.sleep(self.linger_seconds)
                if line.waiting:
                    rows += await line.take(_BATCH - 1)
                await self._carry(rows, give_up=failed + 1 >= self.attempts)
                failed = 0
                backoff.reset()
            except (Exception, asyncio.CancelledError) as error:
                if being_cancelled():
                    raise
                failed += 0 if _is_unreachable(error) else 1
                log.info("delivery failed", destination=self.destination, reason=reason_of(error))
                line.fall_behind()
                await asyncio.sleep(backoff.next_seconds())

    async def _carry(self, rows: Sequence[OutboxRow], *, give_up: bool) -> None:
        """Deliver rows. If that is refused, or it is time to give up, find the one to blame and park it."""
        try:
            async with asyncio.timeout(self.deadline_seconds):
                await self.deliver(rows)
        except Exception as error:
            if _is_unreachable(error) or not (give_up or is_permanent(error)):
                raise
            if len(rows) > 1:
                for row in rows:
                    await self._carry([row], give_up=give_up)
                return
            log.error("delivery parked", destination=self.destination, reason=reason_of(error))  # noqa: TRY400
            await self.outbox.park(rows[0], reason_of(error), self.attempts if give_up else 1)
        else:
            self.outbox.arrived(rows)


def _is_unreachable(error: BaseException) -> bool:
    """Say whether the delivery failed because somebody was not there, whatever was delivered."""
    code = error.code() if isinstance(error, grpc.aio.AioRpcError) else getattr(error, "code", None)
    return code == grpc.StatusCode.UNAVAILABLE
