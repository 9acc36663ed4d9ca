"""Index tables: what a coordinator holds of its children, numbered so that it can be watched.

The rows themselves are the change log: each holds the newest state of one entity and the number of its last
change, so "what did I miss since n" is one query, and a deleted entity stays as a tombstone for a while.
"""

import asyncio
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from branchline.resource.v1.watch_pb2 import WatchChange
from branchline.spine.v1.push_pb2 import ConsistencyPoint
from google.protobuf.message import Message
from sqlalchemy import Column, ColumnElement, Row, Table, delete, func, insert, select, update
from sqlalchemy.dialects.sqlite import Insert
from sqlalchemy.dialects.sqlite import insert as upsert

from services.runtime.clock import Clock
from services.runtime.database import Database, Reader, Transaction
from services.runtime.errors import DeadlineExceeded
from services.runtime.spine.hub import Hub
from services.runtime.spine.tables import SpineTables

TOMBSTONE_SECONDS = 24 * 3600.0
"""How long a deleted entity is remembered; a resume token older than that gives a reset."""

_COMPACT_SECONDS = 3600.0
AWAIT_SECONDS = 10.0
"""Longest wait for a consistency token."""


@dataclass(frozen=True, slots=True)
class IndexTable:
    """One watched index table. `snapshot_limit` bounds logs: a snapshot holds only the newest entries."""

    kind: str
    table: Table
    resource: type[Message]
    snapshot_limit: int | None = None

    @property
    def type_url(self) -> str:
        """Type of the payload, as `google.protobuf.Any` names it."""
        return f"type.googleapis.com/{self.resource.DESCRIPTOR.full_name}"


@dataclass(frozen=True, slots=True)
class Entry:
    """A new state of one entity, for `Index.put`."""

    kind: str
    scope: str
    id: str
    revision: int
    state: Message
    viewer_id: str = ""
    task_id: str = ""
    deleted: bool = False
    columns: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class View:
    """What a scope held at one position. `horizon` is the oldest position that can be resumed from."""

    epoch: str
    change_seq: int
    horizon: int
    changes: list[WatchChange]


class Index:
    """All watched index tables of one coordinator."""

    def __init__(
        self,
        database: Database,
        spine: SpineTables,
        tables: Sequence[IndexTable],
        clock: Clock,
        unwatched: Mapping[str, Column[str]] | None = None,
    ) -> None:
        """`unwatched` names the id columns of index tables that are not watched but can be waited for, by kind."""
        self.hub = Hub()
        self._database = database
        self._sequences = spine.change_sequences
        self._tables = {table.kind: table for table in tables}
        self._clock = clock
        self._id_columns = {kind: spec.table.c.id for kind, spec in self._tables.items()} | dict(unwatched or {})

    async def put(self, tx: Transaction, entry: Entry) -> bool:
        """Store the state if it is newer than what is held; say whether it was."""
        spec = self._tables[entry.kind]
        row = self._row(entry, await self._next_seq(tx, entry.scope))
        if (await tx.execute(_guarded_upsert(spec.table, row), row)).rowcount == 0:
            return False
        tx.after_commit.append(partial(self.hub.publish, entry.scope, [_change(spec, row)]))
        return True

    async def put_many(self, tx: Transaction, kind: str, entries: Sequence[Entry]) -> list[Entry]:
        """Store the states of one kind that are newer than what is held; return those, one for each entity.

        A number of statements that does not grow with the number of entries.
        """
        if len(entries) == 1:
            return list(entries) if await self.put(tx, entries[0]) else []
        spec = self._tables[kind]
        fresh = await self._newer(tx, spec, entries)
        if not fresh:
            return []
        numbers = await self._next_seqs(tx, [entry.scope for entry in fresh])
        rows = [self._row(entry, number) for entry, number in zip(fresh, numbers, strict=True)]
        await tx.execute(_guarded_upsert(spec.table, rows[0]), rows)
        changes: dict[str, list[WatchChange]] = {}
        for row in rows:
            changes.setdefault(row["scope"], []).append(_change(spec, row))
        tx.after_commit += [partial(self.hub.publish, scope, told) for scope, told in changes.items()]
        return fresh

    async def _newer(self, tx: Transaction, spec: IndexTable, entries: Sequence[Entry]) -> list[Entry]:
        """Return the newest entry of each entity that is newer than what is held, in the order of arrival."""
        newest: dict[tuple[str, str], Entry] = {}
        for entry in entries:
            known = newest.get((entry.id, entry.scope))
            if known is None or known.revision < entry.revision:
                newest[(entry.id, entry.scope)] = entry
        table = spec.table
        query = select(table.c.id, table.c.scope, table.c.revision).where(table.c.id.in_([key[0] for key in newest]))
        held = {(row.id, row.scope): row.revision for row in (await tx.execute(query)).all()}
        return [entry for key, entry in newest.items() if held.get(key, -1) < entry.revision]

    async def _next_seqs(self, tx: Transaction, scopes: Sequence[str]) -> list[int]:
        """Take the next number of each scope as often as it is named."""
        sequences = self._sequences
        query = select(sequences.c.scope, sequences.c.value).where(sequences.c.scope.in_(set(scopes)))
        values = dict.fromkeys(scopes, 0) | {row.scope: row.value for row in (await tx.execute(query)).all()}
        numbers: list[int] = []
        for scope in scopes:
            values[scope] += 1
            numbers.append(values[scope])
        rows = [
            {"scope": scope, "value": value, "horizon": 0, "epoch": uuid.uuid4().hex} for scope, value in values.items()
        ]
        statement = upsert(sequences)
        statement = statement.on_conflict_do_update(index_elements=["scope"], set_={"value": statement.excluded.value})
        await tx.execute(statement, rows)
        return numbers

    def _row(self, entry: Entry, seq: int) -> dict[str, Any]:
        return {
            "id": entry.id,
            "scope": entry.scope,
            "revision": entry.revision,
            "change_seq": seq,
            "change_time": self._clock.seconds(),
            "deleted": entry.deleted,
            "payload": entry.state.SerializeToString(),
            "viewer_id": entry.viewer_id,
            "task_id": entry.task_id,
            **entry.columns,
        }

    async def _next_seq(self, tx: Transaction, scope: str) -> int:
        sequences = self._sequences
        taken = await tx.execute(
            update(sequences)
            .where(sequences.c.scope == scope)
            .values(value=sequences.c.value + 1)
            .returning(sequences.c.value)
        )
        value = taken.scalar_one_or_none()
        if value is None:
            value = 1
            await tx.execute(insert(sequences).values(scope=scope, value=1, horizon=0, epoch=uuid.uuid4().hex))
        return value

    async def view(self, scope: str, kinds: Sequence[str], *, after: tuple[str, int] | None = None) -> View | None:
        """Read a scope: all of it, or what changed after a position given as (epoch, change_seq).

        Return None if the position cannot be resumed from: another epoch, or older than the horizon.
        """
        async with self._database.read() as connection:
            sequence = await self._sequence(connection, scope)
            epoch, value, horizon = (sequence.epoch, sequence.value, sequence.horizon) if sequence else ("", 0, 0)
            if after and (after[0] != epoch or not horizon <= after[1] <= value):
                return None
            changes: list[WatchChange] = []
            for kind in kinds:
                spec = self._tables[kind]
                query = select(spec.table).where(spec.table.c.scope == scope)
                if after:
                    query = query.where(spec.table.c.change_seq > after[1])
                elif spec.snapshot_limit is not None:
                    query = query.order_by(spec.table.c.change_seq.desc()).limit(spec.snapshot_limit)
                rows = (await connection.execute(query)).all()
                changes += [_change(spec, dict(row._mapping)) for row in rows]  # pyright: ignore[reportPrivateUsage]
                if not after and spec.snapshot_limit == len(rows):
                    horizon = max(horizon, min(row.change_seq for row in rows))
        changes.sort(key=lambda change: change.change_seq)
        return View(epoch, value, horizon, changes)

    async def _sequence(self, connection: Reader, scope: str) -> Row[Any] | None:
        query = select(self._sequences).where(self._sequences.c.scope == scope)
        return (await connection.execute(query)).one_or_none()

    async def await_point(self, point: ConsistencyPoint, timeout_seconds: float | None = None) -> None:
        """Wait until every entity of the point that this coordinator indexes is at least as new.

        Raise DeadlineExceeded with reason INDEX_BEHIND if that takes longer than the time given.
        """
        wait = AWAIT_SECONDS if timeout_seconds is None else min(AWAIT_SECONDS, timeout_seconds)
        deadline = asyncio.get_running_loop().time() + wait
        for wanted in point.entities:
            column = self._id_columns.get(wanted.kind)
            if column is None:
                continue
            query = select(func.max(column.table.c.revision)).where(column == wanted.id)
            while True:
                ticket = self.hub.changed.ticket
                async with self._database.read() as connection:
                    held = (await connection.execute(query)).scalar_one_or_none() or 0
                if held >= wanted.revision:
                    break
                left = deadline - asyncio.get_running_loop().time()
                if left <= 0 or not await self.hub.changed.wait(ticket, left):
                    raise DeadlineExceeded(
                        "INDEX_BEHIND",
                        f"the index holds revision {held} of {wanted.kind} {wanted.id}, not yet {wanted.revision}",
                        kind=wanted.kind,
                        id=wanted.id,
                    )

    async def run_compaction(self) -> None:
        """Forget old tombstones, for ever."""
        while True:
            await self.compact(self._clock.seconds() - TOMBSTONE_SECONDS)
            await asyncio.sleep(_COMPACT_SECONDS)

    async def compact(self, before_seconds: float) -> None:
        """Forget tombstones older than a time and raise the horizon of their scopes."""
        async with self._database.transaction() as tx:
            for spec in self._tables.values():
                await self.forget(tx, spec, spec.table.c.deleted.is_(True), spec.table.c.change_time < before_seconds)

    async def forget(self, tx: Transaction, spec: IndexTable, *old: ColumnElement[bool]) -> None:
        """Delete rows and raise the horizon of their scopes: who has not seen them by now cannot resume."""
        newest = func.max(spec.table.c.change_seq).label("newest")
        query = select(spec.table.c.scope, newest).where(*old).group_by(spec.table.c.scope)
        for row in (await tx.execute(query)).all():
            await tx.execute(
                update(self._sequences)
                .where(self._sequences.c.scope == row.scope, self._sequences.c.horizon < row.newest)
                .values(horizon=row.newest)
            )
        await tx.execute(delete(spec.table).where(*old))


def _guarded_upsert(table: Table, row: Mapping[str, Any]) -> Insert:
    """Return a statement that writes rows like this one, unless what is held is as new."""
    statement = upsert(table)
    return statement.on_conflict_do_update(
        index_elements=["id", "scope"],
        set_={name: statement.excluded[name] for name in row if name not in ("id", "scope")},
        where=table.c.revision < statement.excluded.revision,
    )


def _change(spec: IndexTable, row: Mapping[str, Any]) -> WatchChange:
    change = WatchChange(
        kind=spec.kind,
        id=row["id"],
        revision=row["revision"],
        change_seq=row["change_seq"],
        deleted=row["deleted"],
        viewer_id=row["viewer_id"],
        task_id=row["task_id"],
    )
    if not change.deleted:
        change.resource.type_url = spec.type_url
        change.resource.value = row["payload"]
    return change
