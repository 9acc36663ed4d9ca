"""Transactions as functions, on both databases: whole or not at all, whatever is cancelled, refused or broken."""

import asyncio
import sqlite3
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any, cast

import psycopg
import pytest
import pytest_asyncio
from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    bindparam,
    func,
    select,
    update,
)

from services.runtime.database import (
    Database,
    DatabaseBusy,
    DatabaseError,
    DatabaseUnavailable,
    Reader,
    Statement,
    Tx,
    base,
    insert,
    insert_new,
    is_in,
    open_database,
    sqlite,
    upsert,
)
from tests.support.databases import Databases, Server

metadata = MetaData()
notes = Table(
    "notes",
    metadata,
    Column("id", String, primary_key=True),
    Column("number", BigInteger, nullable=False),
    Column("ratio", Float),
    Column("flag", Boolean),
    Column("data", LargeBinary),
)
links = Table(
    "links",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("note", String, ForeignKey("notes.id", deferrable=True, initially="DEFERRED"), nullable=False),
)
ADD = Statement(insert(notes))
ADD_NEW = Statement(insert_new(notes, ["id"]))
PUT = Statement(upsert(notes, ["id"], newer="number", keep=["flag"]))
LINK = Statement(insert(links))
ALL = Statement(select(notes).order_by(notes.c.id))
ONE = Statement(select(notes.c.number).where(notes.c.id == bindparam("note")))
OF = Statement(select(notes.c.id).where(is_in(notes.c.id, "ids")).order_by(notes.c.id))
NOT_OF = Statement(select(notes.c.id).where(is_in(notes.c.number, "numbers", negate=True)).order_by(notes.c.id))
COUNT = Statement(select(func.count()).select_from(notes))
RAISE = Statement(
    update(notes).where(notes.c.id == bindparam("note")).values(number=notes.c.number + 1).returning(notes.c.number)
)
WHO: ContextVar[str] = ContextVar("who", default="nobody")


class Refused(Exception):
    pass


@pytest_asyncio.fixture
async def database(databases: Databases) -> AsyncGenerator[Database, None]:
    opened = open_database(databases.make(metadata))
    await opened.start()
    yield opened
    await opened.close()


def note(name: str, number: int = 0, **columns: Any) -> dict[str, Any]:
    return {"id": name, "number": number, "ratio": None, "flag": None, "data": None, **columns}


def add(tx: Tx, *names: str) -> None:
    for name in names:
        tx.change(ADD, note(name))


def add_then_refuse(tx: Tx, name: str) -> None:
    add(tx, name)
    tx.after_commit(lambda: pytest.fail("announced what was undone"))
    raise Refused(name)


def names(tx: Reader) -> list[str]:
    return [row.id for row in tx.rows(ALL)]


async def together(database: Database, *starts: Callable[[], Any]) -> list[Any]:
    """Have writes wait while another runs, so that SQLite commits them together."""
    begun, go_on = threading.Event(), threading.Event()

    def hold(tx: Tx) -> None:
        begun.set()
        go_on.wait(10)

    holding = asyncio.create_task(database.write(hold))
    await asyncio.to_thread(begun.wait, 10)
    waiting = [asyncio.create_task(start()) for start in starts]
    await asyncio.sleep(0)
    go_on.set()
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    await holding
    return outcomes


async def until(look: Callable[[], Awaitable[Any]], wanted: Any) -> None:
    async with asyncio.timeout(5):
        while await look() != wanted:  # noqa: ASYNC110 - it is the database that is looked at
            await asyncio.sleep(0.01)


# What goes in comes out.


async def test_values_come_back_as_they_went(database: Database) -> None:
    given = [
        note("a", 2**63 - 1, ratio=0.1, flag=True, data=b"\x00\xff"),
        note("b", -(2**63), ratio=-1e300, flag=False, data=b""),
        note("c", 0, ratio=2.0),
        note("ä%s:x\"'\u20ac", 1),
    ]
    await database.write(lambda tx: tx.change_many(ADD, given))

    rows = await database.read(lambda tx: tx.rows(ALL))

    assert [row._asdict() for row in rows] == given
    assert all(type(row.flag) in {bool, type(None)} and type(row.ratio) in {float, type(None)} for row in rows)
    assert await database.read(lambda tx: [row.id for row in tx.each(ALL)]) == [one["id"] for one in given]


async def test_a_row_is_changed_only_by_a_newer_one_and_kept_columns_stay(database: Database) -> None:
    def work(tx: Tx) -> list[int]:
        return [
            tx.change(PUT, note("a", 5, flag=True)),
            tx.change(PUT, note("a", 5, flag=False)),
            tx.change(PUT, note("a", 6, flag=False, ratio=1.5)),
            tx.change(ADD_NEW, note("a", 9)),
            tx.change_many(PUT, [note("a", 7), note("b", 1), note("a", 3)]),
        ]

    changed = await database.write(work)
    row = (await database.read(lambda tx: tx.rows(ALL)))[0]

    assert changed == [1, 0, 1, 0, 2]
    assert (row.number, row.flag, row.ratio) == (7, True, None)


async def test_lists_of_any_length_and_type_are_one_parameter(database: Database) -> None:
    await database.write(lambda tx: tx.change_many(ADD, [note(f"n{k}", 2**40 + k) for k in range(5)]))

    assert await database.read(lambda tx: [r.id for r in tx.rows(OF, {"ids": []})]) == []
    assert await database.read(lambda tx: [r.id for r in tx.rows(OF, {"ids": ["n1", "n3", "x"]})]) == ["n1", "n3"]
    most = {"ids": [f"n{k}" for k in range(5000)]}
    assert len(await database.read(lambda tx: tx.rows(OF, most))) == 5
    left = {"numbers": [2**40, 2**40 + 4]}
    assert await database.read(lambda tx: [r.id for r in tx.rows(NOT_OF, left)]) == ["n1", "n2", "n3"]


async def test_an_update_returns_what_it_wrote(database: Database) -> None:
    await database.write(add, "a")

    assert await database.write(lambda tx: [tx.value(RAISE, {"note": "a"}) for _ in range(3)]) == [1, 2, 3]
    assert await database.write(lambda tx: tx.row(RAISE, {"note": "x"})) is None


# Whole or not at all.


async def test_who_raises_leaves_nothing_and_others_of_the_group_commit(database: Database) -> None:
    outcomes = await together(
        database,
        lambda: database.write(add, "a"),
        lambda: database.write(add_then_refuse, "b"),
        lambda: database.write(add, "c"),
        lambda: database.write(lambda tx: next(iter(()))),
    )

    assert outcomes[0] is None
    assert isinstance(outcomes[1], Refused)
    assert outcomes[2] is None
    assert isinstance(outcomes[3], RuntimeError)
    assert await database.read(names) == ["a", "c"]


async def test_savepoints_undo_their_part_alone_however_deep(database: Database) -> None:
    told: list[str] = []

    def work(tx: Tx, prefix: str) -> None:
        add(tx, f"{prefix}1")
        for name, fails in ((f"{prefix}2", True), (f"{prefix}3", False)):
            try:
                with tx.savepoint():
                    add(tx, name)
                    tx.after_commit(lambda name=name: told.append(name))
                    try:
                        with tx.savepoint():
                            add(tx, f"{name}-inner")
                            add(tx, f"{name}-inner")  # the key is taken: the database's own error
                    except (sqlite3.IntegrityError, psycopg.errors.UniqueViolation):
                        add(tx, f"{name}-again")
                    if fails:
                        raise Refused
            except Refused:
                pass

    await together(database, lambda: database.write(work, "a"), lambda: database.write(work, "b"))

    assert await database.read(names) == ["a1", "a3", "a3-again", "b1", "b3", "b3-again"]
    assert sorted(told) == ["a3", "b3"]


async def test_what_cannot_be_committed_fails_alone(database: Database) -> None:
    outcomes = await together(
        database,
        lambda: database.write(add, "a"),
        lambda: database.write(lambda tx: tx.change(LINK, {"id": 1, "note": "missing"})),
        lambda: database.write(add, "b"),
    )

    assert (outcomes[0], outcomes[2]) == (None, None)
    assert isinstance(outcomes[1], sqlite3.IntegrityError | psycopg.errors.ForeignKeyViolation)
    assert await database.read(names) == ["a", "b"]


async def test_a_function_that_goes_on_after_an_error_of_the_database_is_not_taken_for_done(
    databases: Databases, database: Database
) -> None:
    def work(tx: Tx) -> None:
        try:
            add(tx, "a", "a")
        except (sqlite3.IntegrityError, psycopg.errors.UniqueViolation):
            return

    if databases.dialect == "postgresql":  # its transaction is broken; SQLite's is not
        with pytest.raises(psycopg.errors.InFailedSqlTransaction):
            await database.write(work)
    else:
        await database.write(work)
    assert await database.read(names) == (["a"] if databases.dialect == "sqlite" else [])


async def test_a_reader_sees_one_state_and_cannot_write(database: Database) -> None:
    started, go_on = threading.Event(), threading.Event()

    def look_twice(tx: Reader) -> tuple[int, int]:
        before = tx.value(COUNT)
        started.set()
        go_on.wait(10)
        return before, tx.value(COUNT)

    looking = asyncio.create_task(database.read(look_twice))
    await asyncio.to_thread(started.wait, 10)
    await database.write(add, "a")
    go_on.set()

    assert await looking == (0, 0)
    with pytest.raises((DatabaseError, psycopg.errors.ReadOnlySqlTransaction)):
        await database.read(lambda tx: Tx(tx._driver).change(ADD, note("b")))  # pyright: ignore[reportPrivateUsage]
    assert await database.read(names) == ["a"]


# What is announced.


async def test_announcements_come_after_the_commit_in_its_order_and_before_the_caller_goes_on(
    database: Database,
) -> None:
    """On PostgreSQL, too, where commits run side by side: who waited for a row is announced behind who held it."""
    heard: list[int] = []
    await database.write(add, "counter")

    def work(tx: Tx) -> int:
        number: int = tx.value(RAISE, {"note": "counter"})
        tx.after_commit(lambda: heard.append(number))
        return number

    async def write() -> None:
        number = await database.write(work)
        assert number in heard

    for _ in range(5):
        await asyncio.gather(*(write() for _ in range(40)))

    assert heard == list(range(1, 201))


async def test_an_announcement_that_raises_hurts_nobody(database: Database) -> None:
    heard: list[str] = []

    def fail() -> None:
        raise ValueError("no announcement")

    def work(tx: Tx) -> str:
        add(tx, "a")
        tx.after_commit(fail)
        tx.after_commit(lambda: heard.append("second"))
        return "done"

    assert await database.write(work) == "done"
    assert heard == ["second"]


# Who is cancelled.


async def test_what_has_not_begun_never_will_once_its_caller_is_cancelled(database: Database) -> None:
    begun = [threading.Event() for _ in range(16)]
    go_on = threading.Event()

    def hold(tx: Tx, mine: threading.Event) -> None:
        mine.set()
        go_on.wait(10)

    holding = [asyncio.create_task(database.write(hold, mine)) for mine in begun]
    await asyncio.to_thread(begun[0].wait, 10)
    late = asyncio.create_task(database.write(add, "late"))
    await asyncio.sleep(0.01)
    late.cancel()
    await asyncio.wait({late}, timeout=1)
    go_on.set()
    await asyncio.gather(*holding)

    assert late.cancelled()
    assert await database.read(names) == []


async def test_what_has_begun_ends_and_is_announced_though_its_caller_left(database: Database) -> None:
    begun, go_on, announced = threading.Event(), threading.Event(), asyncio.Event()

    def work(tx: Tx) -> None:
        add(tx, "a")
        tx.after_commit(announced.set)
        begun.set()
        go_on.wait(10)

    working = asyncio.create_task(database.write(work))
    await asyncio.to_thread(begun.wait, 10)
    working.cancel()
    await asyncio.wait({working}, timeout=1)
    assert working.cancelled()
    go_on.set()

    async with asyncio.timeout(5):
        await announced.wait()
    assert await database.read(names) == ["a"]


async def test_cancelled_callers_leave_nothing_half_done_and_no_lock(database: Database) -> None:
    announced: list[int] = []

    def work(tx: Tx, number: int) -> None:
        add(tx, f"{number}-1", f"{number}-2")
        tx.after_commit(lambda: announced.append(number))

    for number in range(60):
        task = asyncio.create_task(database.write(work, number))
        reading = asyncio.create_task(database.read(names))
        await asyncio.sleep(number * 0.00005)
        task.cancel()
        reading.cancel()
        await asyncio.wait({task, reading})
    async with asyncio.timeout(5):
        await database.write(add, "last")

    async def unannounced() -> int:  # on PostgreSQL the last may still be on their way
        return await database.read(lambda tx: tx.value(COUNT)) - 2 * len(announced) - 1

    await until(unannounced, 0)


async def test_the_callers_context_travels_with_what_it_asks_for(database: Database) -> None:
    async def ask(name: str) -> tuple[str, str]:
        WHO.set(name)
        return await database.write(lambda tx: WHO.get()), await database.read(lambda tx: WHO.get())

    outcomes = await asyncio.gather(*(asyncio.create_task(ask(f"user {k}")) for k in range(20)))

    assert outcomes == [(f"user {k}", f"user {k}") for k in range(20)]


# Many at once.


async def test_many_writers_lose_nothing(database: Database) -> None:
    await database.write(add, "a", "b")

    async def raise_both(first: str, second: str) -> None:  # in opposite orders: deadlocks on PostgreSQL, tried again
        await database.write(lambda tx: (tx.value(RAISE, {"note": first}), tx.value(RAISE, {"note": second})))

    await asyncio.gather(*(raise_both(*("ab" if k % 2 else "ba")) for k in range(12)))

    assert await database.read(lambda tx: [row.number for row in tx.rows(ALL)]) == [12, 12]


async def test_two_who_insert_the_same_key_at_once_see_each_other(database: Database) -> None:
    def once(tx: Tx) -> bool:
        if tx.value(ONE, {"note": "a"}) is not None:
            return False
        add(tx, "a")
        return True

    outcomes = await asyncio.gather(*(database.write(once) for _ in range(8)))

    assert sorted(outcomes) == [False] * 7 + [True]


async def test_a_slow_reader_does_not_hold_up_writers_nor_writers_readers(database: Database) -> None:
    go_on = threading.Event()
    slow = [asyncio.create_task(database.read(lambda tx: go_on.wait(10))) for _ in range(3)]
    async with asyncio.timeout(5):
        await database.write(add, "a")
        assert await database.read(names) == ["a"]
    held = [asyncio.create_task(database.write(lambda tx: go_on.wait(10))) for _ in range(8)]
    async with asyncio.timeout(5):
        assert await database.read(names) == ["a"]
    go_on.set()
    await asyncio.gather(*slow, *held)


async def test_sqlite_commits_many_together(tmp_path: Path, sqlite_database: Database) -> None:
    before = sqlite_database.commits

    await asyncio.gather(*(sqlite_database.write(add, str(k)) for k in range(200)))

    assert sqlite_database.commits - before < 20
    assert len(await sqlite_database.read(names)) == 200


# What rides.


async def test_a_ride_goes_with_the_next_write_or_after_a_while(
    database: Database, databases: Databases, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "RIDE_SECONDS", 0.05)
    before = database.commits
    database.ride(add, "by itself")
    await until(lambda: database.read(names), ["by itself"])
    assert database.commits == before + 1

    monkeypatch.setattr(base, "RIDE_SECONDS", 60)
    if databases.dialect == "sqlite":
        database.ride(add, "with company")
        database.ride(add_then_refuse, "refused")
        await database.write(add, "a")
        assert database.commits == before + 2
        assert await database.read(names) == ["a", "by itself", "with company"]


async def test_a_ride_whose_time_comes_while_others_are_busy_goes_behind_them(
    sqlite_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "RIDE_SECONDS", 0.02)
    begun, go_on = threading.Event(), threading.Event()

    def hold(tx: Tx) -> None:
        begun.set()
        go_on.wait(10)

    holding = asyncio.create_task(sqlite_database.write(hold))
    await asyncio.to_thread(begun.wait, 10)
    sqlite_database.ride(add, "a")
    await asyncio.sleep(0.05)
    go_on.set()
    await holding

    await until(lambda: sqlite_database.read(names), ["a"])


async def test_closing_ends_what_waits_and_what_rides(databases: Databases) -> None:
    url = databases.make(metadata)
    database = open_database(url)
    await database.start()
    writes = [asyncio.create_task(database.write(add, f"w{k}")) for k in range(100)]
    reads = [asyncio.create_task(database.read(names)) for _ in range(20)]
    await asyncio.sleep(0)
    database.ride(add, "x")
    await database.close()
    async with asyncio.timeout(5):
        await asyncio.gather(*writes)
        await asyncio.gather(*reads)
    await database.close()

    with pytest.raises(DatabaseUnavailable):
        await database.write(add, "y")
    with pytest.raises(DatabaseUnavailable):
        await database.read(names)
    database.ride(add, "nobody minds")
    again = open_database(url)
    await again.start()
    assert len(await again.read(names)) == 101
    await again.close()


# What the database itself refuses: SQLite.


@pytest_asyncio.fixture
async def sqlite_database(tmp_path: Path) -> AsyncGenerator[Database, None]:
    opened = open_database(Databases("sqlite", tmp_path).make(metadata))
    await opened.start()
    yield opened
    await opened.close()


async def test_a_file_that_another_process_holds_is_busy_then_works_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "_BUSY_TIMEOUT_MS", 50)
    url = Databases("sqlite", tmp_path).make(metadata)
    database = open_database(url)
    await database.start()
    other = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    outcomes = await asyncio.gather(*(database.write(add, str(k)) for k in range(5)), return_exceptions=True)

    assert [type(outcome) for outcome in outcomes] == [DatabaseBusy] * 5
    other.execute("ROLLBACK")
    other.close()
    await database.write(add, "a")
    assert await database.read(names) == ["a"]
    await database.close()


async def limit_pages(database: Database, most: int) -> None:
    """Say how large the file may become, on the connection that writes."""

    def limit(driver: Any) -> None:
        driver.raw.execute(f"PRAGMA max_page_count={most}")

    await cast("Any", database)._writer.run(limit)


async def test_a_full_file_refuses_what_needs_room_and_takes_what_does_not(sqlite_database: Database) -> None:
    await sqlite_database.write(add, "a")
    await limit_pages(sqlite_database, 1)

    def grow(tx: Tx) -> None:
        tx.change(ADD, note("b", data=bytes(100_000)))

    outcomes = await together(
        sqlite_database,
        lambda: sqlite_database.write(lambda tx: tx.value(RAISE, {"note": "a"})),
        lambda: sqlite_database.write(grow),
        lambda: sqlite_database.write(lambda tx: tx.value(RAISE, {"note": "a"})),
    )

    assert isinstance(outcomes[1], DatabaseUnavailable)
    assert (outcomes[0], outcomes[2]) == (1, 2)
    await limit_pages(sqlite_database, 100_000)
    await sqlite_database.write(grow)
    assert await sqlite_database.read(names) == ["a", "b"]


async def test_a_lost_transaction_is_run_again_function_by_function(sqlite_database: Database) -> None:
    """As when SQLite itself rolls back, after an I/O error."""
    runs: list[str] = []

    def lose(tx: Tx) -> None:
        runs.append("lose")
        tx._driver.execute("ROLLBACK")  # pyright: ignore[reportPrivateUsage]
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = sqlite3.SQLITE_IOERR
        raise error

    outcomes = await together(
        sqlite_database, lambda: sqlite_database.write(add, "a"), lambda: sqlite_database.write(lose)
    )

    assert outcomes[0] is None
    assert isinstance(outcomes[1], DatabaseUnavailable)
    assert len(runs) == 2
    assert await sqlite_database.read(names) == ["a"]


async def test_a_file_that_is_no_database_is_not_available(tmp_path: Path) -> None:
    (tmp_path / "bad.sqlite").write_bytes(b"no database " * 1000)
    database = open_database(f"sqlite:///{tmp_path / 'bad.sqlite'}")

    with pytest.raises(DatabaseError):
        await database.start()


# What the database itself refuses: PostgreSQL.


async def test_a_server_that_stops_is_not_available_and_works_again_once_it_is_back(
    postgres: Server, tmp_path: Path
) -> None:
    databases = Databases("postgresql", tmp_path, postgres)
    database = open_database(databases.make(metadata))
    await database.start()
    await asyncio.gather(*(database.write(add, str(k)) for k in range(10)))
    begun, go_on = threading.Event(), threading.Event()

    def work(tx: Tx) -> None:
        """As a batch's function does: an error of one part does not end it."""
        add(tx, "half")
        begun.set()
        go_on.wait(10)
        for name in ("more", "and more"):
            try:
                with tx.savepoint():
                    add(tx, name)
            except Exception as error:
                if tx.is_outage(error):
                    raise

    working = asyncio.create_task(database.write(work))
    await asyncio.to_thread(begun.wait, 10)
    await asyncio.to_thread(postgres.stop)
    try:
        go_on.set()
        with pytest.raises(DatabaseUnavailable):
            await working
        with pytest.raises(DatabaseUnavailable):
            await database.write(add, "x")
        with pytest.raises(DatabaseUnavailable):
            await database.read(names)
    finally:
        await asyncio.to_thread(postgres.start)

    await asyncio.gather(*(database.write(add, f"again {k}") for k in range(10)), database.read(names))
    assert len(await database.read(names)) == 20
    await database.close()
    databases.forget()


async def test_a_lock_that_is_never_given_back_is_busy(postgres: Server, tmp_path: Path) -> None:
    databases = Databases("postgresql", tmp_path, postgres)
    url = databases.make(metadata)
    database = open_database(url)
    await database.start()
    await database.write(add, "a")

    def wait_briefly(tx: Tx) -> None:
        tx._driver.execute("SET LOCAL lock_timeout = '50ms'")  # pyright: ignore[reportPrivateUsage]
        tx.value(RAISE, {"note": "a"})

    with psycopg.connect(url) as other:
        other.execute("UPDATE notes SET number = 7")
        with pytest.raises(DatabaseBusy):
            await database.write(wait_briefly)
        other.rollback()
    await database.close()
    databases.forget()


async def test_a_key_that_stays_taken_is_the_functions_error_and_no_outage(postgres: Server, tmp_path: Path) -> None:
    databases = Databases("postgresql", tmp_path, postgres)
    database = open_database(databases.make(metadata))
    await database.start()

    def work(tx: Tx) -> str:
        try:
            with tx.savepoint():
                add(tx, "a", "a")
        except psycopg.errors.UniqueViolation as error:
            if tx.is_outage(error):
                raise
            return "parked"
        return "done"

    assert await database.write(work) == "parked"
    with pytest.raises(psycopg.errors.UniqueViolation):
        await database.write(add, "b", "b")
    await database.close()
    databases.forget()
