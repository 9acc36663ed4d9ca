"""Two processes on one PostgreSQL database: each hears what the other commits, whether its notice arrives or not."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import psycopg
import pytest
from branchline.v1.tasks_pb2 import Task
from branchline_internal.spine.v1.push_pb2 import ConsistencyPoint, EntityRevision
from sqlalchemy import func, select

from services.runtime.clock import Clock
from services.runtime.database import (
    Database,
    DatabaseUnavailable,
    Reader,
    Statement,
    Tx,
    base,
    notices,
    open_database,
)
from services.runtime.database.postgres import PostgresDatabase
from services.runtime.spine.index import Entry, Index, IndexTable
from services.runtime.spine.outbox import COORDINATOR, Mark, Outbox
from services.runtime.spine.source import IndexSource
from services.runtime.spine.watch import EVERYBODY, Watch, watch
from tests.support.databases import Databases, Server
from tests.support.edges import TASK, cancelled, eventually, metadata, tasks

SCOPE = "org_1"
LISTENERS = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'"


class Process:
    """What a process has of a service, with one watcher."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.index = Index(database, [IndexTable(TASK, tasks, Task)], Clock())
        self.outbox = Outbox(database, Clock())
        self.seen: dict[str, int] = {}
        self.seqs: list[int] = []
        self.synced = asyncio.Event()

    async def put(self, entity_id: str, revision: int = 1) -> None:
        state = Task(id=entity_id, revision=revision)
        await self.database.write(self.index.put, Entry(TASK, SCOPE, entity_id, revision, state))

    async def watch(self) -> None:
        source = IndexSource(self.index, SCOPE, [TASK], EVERYBODY)
        async for frame in watch(source, Watch("topic", sight=source)):
            for change in frame.changes:
                self.seen[change.id] = change.revision
                self.seqs.append(change.change_seq)
            if frame.change_seq:
                self.synced.set()

    async def until_seen(self, *ids: str) -> float:
        """Wait until changes are seen; return how many seconds that took."""
        begun = time.monotonic()

        async def seen() -> bool:
            return self.seen.keys() >= set(ids)

        await eventually(seen)
        return time.monotonic() - begun


@pytest.fixture
def url(postgres: Server) -> str:
    return Databases("postgresql", postgres.folder, postgres).make(metadata)


@asynccontextmanager
async def process(url: str) -> AsyncGenerator[Process, None]:
    database = open_database(url)
    await database.start()
    made = Process(database)
    await made.index.start()
    await made.outbox.start()
    watching = asyncio.create_task(made.watch())
    try:
        yield made
    finally:
        await cancelled(watching)
        await database.close()


@pytest.fixture
async def two(url: str) -> AsyncGenerator[tuple[Process, Process], None]:
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(process(url))
        second = await stack.enter_async_context(process(url))
        await first.put("begin")
        for one in (first, second):
            await one.until_seen("begin")
        yield first, second


def cut_listeners(postgres: Server) -> None:
    with psycopg.connect(postgres.url, autocommit=True) as admin:
        admin.execute(LISTENERS)


async def test_a_commit_of_one_wakes_the_watchers_of_the_other_at_once(two: tuple[Process, Process]) -> None:
    first, second = two
    taken: list[float] = []
    for number in range(20):
        await first.put(f"t{number}")
        taken.append(await second.until_seen(f"t{number}"))
    assert min(taken) < 0.1
    assert sorted(taken)[10] < notices.LOOK_SECONDS / 2


async def test_both_write_the_same_scope_and_all_watchers_see_every_change(two: tuple[Process, Process]) -> None:
    """No position passes a change of the other process that was not delivered."""

    async def write(one: Process, name: str) -> None:
        for number in range(150):
            await one.put(f"{name}{number}")
            await asyncio.sleep(0.001 * (number % 3))

    await asyncio.gather(*(write(one, name) for one, name in zip(two, "ab", strict=True)))

    wanted = [f"{name}{number}" for name in "ab" for number in range(150)]
    for one in two:
        await one.until_seen(*wanted)
        assert one.seqs == sorted(set(one.seqs))


def tell_nobody(*_: object) -> None:
    return


async def test_what_no_notice_tells_is_looked_for(
    two: tuple[Process, Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = two
    monkeypatch.setattr(notices.Notices, "tell", tell_nobody)
    await first.put("untold")
    assert await second.until_seen("untold") < 2 * notices.LOOK_SECONDS

    async def wait() -> None:
        point = ConsistencyPoint(entities=[EntityRevision(kind=TASK, id="later", revision=3)])
        await second.index.await_point(point, SCOPE, "usr_1", wait_seconds=10)

    waiting = asyncio.create_task(wait())
    await asyncio.sleep(0.1)
    await first.put("later", 3)
    await waiting


async def test_a_mark_that_no_notice_tells_is_carried(
    two: tuple[Process, Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that marked it may have died behind its commit."""
    first, second = two
    line = second.outbox.line(COORDINATOR)
    reading = asyncio.create_task(line.take(1))
    await asyncio.sleep(0.1)  # the table is read, and empty
    monkeypatch.setattr(notices.Notices, "tell", tell_nobody)
    for name in ("untold", "untold, too"):
        await first.database.write(first.outbox.mark, [Mark(name, 1, Task(id="x"))])
        async with asyncio.timeout(4 * notices.LOOK_SECONDS):
            rows = await reading
        assert [row.entity_id for row in rows] == [name]
        reading = asyncio.create_task(line.take(1))
    await asyncio.sleep(3 * notices.LOOK_SECONDS)
    assert not reading.done()  # what was taken once is not taken again, although it is still in the table
    reading.cancel()


async def test_a_mark_whose_commit_is_not_answered_is_carried(
    two: tuple[Process, Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = two
    reading = asyncio.create_task(first.outbox.line(COORDINATOR).take(1))
    await asyncio.sleep(0.1)
    execute = psycopg.Connection.execute

    def unanswered(connection: Any, text: Any, *args: Any, **kwargs: Any) -> Any:
        found = execute(connection, text, *args, **kwargs)
        if text == "COMMIT":
            connection.close()
            raise psycopg.OperationalError("the connection was lost")
        return found

    with monkeypatch.context() as patched:
        patched.setattr(psycopg.Connection, "execute", unanswered)
        with pytest.raises(DatabaseUnavailable):
            await first.database.write(first.outbox.mark, [Mark("unanswered", 1, Task(id="x"))])
    async with asyncio.timeout(4 * notices.LOOK_SECONDS):
        assert [row.entity_id for row in await reading] == ["unanswered"]


async def test_a_server_that_many_read_from_for_long_answers(two: tuple[Process, Process]) -> None:
    database = two[0].database
    nap = Statement(select(func.pg_sleep(3).label("nap")))
    reading = [asyncio.create_task(database.read(Reader.rows, nap)) for _ in range(8)]
    await asyncio.sleep(0.2)
    async with asyncio.timeout(2):
        await database.ask()
    await asyncio.gather(*reading)


async def test_a_refused_transaction_is_forgotten_where_no_other_follows(
    two: tuple[Process, Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Tx) -> None:
        raise psycopg.errors.DiskFull("no room")

    monkeypatch.setattr(base, "REFUSING_SECONDS", 0.5)
    database = two[0].database
    with pytest.raises(DatabaseUnavailable):
        await database.write(fail)
    assert database.refusing
    await asyncio.sleep(0.6)
    assert not database.refusing


async def test_a_database_whose_server_is_away_closes_although_something_is_to_be_told(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: object) -> None:
        raise DatabaseUnavailable("it is away")

    monkeypatch.setattr(PostgresDatabase, "_send", away)
    database = open_database(url)
    await database.start()
    database.tell("topic", "subject", "word")
    await asyncio.sleep(0.1)
    async with asyncio.timeout(10):
        await database.close()


async def test_a_listener_that_is_refused_when_it_comes_back_tries_again(
    two: tuple[Process, Process], postgres: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[str] = []
    connect = notices.connect

    def connect_badly(url: str) -> psycopg.Connection[Any]:
        connection = connect(url)
        if len(refused) < 2:
            refused.append(url)
            connection.close()
        return connection

    async def listening() -> bool:
        with psycopg.connect(postgres.url) as admin:
            row = admin.execute("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'").fetchone()
        return len(refused) == 2 and row == (2,)

    monkeypatch.setattr(notices, "connect", connect_badly)
    cut_listeners(postgres)
    await eventually(listening)


async def test_a_listener_whose_connection_breaks_misses_nothing(
    two: tuple[Process, Process], postgres: Server
) -> None:
    first, second = two
    for number in range(3):
        cut_listeners(postgres)
        await first.put(f"cut{number}")
        await first.database.write(first.outbox.mark, [Mark(f"cut{number}", 1, Task(id="x"))])
        await second.until_seen(f"cut{number}")
    line = second.outbox.line(COORDINATOR)
    found: set[str] = set()
    async with asyncio.timeout(10):
        while len(found) < 3:
            found |= {row.entity_id for row in await line.take(10)}


async def test_who_carries_hears_of_marks_of_another_process(two: tuple[Process, Process]) -> None:
    first, second = two
    line = second.outbox.line(COORDINATOR)
    reading = asyncio.create_task(line.take(1))
    await asyncio.sleep(0.1)  # the table is read, and empty
    for number in range(5):
        await first.database.write(first.outbox.mark, [Mark(f"t{number}", 1, Task(id=f"t{number}"))])
        async with asyncio.timeout(10):
            rows = await reading
        assert [row.entity_id for row in rows] == [f"t{number}"]
        reading = asyncio.create_task(line.take(1))
    await asyncio.sleep(0.1)
    assert not reading.done()
    reading.cancel()


async def test_who_waits_for_an_entity_of_another_process_is_woken(two: tuple[Process, Process]) -> None:
    first, second = two
    waiting = second.index.hub.awaited(TASK, "nobody watches it")
    first.index.hub.announce(TASK, "nobody watches it")
    async with asyncio.timeout(10):
        await waiting.wait()
