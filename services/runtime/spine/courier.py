"""Carries outbox rows to a child by idempotent unary calls: one row at a time, a lane per entity.

What concerns one entity is delivered in order, the newest state of it; what concerns others does not wait for it. A row
that the receiver will never take is parked; one that failed is tried again, later each time, and parked after many
attempts. An entity that waits for its next attempt is left in the table and holds no room in memory. While the receiver
(or the database) cannot be reached at all, nothing is counted and everything waits.
"""

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import grpc
from branchline.v1 import errors_pb2

from services.runtime.errors import error_reason, is_permanent, reason_of, status_code
from services.runtime.logging import get_logger
from services.runtime.loops import being_cancelled
from services.runtime.retry import Backoff, pause_seconds
from services.runtime.spine.outbox import Key, Outbox, OutboxRow
from services.runtime.spine.waits import Waits

log = get_logger(__name__)

DEADLINE_SECONDS = 30.0
ATTEMPTS = 12
_PARALLEL = 64
_PARALLEL_AGAIN = 16
"""Deliveries that failed before wait among themselves, so what hangs leaves room for what does not."""

_PLACE_SECONDS = 1.0
"""A delivery that takes longer gives its place up, and goes on: any number may hang before others are kept waiting."""

_BATCH = 128
_LANES = 1024
_LANES_BYTES = 16 * 1024 * 1024

_PAUSES = (0.05, 30.0)
"""First and longest time until the next attempt, in seconds."""

_PAUSES_UNAVAILABLE = (0.5, 300.0)
"""The same for an entity of which the receiver says that it cannot be reached: all attempts take about ten minutes."""

_OF_THE_RECEIVER = frozenset(
    {
        errors_pb2.ERROR_REASON_UNSPECIFIED,
        errors_pb2.ERROR_REASON_NOT_READY,
        errors_pb2.ERROR_REASON_DRAINING,
        errors_pb2.ERROR_REASON_OVERLOADED,
        errors_pb2.ERROR_REASON_INDEX_UNREACHABLE,
        errors_pb2.ERROR_REASON_DATABASE_BUSY,
        errors_pb2.ERROR_REASON_DATABASE_UNAVAILABLE,
    }
)
"""Reasons to be unavailable that say nothing of what was delivered; no reason at all is a broken connection."""

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
    _waits: Waits = field(default_factory=Waits)
    _first: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_PARALLEL))
    _again: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_PARALLEL_AGAIN))
    _room: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Deliver for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._try_again(group))
            await self._take(group)

    async def _take(self, group: asyncio.TaskGroup) -> None:
        """Open a lane for each entity that there is something about, unless it waits."""
        line = self.outbox.line(self.destination)
        backoff = Backoff()
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
                if self._waits.hold(row):
                    continue
                if row.entity_id not in self._lanes:
                    self._lanes[row.entity_id] = {}
                    group.create_task(self._run_lane(row.entity_id, self._first), context=contextvars.Context())
                self._enter(self._lanes[row.entity_id], row)

    async def _try_again(self, group: asyncio.TaskGroup) -> None:
        """Open the lane of each entity whose wait is over, about as many as may be tried again at once."""
        while True:
            await self._room_for_more()
            async with self._again:
                pass  # there is a turn for one more
            wait = await self._waits.next_due()
            entity_id = wait.failed.entity_id
            lane = self._lanes[entity_id] = {}
            try:
                rows = await self.outbox.about(self.destination, entity_id, wait.after)
            except Exception as error:  # noqa: BLE001 - the database; the rows stay in the table
                log.warning("outbox not read", destination=self.destination, reason=reason_of(error))
                self._wait(wait.failed, wait.failed.attempts, _PAUSES, wait.after)
                self._close(entity_id)
                continue
            came_meanwhile = list(lane.values())
            for row in came_meanwhile:
                self._leave(lane, row)
            for row in (*rows, *came_meanwhile):
                tried = wait.failed.attempts if row.seq == wait.failed.seq else row.attempts
                self._enter(lane, row._replace(attempts=tried))
            group.create_task(self._run_lane(entity_id, self._again), context=contextvars.Context())

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

    def _wait(self, row: OutboxRow, attempts: int, pauses: tuple[float, float], after: int) -> None:
        """Leave an entity to the table until its next attempt."""
        self._waits.put(row, attempts, pause_seconds(attempts, *pauses), after)

    def _close(self, entity_id: str) -> None:
        for row in self._lanes.pop(entity_id).values():
            self._bytes -= len(row.payload)
        self._room.set()

    async def _run_lane(self, entity_id: str, turns: asyncio.Semaphore) -> None:
        lane = self._lanes[entity_id]
        try:
            while lane:
                row = next(iter(lane.values()))
                if not await self._carry(lane, row, turns):
                    return
                self._leave(lane, row)
        finally:
            self._close(entity_id)

    async def _carry(self, lane: Lane, row: OutboxRow, turns: asyncio.Semaphore) -> bool:
        """Deliver one row, or park it, unless a newer one takes its place. Say whether the lane may go on."""
        backoff = Backoff(*_PAUSES)
        while lane.get(row.key) is row:
            try:
                async with _Place(turns), asyncio.timeout(self.deadline_seconds):
                    await self.deliver(row)
                self.outbox.arrived([row])
                return True
            except (Exception, asyncio.CancelledError) as error:
                if being_cancelled():
                    raise
                log.info("delivery failed", destination=self.destination, entity=row.entity_id, reason=reason_of(error))
                if not _is_receiver_away(error):
                    return await self._failed(lane, row, error)
                turns = self._again
            await asyncio.sleep(backoff.next_seconds())
        return True

    async def _failed(self, lane: Lane, row: OutboxRow, error: BaseException) -> bool:
        """Count an attempt; park the row after the last, else have its entity wait. Say whether the lane may go on."""
        tried = row.attempts + 1
        if is_permanent(error) or tried >= self.attempts:
            if await self._park(row, reason_of(error), tried):
                return True
        elif lane.get(row.key) is not row:
            return True
        else:
            self.outbox.count_attempt(row, tried)
        pauses = _PAUSES_UNAVAILABLE if status_code(error) == grpc.StatusCode.UNAVAILABLE else _PAUSES
        after = min(held.seq for held in lane.values()) - 1
        self._wait(row, tried, pauses, after)
        return False

    async def _park(self, row: OutboxRow, reason: str, attempts: int) -> bool:
        try:
            await self.outbox.park(row, reason, attempts)
        except Exception as error:  # noqa: BLE001 - the database; it is tried again
            log.warning("row not parked", destination=self.destination, reason=reason_of(error))
            return False
        log.error("delivery parked", destination=self.destination, entity=row.entity_id, reason=reason)
        return True


class _Place:
    """A place among the deliveries that are under way, held for a second at most."""

    def __init__(self, places: asyncio.Semaphore) -> None:
        self._places = places
        self._held = False

    async def __aenter__(self) -> None:
        await self._places.acquire()
        self._held = True
        self._given_up = asyncio.get_running_loop().call_later(_PLACE_SECONDS, self._leave)

    async def __aexit__(self, *_: object) -> None:
        self._given_up.cancel()
        self._leave()

    def _leave(self) -> None:
        if self._held:
            self._held = False
            self._places.release()


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
                failed += 0 if _is_receiver_away(error) else 1
                log.info("delivery failed", destination=self.destination, reason=reason_of(error))
                line.fall_behind()
                await asyncio.sleep(backoff.next_seconds())

    async def _carry(self, rows: Sequence[OutboxRow], *, give_up: bool) -> None:
        """Deliver rows. If that is refused, or it is time to give up, find the one to blame and park it."""
        try:
            async with asyncio.timeout(self.deadline_seconds):
                await self.deliver(rows)
        except Exception as error:
            if _is_receiver_away(error) or not (give_up or is_permanent(error)):
                raise
            if len(rows) > 1:
                for row in rows:
                    await self._carry([row], give_up=give_up)
                return
            log.error("delivery parked", destination=self.destination, reason=reason_of(error))  # noqa: TRY400
            await self.outbox.park(rows[0], reason_of(error), self.attempts if give_up else 1)
        else:
            self.outbox.arrived(rows)


def _is_receiver_away(error: BaseException) -> bool:
    """Say whether the delivery failed because the receiver was not there, whatever was delivered."""
    return status_code(error) == grpc.StatusCode.UNAVAILABLE and error_reason(error) in _OF_THE_RECEIVER
