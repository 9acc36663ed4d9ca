"""The outbox: what must leave the service, written in the transaction that caused it.

One row per entity and destination: a newer state replaces an older one and goes to the end of the line, so an outage
costs one row per entity. Entries of logs have ids of their own and are therefore never replaced.

After a commit its rows are handed to whoever carries them in memory. The table is what survives a crash, and what a
carrier reads that has just begun or has fallen behind. Rows that arrived are removed with a write that happens anyway.
"""

import asyncio
import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any as AnyValue
from typing import NamedTuple

from branchline.v1.errors_pb2 import ERROR_REASON_QUOTA_EXCEEDED
from google.protobuf.any_pb2 import Any
from google.protobuf.message import Message
from sqlalchemy import bindparam, delete, func, select, update

from services.runtime.clock import Clock
from services.runtime.database import Database, DatabaseError, Reader, Statement, Tx, is_in, upsert
from services.runtime.errors import ResourceExhausted
from services.runtime.spine.chunks import PART_BYTES, parts
from services.runtime.spine.tables import outbox

COORDINATOR = "coordinator"
"""Destination of everything that is pushed up."""

STATE_BYTES = 2 * PART_BYTES
"""Most that one state may take. A larger one is refused where it is made: no edge above or below could carry it."""

_TOPIC = "outbox"
"""Of notices to other processes on the same database: the number of a row, and its destination."""

_LINE_ROWS = 4096
_LINE_BYTES = 16 * 1024 * 1024
_PAGE_ROWS = 256
_PAGE_BYTES = 4 * 1024 * 1024
_REASON = 2000

Key = tuple[str, str]
"""Type and id of an entity."""


class Mark(NamedTuple):
    """The newest state of one entity, on its way to a destination."""

    entity_id: str
    revision: int
    state: Message
    destination: str = COORDINATOR
    deleted: bool = False


class OutboxRow(NamedTuple):
    """A row of the outbox. `seq` names exactly this version of the entity."""

    seq: int
    destination: str
    type_url: str
    entity_id: str
    revision: int
    deleted: bool
    payload: bytes
    attempts: int = 0

    @property
    def key(self) -> Key:
        """What it is about."""
        return self.type_url, self.entity_id

    @property
    def state(self) -> Any:
        """The state as it travels."""
        return Any(type_url=self.type_url, value=self.payload)

    def holds(self, message: type[Message]) -> bool:
        """Say whether the state is such a message."""
        return self.type_url.rpartition("/")[2] == message.DESCRIPTOR.full_name


@cache
def type_url_of(message: type[Message]) -> str:
    """Return how a type is called where a message travels as Any."""
    return f"type.googleapis.com/{message.DESCRIPTOR.full_name}"


_KEYS = ("destination", "entity_id", "type_url")
_PUT = Statement(upsert(outbox, _KEYS))
_THIS = (
    outbox.c.destination == bindparam("to"),
    outbox.c.type_url == bindparam("type"),
    outbox.c.entity_id == bindparam("entity"),
    outbox.c.seq == bindparam("number"),
)
_DROP = Statement(delete(outbox).where(*_THIS))
_PARK = Statement(update(outbox).where(*_THIS).values(parked_reason=bindparam("reason"), attempts=bindparam("tried")))
_COUNT_ATTEMPT = Statement(
    update(outbox).where(*_THIS, outbox.c.parked_reason == "").values(attempts=bindparam("tried"))
)
_PENDING = Statement(
    select(outbox)
    .where(outbox.c.destination == bindparam("to"), outbox.c.parked_reason == "", outbox.c.seq > bindparam("after"))
    .order_by(outbox.c.seq)
    .limit(bindparam("most"))
)
_ABOUT = Statement(
    select(outbox)
    .where(
        outbox.c.destination == bindparam("to"),
        outbox.c.entity_id == bindparam("entity"),
        outbox.c.parked_reason == "",
        outbox.c.seq > bindparam("after"),
    )
    .order_by(outbox.c.seq)
)
_OF_SEQS = is_in(outbox.c.seq, "seqs")
_MARKED = Statement(
    select(outbox)
    .where(outbox.c.destination == bindparam("to"), outbox.c.parked_reason == "", _OF_SEQS)
    .order_by(outbox.c.seq)
)
_WAITING = Statement(
    select(outbox.c.seq)
    .where(outbox.c.destination == bindparam("to"), outbox.c.parked_reason == "")
    .limit(bindparam("most"))
)
_COUNTS = Statement(
    select(
        func.count().filter(outbox.c.parked_reason == "").label("waiting"),
        func.count().filter(outbox.c.parked_reason != "").label("parked"),
    )
)
_LISTED = Statement(
    select(
        outbox.c.seq,
        outbox.c.destination,
        outbox.c.type_url,
        outbox.c.entity_id,
        outbox.c.revision,
        outbox.c.mark_time,
        outbox.c.attempts,
        outbox.c.parked_reason,
        func.length(outbox.c.payload).label("size_bytes"),
    )
    .where(
        outbox.c.seq > bindparam("after"),
        (outbox.c.destination == bindparam("to")) | (bindparam("to", type_=outbox.c.destination.type) == ""),
        (outbox.c.parked_reason != "") | (bindparam("all", type_=outbox.c.deleted.type)),
    )
    .order_by(outbox.c.seq)
    .limit(bindparam("most"))
)
_NEWEST = Statement(select(func.max(outbox.c.seq)))
_UNPARK = Statement(update(outbox).where(outbox.c.parked_reason != "", _OF_SEQS).values(parked_reason="", attempts=0))
_UNPARK_ALL = Statement(update(outbox).where(outbox.c.parked_reason != "").values(parked_reason="", attempts=0))
_DROP_PARKED = Statement(delete(outbox).where(outbox.c.parked_reason != "", _OF_SEQS))


class Line:
    """What waits for one destination, for the one who carries it there. At least once; bounded in memory."""

    def __init__(self, database: Database, destination: str) -> None:
        self.destination = destination
        self._database = database
        self._rows = _Rows()
        self._arrived = asyncio.Event()
        self._behind = True  # what lies behind `_after` is in the table, and not in memory
        self._after = 0
        self._reading = False
        self._late = _Rows()  # committed while the table is being read, which may not see them
        self._begun = 0
        self._known: set[int] = set()  # rows of the table that need no looking for: taken, in memory, or to be read
        self._untold: set[int] = set()
        self._lost_count = False  # there were too many to know each

    @property
    def waiting(self) -> bool:
        """Whether there is something to take at once."""
        return bool(self._rows)

    def put(self, rows: Iterable[OutboxRow]) -> None:
        """Take rows that were committed."""
        for row in rows:
            self._know(row)
            if not self._behind or row.seq <= self._after:
                self._rows.put(row)
            elif self._reading:
                self._late.put(row)
        if self._rows.full:
            first = self._rows.first_seq
            self._rows.clear()
            self._read_from(first - 1)
        elif self._late.full:
            self._read_from(self._after)
        self._arrived.set()

    def fall_behind(self) -> None:
        """Read the table from its beginning: something that was taken did not arrive."""
        self._rows.clear()
        self._read_from(0)
        self._arrived.set()

    def _read_from(self, after: int) -> None:
        self._late.clear()
        self._behind, self._after = True, after
        self._begun += 1

    async def take(self, most: int, most_bytes: int = PART_BYTES) -> list[OutboxRow]:
        """Return the next rows in order, at least one; wait until there are some."""
        while not self._rows:
            if self._behind:
                await self._read_on()
            else:
                self._arrived.clear()
                await self._arrived.wait()
        return self._rows.take(most, most_bytes)

    async def _read_on(self) -> None:
        """Read a page of the table into memory, and with the last one what was committed meanwhile."""
        begun, self._reading = self._begun, True
        try:
            page, more = await self._database.read(_read_pending, self.destination, self._after)
            if self._begun != begun:
                return
            self._after = page[-1].seq if page else self._after
            late = [row for row in self._late.values() if not more or row.seq <= self._after]
            for row in sorted([*page, *late], key=lambda row: row.seq):
                self._know(row)
                self._rows.put(row)
            self._behind = more
        finally:
            self._reading = False
            self._late.clear()

    def _know(self, row: OutboxRow) -> None:
        if self._database.shared:
            self._known.add(row.seq)

    async def look(self) -> None:
        """Find rows that nobody tells of: who committed them died, or does not know that it did.

        What is unknown for the length of two looks is such a row. Those of a table that is very full are looked for
        when it is so no more.
        """
        before = frozenset(self._known)
        waiting = await self._database.read(_read_waiting, self.destination)
        self._known -= before - waiting
        if len(waiting) > _LINE_ROWS:
            self._lost_count = True
            self._known.clear()
        elif self._lost_count:
            self._lost_count = False
            self.fall_behind()
        elif not self._behind:
            unknown = waiting - self._known
            untold, self._untold = unknown & self._untold, unknown
            if untold:
                self.put(await self._database.read(_read_marked, self.destination, sorted(untold)))


class _Rows:
    """Rows in the order in which they leave, the newest of each entity; bounded."""

    def __init__(self) -> None:
        self._rows: dict[Key, OutboxRow] = {}
        self._bytes = 0

    def __bool__(self) -> bool:
        return bool(self._rows)

    @property
    def full(self) -> bool:
        return len(self._rows) > _LINE_ROWS or self._bytes > _LINE_BYTES

    @property
    def first_seq(self) -> int:
        return min(row.seq for row in self._rows.values())

    def values(self) -> list[OutboxRow]:
        return list(self._rows.values())

    def put(self, row: OutboxRow) -> None:
        held = self.pop(row.key)
        newest = row if held is None or held.seq < row.seq else held
        self._rows[row.key] = newest
        self._bytes += len(newest.payload)

    def pop(self, key: Key) -> OutboxRow | None:
        row = self._rows.pop(key, None)
        self._bytes -= len(row.payload) if row is not None else 0
        return row

    def take(self, most: int, most_bytes: int) -> list[OutboxRow]:
        taken = next(parts(self._rows.values(), lambda row: len(row.payload), most, most_bytes))
        for row in taken:
            self.pop(row.key)
        return taken

    def clear(self) -> None:
        self._rows.clear()
        self._bytes = 0


@dataclass(slots=True)
class Outbox:
    """The outbox of one service."""

    database: Database
    clock: Clock
    _lines: dict[str, Line] = field(default_factory=dict[str, Line])
    _numbers: "itertools.count[int]" = field(default_factory=lambda: itertools.count(time.time_ns()))
    _awaited: dict[tuple[str, str], set[asyncio.Event]] = field(
        default_factory=dict[tuple[str, str], set[asyncio.Event]]
    )
    _fetching: set["asyncio.Task[None]"] = field(default_factory=set["asyncio.Task[None]"])

    async def start(self) -> None:
        """Begin the numbers of new rows behind all that are held, also where the clock was set back.

        From here on it is heard of what other processes mark.
        """
        newest: int | None = await self.database.read(Reader.value, _NEWEST)
        self.database.hear(_TOPIC, self._hear, self._look)
        self._numbers = itertools.count(max(time.time_ns(), (newest or 0) + 1))

    def line(self, destination: str) -> Line:
        """Return the line of a destination; only one carrier may take from it."""
        if destination not in self._lines:
            self._lines[destination] = Line(self.database, destination)
        return self._lines[destination]

    def mark(self, tx: Tx, marks: Iterable[Mark]) -> None:
        """Put states into the outbox; they leave after the transaction commits.

        Raise ResourceExhausted for a state that is too large to travel.
        """
        rows = [
            OutboxRow(
                next(self._numbers),
                mark.destination,
                type_url_of(type(mark.state)),
                mark.entity_id,
                mark.revision,
                mark.deleted,
                mark.state.SerializeToString(),
            )
            for mark in marks
        ]
        if not rows:
            return
        for row in rows:
            if len(row.payload) > STATE_BYTES:
                sentence = f"{row.entity_id} would take {len(row.payload)} bytes; at most {STATE_BYTES} can travel"
                raise ResourceExhausted(ERROR_REASON_QUOTA_EXCEEDED, sentence, limit="entity_bytes")
        tx.at_end(self._put, rows)
        tx.after_commit(partial(self._hand_over, rows))

    def _put(self, tx: Tx, rows: Sequence[OutboxRow]) -> None:
        now = self.clock.seconds()
        tx.change_many(_PUT, [_columns(row, now) for row in rows])

    def _hand_over(self, rows: Sequence[OutboxRow]) -> None:
        by_destination: dict[str, list[OutboxRow]] = {}
        for row in rows:
            by_destination.setdefault(row.destination, []).append(row)
        for destination, found in by_destination.items():
            if destination in self._lines:
                self._lines[destination].put(found)
        if self.database.shared:
            for row in rows:
                self.database.tell(_TOPIC, str(row.seq), row.destination)

    def _hear(self, told: Mapping[str, str]) -> None:
        """Take what another process has marked for destinations that something is carried to from here."""
        marked: dict[str, list[int]] = {}
        for seq, destination in told.items():
            if destination in self._lines:
                marked.setdefault(destination, []).append(int(seq))
        for destination, seqs in marked.items():
            fetching = asyncio.create_task(self._fetch(self._lines[destination], seqs))
            self._fetching.add(fetching)
            fetching.add_done_callback(self._fetching.discard)

    async def _fetch(self, line: Line, seqs: Sequence[int]) -> None:
        try:
            line.put(await self.database.read(_read_marked, line.destination, seqs))
        except DatabaseError:
            line.fall_behind()

    async def _look(self, lost: bool) -> None:
        """Find marks that nobody told of; where that may be many, have lines begin anew."""
        for line in self._lines.values():
            if lost:
                line.fall_behind()
            else:
                await line.look()

    async def about(self, destination: str, entity_id: str, after_seq: int) -> list[OutboxRow]:
        """Return what waits about one entity, in the order in which it leaves."""
        given = {"to": destination, "entity": entity_id, "after": after_seq}
        return await self.database.read(lambda tx: [_outbox_row(row) for row in tx.each(_ABOUT, given)])

    def arrived(self, rows: Sequence[OutboxRow]) -> None:
        """Forget rows that were delivered; those that were marked again meanwhile stay."""
        self.database.ride(_drop, rows)
        self._settle(rows)

    async def park(self, row: OutboxRow, reason: str, attempts: int = 1) -> None:
        """Put a row aside that its receiver will not take: an operator decides."""
        await self.database.write(_park, row, reason, attempts)
        self._settle([row])

    def _settle(self, rows: Sequence[OutboxRow]) -> None:
        """Wake those who wait for a delivery."""
        for row in rows if self._awaited else ():
            for awaited in self._awaited.get((row.destination, row.entity_id), ()):
                awaited.set()

    def count_attempt(self, row: OutboxRow, attempts: int) -> None:
        """Remember how often a delivery was tried."""
        self.database.ride(_count_attempt, row, attempts)

    async def await_delivery(self, destination: str, entity_id: str, timeout_seconds: float) -> None:
        """Wait until something that was just marked has arrived, or the time runs out. Call it in the same breath."""
        key, event = (destination, entity_id), asyncio.Event()
        waiting = self._awaited.setdefault(key, set())
        waiting.add(event)
        try:
            async with asyncio.timeout(timeout_seconds):
                await event.wait()
        except TimeoutError:
            return
        finally:
            waiting.discard(event)
            if not waiting:
                self._awaited.pop(key, None)

    async def counts(self) -> tuple[int, int]:
        """Return how many rows wait and how many are parked."""
        return await self.database.read(_counts)

    async def listed(self, *, parked: bool, destination: str, after_seq: int, most: int) -> list[AnyValue]:
        """Return what the outbox holds, oldest first, without the payloads."""
        given = {"after": after_seq, "to": destination, "all": not parked, "most": most}
        return await self.database.read(lambda tx: tx.rows(_LISTED, given))

    async def retry(self, seqs: Sequence[int]) -> int:
        """Deliver parked rows again: those given, or all."""
        count = await self.database.write(_unpark, seqs)
        for line in self._lines.values():
            line.fall_behind()
        return count

    async def drop(self, seqs: Sequence[int]) -> int:
        """Forget parked rows for good."""
        return await self.database.write(lambda tx: tx.change(_DROP_PARKED, {"seqs": seqs}))


def _columns(row: OutboxRow, now: float) -> dict[str, AnyValue]:
    return {
        "destination": row.destination,
        "type_url": row.type_url,
        "entity_id": row.entity_id,
        "seq": row.seq,
        "revision": row.revision,
        "deleted": row.deleted,
        "payload": row.payload,
        "mark_time": now,
        "attempts": 0,
        "parked_reason": "",
    }


def _this(row: OutboxRow) -> dict[str, AnyValue]:
    return {"to": row.destination, "type": row.type_url, "entity": row.entity_id, "number": row.seq}


def _drop(tx: Tx, rows: Sequence[OutboxRow]) -> None:
    tx.change_many(_DROP, [_this(row) for row in rows])


def _park(tx: Tx, row: OutboxRow, reason: str, attempts: int) -> None:
    tx.change(_PARK, {**_this(row), "reason": reason[:_REASON] or "refused", "tried": attempts})


def _count_attempt(tx: Tx, row: OutboxRow, attempts: int) -> None:
    tx.change(_COUNT_ATTEMPT, {**_this(row), "tried": attempts})


def _unpark(tx: Tx, seqs: Sequence[int]) -> int:
    return tx.change(_UNPARK, {"seqs": seqs}) if seqs else tx.change(_UNPARK_ALL)


def _counts(tx: Reader) -> tuple[int, int]:
    found: AnyValue = tx.row(_COUNTS)
    return found.waiting, found.parked


def _read_pending(tx: Reader, destination: str, after: int) -> tuple[list[OutboxRow], bool]:
    """Return a page of what waits behind a number, and whether there is more."""
    rows = tx.each(_PENDING, {"to": destination, "after": after, "most": _PAGE_ROWS + 1})
    pages = parts(map(_outbox_row, rows), lambda row: len(row.payload), _PAGE_ROWS, _PAGE_BYTES)
    page = next(pages, None) or []
    return page, next(pages, None) is not None


def _read_waiting(tx: Reader, destination: str) -> set[int]:
    return {row.seq for row in tx.rows(_WAITING, {"to": destination, "most": _LINE_ROWS + 1})}


def _read_marked(tx: Reader, destination: str, seqs: Sequence[int]) -> list[OutboxRow]:
    return [_outbox_row(row) for row in tx.rows(_MARKED, {"to": destination, "seqs": seqs})]


def _outbox_row(row: AnyValue) -> OutboxRow:
    return OutboxRow(
        row.seq, row.destination, row.type_url, row.entity_id, row.revision, row.deleted, row.payload, row.attempts
    )
