"""Entities that wait for their next delivery after one that failed.

Of each only a few words are kept; what is to be delivered stays in the table.
"""

import asyncio
import time
from dataclasses import dataclass, field
from heapq import heappop, heappush

from services.runtime.spine.outbox import OutboxRow

_SOON_SECONDS = 0.5
"""How soon an entity is tried again about which there is something newer."""


@dataclass(slots=True)
class Wait:
    """An entity whose delivery failed, until its next attempt. What is about it is in the table alone."""

    failed: OutboxRow
    """Without its payload, and with its attempts so far."""

    due: float
    after: int
    """What is about it and was not delivered is in the table behind this number."""


@dataclass(slots=True)
class Waits:
    """The entities that wait, by the time of their next attempt."""

    _held: dict[str, Wait] = field(default_factory=dict[str, Wait])
    _order: list[tuple[float, str]] = field(default_factory=list[tuple[float, str]])
    _sooner: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, failed: OutboxRow, attempts: int, seconds: float, after: int) -> None:
        """Have an entity wait."""
        kept = failed._replace(payload=b"", attempts=attempts)
        wait = self._held[failed.entity_id] = Wait(kept, time.monotonic() + seconds, after)
        self._queue(failed.entity_id, wait)

    def hold(self, row: OutboxRow) -> bool:
        """Say whether the entity waits. If so, the row is found in the table at its next attempt.

        That comes soon for a row newer than the failed one.
        """
        wait = self._held.get(row.entity_id)
        if wait is None:
            return False
        wait.after = min(wait.after, row.seq - 1)
        soon = time.monotonic() + _SOON_SECONDS
        if wait.failed.seq < row.seq and soon < wait.due:
            wait.due = soon
            self._queue(row.entity_id, wait)
        return True

    def _queue(self, entity_id: str, wait: Wait) -> None:
        heappush(self._order, (wait.due, entity_id))
        self._sooner.set()

    async def next_due(self) -> Wait:
        """Wait until an entity is due and take it."""
        while True:
            self._sooner.clear()
            seconds = None
            while self._order:
                due, entity_id = self._order[0]
                wait = self._held.get(entity_id)
                if wait is not None and wait.due == due:
                    seconds = due - time.monotonic()
                    if seconds > 0:
                        break
                    del self._held[entity_id]
                    heappop(self._order)
                    return wait
                heappop(self._order)
            try:
                async with asyncio.timeout(seconds):
                    await self._sooner.wait()
            except TimeoutError:
                continue
