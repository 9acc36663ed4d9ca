"""The outbox: what must leave the service, written in the transaction that caused it.

One row per entity and destination: a newer state replaces an older one and goes to the end of the line, so an
outage costs one row per entity. Entries of logs have ids of their own and are therefore never replaced.
"""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from google.protobuf.any_pb2 import Any
from google.protobuf.message import Message
from sqlalchemy import delete, func, insert, select, update

from services.runtime.clock import Clock
from services.runtime.database import Database, Transaction
from services.runtime.signal import Signal
from services.runtime.spine.tables import SpineTables

COORDINATOR = "coordinator"
"""Destination of everything that is pushed up."""


@dataclass(frozen=True, slots=True)
class Mark:
    """The newest state of one entity, on its way to a destination."""

    entity_id: str
    revision: int
    state: Message
    destination: str = COORDINATOR
    deleted: bool = False


@dataclass(frozen=True, slots=True)
class OutboxRow:
    """A row of the outbox. `seq` names exactly this version of the entity."""

    seq: int
    entity_id: str
    revision: int
    deleted: bool
    state: Any


@dataclass(slots=True)
class Outbox:
    """The outbox of one service."""

    database: Database
    tables: SpineTables
    clock: Clock
    changed: Signal = field(default_factory=Signal)
    settled: Signal = field(default_factory=Signal)

    async def mark(self, tx: Transaction, marks: Iterable[Mark]) -> None:
        """Put states into the outbox; they leave after the transaction commits."""
        outbox = self.tables.outbox
        rows = [
            {
                "destination": mark.destination,
                "type_url": f"type.googleapis.com/{mark.state.DESCRIPTOR.full_name}",
                "entity_id": mark.entity_id,
                "revision": mark.revision,
                "deleted": mark.deleted,
                "payload": mark.state.SerializeToString(),
                "mark_time": self.clock.seconds(),
            }
            for mark in marks
        ]
        if not rows:
            return
        await tx.execute(insert(outbox).prefix_with("OR REPLACE"), rows)
        if self.changed.notify not in tx.after_commit:
            tx.after_commit.append(self.changed.notify)

    async def pending(self, destination: str, after_seq: int, limit: int) -> list[OutboxRow]:
        """Return rows of a destination in order, parked ones left out."""
        outbox = self.tables.outbox
        query = (
            select(outbox)
            .where(outbox.c.destination == destination, outbox.c.seq > after_seq, outbox.c.parked_reason.is_(None))
            .order_by(outbox.c.seq)
            .limit(limit)
        )
        async with self.database.read() as connection:
            rows = (await connection.execute(query)).all()
        return [
            OutboxRow(row.seq, row.entity_id, row.revision, row.deleted, Any(type_url=row.type_url, value=row.payload))
            for row in rows
        ]

    async def settle(self, sent: Sequence[int], parked: dict[int, str]) -> None:
        """Drop rows that arrived, and park with a reason those that never will."""
        outbox = self.tables.outbox
        arrived = [seq for seq in sent if seq not in parked]
        async with self.database.transaction() as tx:
            await tx.execute(delete(outbox).where(outbox.c.seq.in_(arrived)))
            for seq, reason in parked.items():
                await tx.execute(update(outbox).where(outbox.c.seq == seq).values(parked_reason=reason))
        self.settled.notify()

    async def await_delivery(self, destination: str, entity_id: str, timeout_seconds: float) -> None:
        """Wait until nothing of an entity is on its way to a destination, or the time runs out."""
        outbox = self.tables.outbox
        waiting = select(func.count()).where(
            outbox.c.destination == destination, outbox.c.entity_id == entity_id, outbox.c.parked_reason.is_(None)
        )
        deadline = asyncio.get_running_loop().time() + timeout_seconds
        while True:
            ticket = self.settled.ticket
            async with self.database.read() as connection:
                if not (await connection.execute(waiting)).scalar_one():
                    return
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0 or not await self.settled.wait(ticket, left):
                return

    async def count(self, *, parked: bool) -> int:
        """Return how many rows wait, or how many are parked."""
        outbox = self.tables.outbox
        condition = outbox.c.parked_reason.is_not(None) if parked else outbox.c.parked_reason.is_(None)
        async with self.database.read() as connection:
            return (await connection.execute(select(func.count()).select_from(outbox).where(condition))).scalar_one()
