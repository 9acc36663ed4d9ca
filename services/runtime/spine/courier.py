"""Carries outbox rows to another service by idempotent unary calls: creation of children, hand-over of events.

Rows are delivered in order. One that the receiver will never take is parked; while the receiver cannot be
reached the courier waits and tries again.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import structlog

from services.runtime.errors import is_permanent, reason_of
from services.runtime.retry import Backoff
from services.runtime.spine.outbox import Outbox, OutboxRow

log = structlog.get_logger()

_BATCH = 64
_POLL_SECONDS = 30.0

Deliver = Callable[[Sequence[OutboxRow]], Awaitable[None]]


@dataclass(slots=True)
class Courier:
    """Delivers the rows of one destination for as long as the service runs."""

    outbox: Outbox
    destination: str
    deliver: Deliver
    batch: int = _BATCH
    _backoff: Backoff = field(default_factory=Backoff)

    async def run(self) -> None:
        """Deliver for ever."""
        while True:
            ticket = self.outbox.changed.ticket
            rows = await self.outbox.pending(self.destination, 0, self.batch)
            if rows:
                await self._carry(rows)
            else:
                await self.outbox.changed.wait(ticket, _POLL_SECONDS)

    async def _carry(self, rows: list[OutboxRow]) -> None:
        parked: dict[int, str] = {}
        try:
            await self.deliver(rows)
        except Exception as error:  # noqa: BLE001 - whatever it is, the row stays or is parked with it
            if not is_permanent(error):
                log.info("delivery failed", destination=self.destination, reason=reason_of(error))
                await asyncio.sleep(self._backoff.next_seconds())
                return
            if len(rows) > 1:  # find the one that is refused
                for row in rows:
                    await self._carry([row])
                return
            log.error("delivery parked", destination=self.destination, reason=reason_of(error))  # noqa: TRY400
            parked = {rows[0].seq: reason_of(error)}
        self._backoff.reset()
        await self.outbox.settle([row.seq for row in rows], parked)
