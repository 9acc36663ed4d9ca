"""Queries of the history service."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from branchline.resource.v1.history_pb2 import HistoryEvent
from sqlalchemy import insert, select, update

from services.history.tables import events, feeds
from services.runtime.database import Database, Transaction

_PAGE = 500


@dataclass(frozen=True, slots=True)
class HistoryStore:
    """The feed of every organization."""

    database: Database

    async def append(self, tx: Transaction, new: Sequence[HistoryEvent]) -> list[HistoryEvent]:
        """Give numbers to and store the events that are not stored yet; return those."""
        known = select(events.c.id).where(events.c.id.in_([event.id for event in new]))
        seen = set((await tx.execute(known)).scalars())
        numbered: list[HistoryEvent] = []
        for event in new:
            if event.id in seen:
                continue
            seen.add(event.id)
            event.sequence = await self._next_sequence(tx, event.organization_id)
            await tx.execute(
                insert(events).values(
                    id=event.id,
                    organization_id=event.organization_id,
                    sequence=event.sequence,
                    payload=event.SerializeToString(),
                )
            )
            numbered.append(event)
        return numbered

    async def _next_sequence(self, tx: Transaction, organization_id: str) -> int:
        taken = await tx.execute(
            update(feeds)
            .where(feeds.c.organization_id == organization_id)
            .values(last_sequence=feeds.c.last_sequence + 1)
            .returning(feeds.c.last_sequence)
        )
        sequence = taken.scalar_one_or_none()
        if sequence is None:
            sequence = 1
            await tx.execute(insert(feeds).values(organization_id=organization_id, last_sequence=1))
        return sequence

    async def pages(self, organization_id: str, after_sequence: int) -> AsyncIterator[list[HistoryEvent]]:
        """Read the whole feed, oldest first."""
        while True:
            query = (
                select(events.c.payload)
                .where(events.c.organization_id == organization_id, events.c.sequence > after_sequence)
                .order_by(events.c.sequence)
                .limit(_PAGE)
            )
            async with self.database.read() as connection:
                page = [HistoryEvent.FromString(row) for row in (await connection.execute(query)).scalars()]
            if not page:
                return
            yield page
            after_sequence = page[-1].sequence
