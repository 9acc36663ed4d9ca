"""Index tables: what a coordinator holds of its children, numbered so that it can be watched.

The rows themselves are the change log: each holds the newest state of one entity and the number of its last change,
so "what did I miss since n" is one query, and a deleted entity stays as a tombstone for a while. A snapshot at n is
"everything up to n" read the same way, page by page: what changes meanwhile comes behind it as a change.
"""

import asyncio
import heapq
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import compress
from types import MappingProxyType
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

from branchline.v1 import errors_pb2
from branchline.v1.watches_pb2 import CHANGE_TYPE_DELETED, CHANGE_TYPE_UPSERTED, ResetReason
from branchline_internal.spine.v1.push_pb2 import ConsistencyPoint, EntityRevision, WatchChange
from google.protobuf.message import Message
from sqlalchemy import (
    BindParameter,
    Column,
    ColumnElement,
    Float,
    String,
    Table,
    bindparam,
    delete,
    func,
    literal,
    or_,
    select,
    update,
)

from services.runtime.clock import Clock
from services.runtime.database import Database, Reader, Statement, Tx, insert_new, is_in, upsert
from services.runtime.errors import Unavailable, kind_name
from services.runtime.lanes import Turns
from services.runtime.logging import get_logger
from services.runtime.spine.chunks import PART_BYTES
from services.runtime.spine.hub import Hub, Kind
from services.runtime.spine.tables import change_sequences, incarnations
from services.runtime.spine.tokens import AWAIT_SECONDS, Position
from services.runtime.spine.watch import EVERYBODY, Page

log = get_logger(__name__)

TOMBSTONE_SECONDS = 24 * 3600.0
"""How long a deleted entity is remembered; a resume token older than that gives a reset."""

PAGE_CHANGES = 200
"""Most changes in a frame."""

_TOPIC = "change"
"""Of notices to other processes on the same database: a scope, and the number of its newest change."""

_MARGIN_SECONDS = 0.2
_CATCH_UPS = 2
"""Pages of catching up that are read at once: fewer than a database has readers, so that there is one for others."""

_ADMIT_SECONDS = 20.0
_FORGOTTEN_AT_ONCE = 1000

P = ParamSpec("P")
T = TypeVar("T")

Within = Callable[[Table, BindParameter[str]], ColumnElement[bool]]

_TAKE = Statement(
    update(change_sequences)
    .where(change_sequences.c.scope == bindparam("of"))
    .values(value=change_sequences.c.value + bindparam("count"))
    .returning(change_sequences.c.value)
)
_BEGIN = Statement(insert_new(change_sequences, ["scope"]))
_TAKE_MANY = Statement(
    update(change_sequences)
    .where(change_sequences.c.scope == bindparam("of"))
    .values(value=change_sequences.c.value + bindparam("count"))
)
_VALUES = Statement(
    select(change_sequences.c.scope, change_sequences.c.value).where(is_in(change_sequences.c.scope, "scopes"))
)
_SEQUENCE = Statement(select(change_sequences).where(change_sequences.c.scope == bindparam("of")))
_RAISE_HORIZON = Statement(
    update(change_sequences)
    .where(change_sequences.c.scope == bindparam("of"), change_sequences.c.horizon < bindparam("newest"))
    .values(horizon=bindparam("newest"))
)
_EPOCH = Statement(select(incarnations.c.epoch).where(incarnations.c.number == 1))
_INCARNATE = Statement(insert_new(incarnations, ["number"]))
_COLUMNS = ("id", "revision", "change_seq", "deleted", "viewer_id", "task_id", "session_id", "payload")
"""What of a row becomes a change, with whether it is hidden; a table without sessions has no column for them."""

_KEYS = ("scope", "id")
_ALWAYS_MOVING = (*_KEYS, "revision", "change_seq", "change_time", "payload")


def _holds(column: Column[Any], value: bool | int) -> ColumnElement[bool]:
    return column.is_(value) if isinstance(value, bool) else column == value


def _whole_scope(table: Table, organization_id: BindParameter[str]) -> ColumnElement[bool]:
    return table.c.scope == organization_id


class IndexTable:
    """One watched index table, with its statements.

    `snapshot_limit` bounds logs: a snapshot holds only the newest entries. `shown` is a column and the
    value that it must have for a row to be in snapshots: what has another is hidden.
    `within` says which rows are an organization's; by default those whose scope it is. `moving` are the columns that a
    new state of an entity often changes: where no other one changes, no other index of the table is written. `identity`
    are the fields that tell a resource from others: all that is kept and shown of one that is deleted.
    """

    def __init__(
        self,
        kind: Kind,
        table: Table,
        resource: type[Message],
        *,
        snapshot_limit: int | None = None,
        shown: tuple[Column[Any], bool | int] | None = None,
        within: Within = _whole_scope,
        moving: Collection[str] = (),
        identity: Sequence[str] = ("id",),
    ) -> None:
        self.kind = kind
        self.table = table
        self.snapshot_limit = snapshot_limit
        self.identity = tuple(identity)
        self.resource = resource
        self._shown_by = shown
        c = table.c
        changed: list[ColumnElement[Any]] = [c[name] if name in c else literal("").label(name) for name in _COLUMNS]
        in_snapshots = literal(True) if shown is None else _holds(*shown)
        changed.append((~in_snapshots).label("hidden"))
        viewer: BindParameter[str] = bindparam("viewer", type_=String)
        in_range = (
            c.scope == bindparam("of"),
            c.change_seq > bindparam("after"),
            c.change_seq <= bindparam("upto"),
            or_(c.viewer_id == "", viewer == EVERYBODY, c.viewer_id == viewer),
        )
        ordered = select(*changed).where(*in_range).order_by(c.change_seq).limit(bindparam("most"))
        steady = [column.name for column in c if column.name not in {*_ALWAYS_MOVING, *moving}]
        self._alive = ordered.where(c.deleted.is_(False))
        self._shown = self._alive if shown is None else self._alive.where(in_snapshots)
        self.put = Statement(upsert(table, _KEYS, newer="revision"))
        self.put_same = Statement(upsert(table, _KEYS, newer="revision", same=steady))
        self.held = Statement(select(c.id, c.scope, c.change_seq).where(is_in(c.id, "ids")))
        self.changes = Statement(ordered)
        self.snapshot = Statement(self._shown)
        self.newest = Statement(
            select(c.change_seq)
            .where(c.scope == bindparam("of"), c.deleted.is_(False))
            .order_by(c.change_seq.desc())
            .limit(1)
            .offset(bindparam("skip"))
        )
        self.revision = Statement(
            select(func.max(c.revision)).where(c.id == bindparam("entity"), within(table, bindparam("organization")))
        )
        old = (c.deleted.is_(True), c.change_time < bindparam("before", type_=Float))
        self.tombstones = Statement(select(c.scope, c.id, c.change_seq).where(*old).limit(_FORGOTTEN_AT_ONCE))
        self.forget = Statement(
            delete(table).where(
                c.scope == bindparam("of"), c.id == bindparam("entity"), c.change_seq == bindparam("number")
            )
        )

    def narrowed(self, *conditions: ColumnElement[bool], hidden: bool = False) -> Statement:
        """Return a snapshot's statement that shows only the rows for which the conditions hold, too.

        With `hidden` also those that snapshots leave out otherwise.
        """
        return Statement((self._alive if hidden else self._shown).where(*conditions))

    def hides(self, row: Mapping[str, Any]) -> bool:
        """Say whether snapshots leave a row out."""
        if self._shown_by is None:
            return False
        column, value = self._shown_by
        return row.get(column.name, value) != value

    def tombstone(self, state: Message) -> bytes:
        """Return what is kept of a resource that is deleted."""
        kept = self.resource()
        for name in self.identity:
            setattr(kept, name, getattr(state, name))
        return kept.SerializeToString()


class Narrowed(NamedTuple):
    """A snapshot of one kind that does not show everything: `IndexTable.narrowed`, and the values of its parameters."""

    statement: Statement
    given: Mapping[str, Any]


Narrow = Mapping[Kind, Narrowed]
_EVERYTHING: Narrow = MappingProxyType({})


class UnwatchedIndex:
    """An index table that nobody watches; consistency tokens may name what it holds."""

    def __init__(self, kind: Kind, key: Column[str], owner: Column[str]) -> None:
        """`key` is the entity's id, `owner` the user whose it is."""
        self.kind = kind
        self.revision = Statement(
            select(key.table.c.revision).where(key == bindparam("entity"), owner == bindparam("user"))
        )


class Entry(NamedTuple):
    """A new state of one entity, for `Index.put`."""

    kind: Kind
    scope: str
    id: str
    revision: int
    state: Message
    viewer_id: str = ""
    task_id: str = ""
    deleted: bool = False
    columns: Mapping[str, Any] = MappingProxyType({})
    payload: bytes = b""
    """The state as it was pushed, where it need not be serialized again."""


class Index:
    """All watched index tables of one coordinator."""

    def __init__(
        self, database: Database, tables: Sequence[IndexTable], clock: Clock, unwatched: Sequence[UnwatchedIndex] = ()
    ) -> None:
        self.hub = Hub()
        self.epoch = ""
        self._database = database
        self._tables = {table.kind: table for table in tables}
        self._unwatched = {index.kind: index for index in unwatched}
        self._clock = clock
        self._catching_up = Turns(_CATCH_UPS)
        self._told: dict[str, int] = {}
        """Of a shared database: up to which change those who watch a scope have been told all there is."""

    async def start(self) -> None:
        """Learn which database this is, and listen to other processes that commit to it."""
        self.epoch = await self._database.write(_incarnate, uuid.uuid4().hex)
        self._database.hear(_TOPIC, self._hear, self._look)
        self.hub.tell_others = partial(self._database.tell, _TOPIC, "", "")

    def put(self, tx: Tx, entry: Entry) -> bool:
        """Store the state if it is newer than what is held; say whether it was."""
        return bool(self.put_many(tx, [entry]))

    def put_many(self, tx: Tx, entries: Sequence[Entry]) -> list[Entry]:
        """Store the states that are newer than what is held; return those, one for each entity.

        A number of statements that does not grow with the number of entries or of their scopes.
        """
        if not entries:
            return []
        newest = _newest(entries)
        numbers = _take_numbers(tx, [entry.scope for entry in newest])  # first: from here on the scopes are ours alone
        by_kind: dict[Kind, list[tuple[Entry, int]]] = {}
        for entry, number in zip(newest, numbers, strict=True):
            by_kind.setdefault(entry.kind, []).append((entry, number))
        fresh: list[Entry] = []
        put: list[tuple[IndexTable, Sequence[Mapping[str, Any]]]] = []
        for kind, found in by_kind.items():
            stored, rows = self._put(tx, self._tables[kind], found)
            fresh += stored
            put.append((self._tables[kind], rows))
        tx.after_commit(partial(self._publish, put, _spans(newest, numbers)))
        return fresh

    def _put(
        self, tx: Tx, spec: IndexTable, numbered: Sequence[tuple[Entry, int]]
    ) -> tuple[list[Entry], list[dict[str, Any]]]:
        fresh = [entry for entry, _ in numbered]
        now = self._clock.seconds()
        rows = [_row(spec, entry, number, now) for entry, number in numbered]
        put = tx.change_many(spec.put_same, rows)
        if put < len(rows) and put + tx.change_many(spec.put, rows) < len(rows):
            held = _held(tx, spec, fresh)
            stored = [held.get((row["id"], row["scope"])) == row["change_seq"] for row in rows]
            fresh, rows = list(compress(fresh, stored)), list(compress(rows, stored))
        return fresh, rows

    def _publish(
        self, put: Sequence[tuple[IndexTable, Sequence[Mapping[str, Any]]]], spans: Mapping[str, tuple[int, int]]
    ) -> None:
        """Tell those who listen. What nobody hears is not even put into words."""
        if self._database.shared:
            for scope, (before, upto) in spans.items():
                self._follow(scope, before, upto)
        changes: dict[str, list[WatchChange]] = {}
        for spec, rows in put:
            for row in rows:
                scope = row["scope"]
                if self.hub.heard(scope):
                    values = (row.get(name, "") for name in _COLUMNS)
                    changes.setdefault(scope, []).append(_change(spec, *values, hidden=spec.hides(row)))
        for scope, told in changes.items():
            self.hub.publish(scope, told)

    def _follow(self, scope: str, before: int, upto: int) -> None:
        """See that nobody is told what comes behind a change of another process that they have not been told."""
        self._database.tell(_TOPIC, scope, str(upto))
        if not self.hub.heard(scope):
            self._told.pop(scope, None)
        elif self._told.get(scope) != before and self._told.get(scope, -1) < upto:
            self._behind(scope, upto)
        else:
            self._told[scope] = max(upto, self._told.get(scope, upto))

    def _behind(self, scope: str, upto: int) -> None:
        """Have all who watch a scope read what they have not been told."""
        self._told[scope] = upto
        self.hub.lag(scope)

    def _hear(self, told: Mapping[str, str]) -> None:
        """Take what other processes say of the newest changes of scopes."""
        for scope, upto in told.items():
            if scope and self.hub.watched(scope) and self._told.get(scope, -1) < int(upto):
                self._behind(scope, int(upto))
        self.hub.wake_waiting()

    async def _look(self, lost: bool) -> None:
        """Look for changes of other processes that nobody told of."""
        watched = self.hub.scopes
        for scope in self._told.keys() - watched:
            del self._told[scope]
        rows: list[Any] = await self._database.read(Reader.rows, _VALUES, {"scopes": watched}) if watched else []
        self._hear({row.scope: str(row.value) for row in rows})

    async def catch_up(
        self,
        scope: str,
        kinds: Sequence[Kind],
        position: Position | None,
        viewer_id: str,
        *,
        tail: bool = False,
        narrow: Narrow = _EVERYTHING,
    ) -> AsyncIterator[Page]:
        """Yield what brings a watcher from a position to the present, page by page.

        Exactly the changes behind the position; or, if it cannot be resumed from, a reset and a snapshot (with
        `tail`, the reset alone), which `narrow` makes smaller. Only so many read at a time, a page each and by turns of
        the scopes: neither who takes no pages nor a scope that very many open holds others up. Raise Unavailable if the
        turn does not come.
        """
        reason = ResetReason.RESET_REASON_NO_TOKEN
        while True:
            if position is not None:
                page = await self._read(scope, self._read_changes, kinds, position, viewer_id)
                if page.reset:
                    reason = page.reset
                else:
                    if not page.more:
                        self._seen(scope, page)
                    yield page
                    if not page.more:
                        return
                    assert page.position is not None
                    position = page.position
                    continue
            now = await self._read(scope, self.present)
            if tail:
                self._seen(scope, Page(now))
                yield Page(now, reset=reason)
                return
            yield Page(None, reset=reason, more=True)
            async for page in self._snapshot(scope, kinds, now, viewer_id, narrow):
                yield page
            position = now  # what was forgotten meanwhile shows in the next look

    def _seen(self, scope: str, page: Page) -> None:
        """Take note that a watcher has been told all up to its position, the first of its scope."""
        if self._database.shared and page.position is not None:
            self._told.setdefault(scope, page.position.change_seq)

    async def _snapshot(
        self, scope: str, kinds: Sequence[Kind], now: Position, viewer_id: str, narrow: Narrow
    ) -> AsyncIterator[Page]:
        after = await self._read(scope, self._beginnings, kinds, narrow)
        while True:
            page, after = await self._read(scope, self._read_snapshot, after, now, viewer_id, narrow)
            if page.changes:
                yield page
            if not page.more:
                return

    async def _read(
        self, scope: str, fn: Callable[Concatenate[Reader, str, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Read of a scope for one who catches up, when it is its turn."""
        try:
            async with self._catching_up.hold(scope, _ADMIT_SECONDS):
                return await self._database.read(fn, scope, *args, **kwargs)
        except TimeoutError as error:
            sentence = "too many watches begin at the same moment; try again"
            raise Unavailable(errors_pb2.ERROR_REASON_OVERLOADED, sentence) from error

    def present(self, tx: Reader, scope: str) -> Position:
        """Return where a scope stands. What is read of it behind this is at least as new."""
        row: Any = tx.row(_SEQUENCE, {"of": scope})
        return Position(self.epoch, row.value if row is not None else 0)

    def _read_changes(self, tx: Reader, scope: str, kinds: Sequence[Kind], position: Position, viewer_id: str) -> Page:
        """Return the changes behind a position, or why it cannot be resumed from."""
        row: Any = tx.row(_SEQUENCE, {"of": scope})
        value, horizon = (row.value, row.horizon) if row is not None else (0, 0)
        if position.epoch != self.epoch or position.change_seq > value:
            return Page(None, reset=ResetReason.RESET_REASON_INDEX_REBUILT)
        if position.change_seq < horizon:
            return Page(None, reset=ResetReason.RESET_REASON_TOKEN_EXPIRED)
        after = dict.fromkeys(kinds, position.change_seq)
        changes, more = self._merged(tx, scope, after, value, viewer_id, None)
        return Page(Position(self.epoch, changes[-1].change_seq if more else value), changes, more=more)

    def _beginnings(self, tx: Reader, scope: str, kinds: Sequence[Kind], narrow: Narrow) -> dict[Kind, int]:
        """Return behind which change the snapshot of each kind begins."""
        after = dict.fromkeys(kinds, 0)
        for kind in kinds:
            limit = self._tables[kind].snapshot_limit
            if limit is not None and kind not in narrow:
                after[kind] = tx.value(self._tables[kind].newest, {"of": scope, "skip": limit}) or 0
        return after

    def _read_snapshot(
        self, tx: Reader, scope: str, after: Mapping[Kind, int], now: Position, viewer_id: str, narrow: Narrow
    ) -> tuple[Page, Mapping[Kind, int]]:
        changes, more = self._merged(tx, scope, after, now.change_seq, viewer_id, narrow)
        last = changes[-1].change_seq if changes else now.change_seq
        return Page(None, changes, snapshot=True, more=more), {kind: max(seq, last) for kind, seq in after.items()}

    def _merged(
        self, tx: Reader, scope: str, after: Mapping[Kind, int], upto: int, viewer_id: str, narrow: Narrow | None
    ) -> tuple[list[WatchChange], bool]:
        """Return the first changes of several kinds, in their order, and whether there are more.

        What is deleted is among them, unless they are a snapshot's: then `narrow` is given.
        """

        def rows(kind: Kind) -> Iterator[tuple[int, IndexTable, Any]]:
            spec = self._tables[kind]
            given = {"of": scope, "after": after[kind], "upto": upto, "viewer": viewer_id, "most": PAGE_CHANGES + 1}
            statement = spec.changes if narrow is None else spec.snapshot
            if narrow and kind in narrow:
                statement, given = narrow[kind].statement, given | dict(narrow[kind].given)
            for row in tx.each(statement, given):
                yield row.change_seq, spec, row

        changes: list[WatchChange] = []
        size = 0
        for _, spec, row in heapq.merge(*(rows(kind) for kind in after), key=lambda found: found[0]):
            size += len(row.payload)
            if changes and (len(changes) == PAGE_CHANGES or size > PART_BYTES):
                return changes, True
            changes.append(_change(spec, *row))
        return changes, False

    async def await_point(
        self,
        point: ConsistencyPoint,
        organization_id: str,
        user_id: str,
        remaining_seconds: float | None = None,
        wait_seconds: float = AWAIT_SECONDS,
    ) -> None:
        """Wait until every entity of the point that this coordinator indexes is at least as new.

        Only what is the organization's, or the user's own, is looked at. Raise Unavailable with reason INDEX_BEHIND if
        that takes longer than `wait_seconds`, or than the time that the caller has left.
        """
        wait = wait_seconds
        if remaining_seconds is not None:
            wait = min(wait, max(0.0, remaining_seconds - max(_MARGIN_SECONDS, remaining_seconds * 0.05)))
        wanted = EntityRevision()
        try:
            async with asyncio.timeout(wait):
                for wanted in point.entities:
                    index = self._tables.get(wanted.kind) or self._unwatched.get(wanted.kind)
                    if index is None:
                        continue
                    given = {"entity": wanted.id}
                    given |= {"organization": organization_id} if isinstance(index, IndexTable) else {"user": user_id}
                    while True:
                        changed = self.hub.awaited(wanted.kind, wanted.id)
                        held = await self._database.read(Reader.value, index.revision, given)
                        if (held or 0) >= wanted.revision:
                            break
                        await changed.wait()
        except TimeoutError as error:
            sentence = "the index has not caught up with the consistency token"
            raise Unavailable(
                errors_pb2.ERROR_REASON_INDEX_BEHIND, sentence, resource_type=kind_name(wanted.kind), id=wanted.id
            ) from error

    async def compact(self) -> None:
        """Forget old tombstones and raise the horizon of their scopes."""
        before = self._clock.seconds() - TOMBSTONE_SECONDS
        for spec in self._tables.values():
            while await self._database.write(self.forget_where, spec, spec.tombstones, {"before": before}):
                pass

    def forget_where(self, tx: Tx, spec: IndexTable, old: Statement, given: Mapping[str, Any]) -> int:
        """Delete the rows that a statement names by (scope, id, change_seq); return their number.

        The horizon of their scopes rises: who has not seen them by now cannot resume.
        """
        rows: list[Any] = tx.rows(old, given)
        newest: dict[str, int] = {}
        for row in rows:
            newest[row.scope] = max(newest.get(row.scope, 0), row.change_seq)
        tx.change_many(_RAISE_HORIZON, [{"of": scope, "newest": seq} for scope, seq in sorted(newest.items())])
        tx.change_many(spec.forget, [{"of": row.scope, "entity": row.id, "number": row.change_seq} for row in rows])
        return len(rows)


def _incarnate(tx: Tx, epoch: str) -> str:
    tx.change(_INCARNATE, {"number": 1, "epoch": epoch})
    return tx.value(_EPOCH)


def _newest(entries: Sequence[Entry]) -> list[Entry]:
    """Return the newest entry of each entity."""
    newest: dict[tuple[Kind, str, str], Entry] = {}
    for entry in entries:
        key = entry.kind, entry.id, entry.scope
        known = newest.get(key)
        if known is None or known.revision < entry.revision:
            newest[key] = entry
    return list(newest.values())


def _spans(entries: Sequence[Entry], numbers: Sequence[int]) -> dict[str, tuple[int, int]]:
    """Return for each scope the number before the first that was taken, and the last."""
    spans: dict[str, tuple[int, int]] = {}
    for entry, number in zip(entries, numbers, strict=True):
        before, upto = spans.get(entry.scope, (number - 1, number))
        spans[entry.scope] = min(before, number - 1), max(upto, number)
    return spans


def _held(tx: Reader, spec: IndexTable, entries: Sequence[Entry]) -> dict[tuple[str, str], int]:
    """Return the numbers of the changes that are held of entities."""
    rows: list[Any] = tx.rows(spec.held, {"ids": [entry.id for entry in entries]})
    return {(row.id, row.scope): row.change_seq for row in rows}


def _take_numbers(tx: Tx, scopes: Sequence[str]) -> list[int]:
    """Take the next number of each scope as often as it is named. Scopes are taken in one order: no deadlock."""
    counts: dict[str, int] = {}
    for scope in scopes:
        counts[scope] = counts.get(scope, 0) + 1
    taken = _take_of_one(tx, counts) if len(counts) == 1 else _take_of_many(tx, counts)
    following = {scope: taken[scope] - count for scope, count in counts.items()}
    numbers: list[int] = []
    for scope in scopes:
        following[scope] += 1
        numbers.append(following[scope])
    return numbers


def _take_of_one(tx: Tx, counts: Mapping[str, int]) -> Mapping[str, int]:
    """Raise the sequence of one scope; return its new value."""
    ((scope, count),) = counts.items()
    value = tx.value(_TAKE, {"of": scope, "count": count})
    if value is None:
        tx.change(_BEGIN, {"scope": scope, "value": 0, "horizon": 0})
        value = tx.value(_TAKE, {"of": scope, "count": count})
    return {scope: value}


def _take_of_many(tx: Tx, counts: Mapping[str, int]) -> Mapping[str, int]:
    """Raise the sequences of many scopes with a few statements; return their new values."""
    scopes = sorted(counts)
    there = tx.change_many(_TAKE_MANY, [{"of": scope, "count": counts[scope]} for scope in scopes])
    if there < len(scopes):  # which were new is not known, and others may have begun them by now: take again, of all
        tx.change_many(_BEGIN, [{"scope": scope, "value": 0, "horizon": 0} for scope in scopes])
        tx.change_many(_TAKE_MANY, [{"of": scope, "count": counts[scope]} for scope in scopes])
    return {row.scope: row.value for row in tx.rows(_VALUES, {"scopes": scopes})}


def _row(spec: IndexTable, entry: Entry, seq: int, now: float) -> dict[str, Any]:
    return {
        "scope": entry.scope,
        "id": entry.id,
        "revision": entry.revision,
        "change_seq": seq,
        "change_time": now,
        "deleted": entry.deleted,
        "payload": spec.tombstone(entry.state) if entry.deleted else entry.payload or entry.state.SerializeToString(),
        "viewer_id": entry.viewer_id,
        "task_id": entry.task_id,
        **entry.columns,
    }


def _change(
    spec: IndexTable,
    entity_id: str,
    revision: int,
    change_seq: int,
    deleted: bool,
    viewer_id: str,
    task_id: str,
    session_id: str,
    payload: bytes,
    hidden: bool,
) -> WatchChange:
    return WatchChange(
        kind=spec.kind,
        id=entity_id,
        revision=revision,
        change_seq=change_seq,
        type=CHANGE_TYPE_DELETED if deleted else CHANGE_TYPE_UPSERTED,
        entity=payload,
        viewer_id=viewer_id,
        task_id=task_id,
        session_id=session_id,
        hidden=hidden,
    )
