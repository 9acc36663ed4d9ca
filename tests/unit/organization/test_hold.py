"""An organization with 100,000 tasks beside one with ten: what is done for the small one does not see the large one."""

import asyncio
import sqlite3
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, closing
from pathlib import Path
from typing import Any

import pytest
from branchline.v1 import tasks_pb2
from branchline.v1.common_pb2 import ENTITY_KIND_TASK
from branchline_internal.spine.v1.push_pb2 import ConsistencyPoint

from services.runtime.database.sqlite import SqliteDatabase
from services.runtime.spine.tokens import Position
from tests.support.databases import migrated_file
from tests.unit.organization.conftest import Room, call_as, open_room, summary

LARGE, SMALL = "org_large", "org_small"
TASKS = 100_000
FEW = 10
CROWD = 200
ORDERS = ("update_time desc", "create_time desc", "title")

_SEED = f"""
WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {TASKS})
INSERT INTO task_summaries (scope, id, revision, change_seq, change_time, deleted, payload, viewer_id, task_id,
    repository_id, title, search, state, activity, ended, owner_user_id, has_pull_request, create_time, update_time)
SELECT '{LARGE}', 'large_' || n, 1, n, 0.0, 0, zeroblob(100), '', '',
    'repo_' || (n % 7), 'Task ' || n, 'task ' || n, 2, 1, 0, 'usr_1', 0, n, n
FROM numbers
"""
_SEQUENCE = f"INSERT INTO change_sequences (scope, value, horizon) VALUES ('{LARGE}', {TASKS}, 0)"

Work = Callable[[Room], Awaitable[object]]


def seed(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(_SEED)
        connection.execute(_SEQUENCE)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the database of organizations of which one is large."""
    folder = tmp_path_factory.mktemp("large")
    migrated_file("organization", folder)
    seed(folder / "organization.sqlite")
    return folder / "organization.sqlite"


@pytest.fixture
async def beside(large: Path) -> AsyncGenerator[Room, None]:
    """Run the room in which a small organization is beside a large one."""
    opened = await open_room(f"sqlite:///{large}", large.parent)
    yield opened
    await opened.database.close()


async def add_few(room: Room) -> None:
    await room.push(*((summary(SMALL, f"repo_{number % 7}", number), False) for number in range(FEW)))


async def list_tasks(room: Room, order_by: str) -> None:
    request = tasks_pb2.ListTasksRequest(organization_id=SMALL, order_by=order_by, page_size=5)
    answer = await room.tasks.ListTasks(request, None)  # type: ignore[arg-type]
    assert len(answer.tasks) == 5


async def open_watch(room: Room, position: Position | None = None) -> None:
    pages = [page async for page in room.stores.index.catch_up(SMALL, [ENTITY_KIND_TASK], position, "usr_1")]
    assert sum(len(page.changes) for page in pages) == FEW


async def change(room: Room) -> None:
    assert not await room.push((summary(SMALL, "repo_3", 3, revision=2), False))


async def await_change(room: Room) -> None:
    point = ConsistencyPoint()
    point.entities.add(kind=ENTITY_KIND_TASK, id="task_000003", revision=1)
    await room.stores.index.await_point(point, SMALL, "usr_1", 5.0)


async def find_route(room: Room) -> None:
    assert await room.database.read(room.stores.tasks.route, "task_000003") == (SMALL, "repo_3")


WORK: dict[str, Work] = {
    **{f"list by {order}": lambda room, order=order: list_tasks(room, order) for order in ORDERS},
    "open a watch": open_watch,
    "resume a watch": lambda room: open_watch(room, Position(room.stores.index.epoch, 0)),
    "await a change": await_change,
    "find a task": find_route,
    "change a task": change,
}


async def steps(room: Room, work: Work) -> int:
    """Return how many instructions SQLite runs for something, on all connections."""
    taken = 0

    def count() -> int:
        nonlocal taken
        taken += 1
        return 0

    database = room.database
    assert isinstance(database, SqliteDatabase)
    connections: list[Any] = [database._writer, *database._readers]  # pyright: ignore[reportPrivateUsage]
    for connection in connections:
        connection.driver.raw.set_progress_handler(count, 1)
    await work(room)
    for connection in connections:
        connection.driver.raw.set_progress_handler(None, 1)
    return taken


async def all_steps(room: Room) -> dict[str, int]:
    """Return the steps of everything that is done for the small organization."""
    await add_few(room)
    call_as("usr_1", SMALL)
    await change(room)  # statements are compiled the first time
    return {name: await steps(room, work) for name, work in WORK.items()}


async def test_no_read_or_write_of_a_small_organization_takes_a_step_for_a_large_one(
    beside: Room, tmp_path: Path
) -> None:
    room = await open_room(migrated_file("organization", tmp_path), tmp_path)
    alone = await all_steps(room)
    await room.database.close()

    assert await all_steps(beside) == alone
    assert all(alone.values())


async def test_an_organization_that_very_many_open_at_once_takes_turns_with_another(beside: Room) -> None:
    await add_few(beside)
    begun: list[tuple[str, bool]] = []
    """Each read in the order in which they began: its scope, and whether one of the small organization's ran then."""

    running: list[str] = []
    most = 0
    index, database = beside.stores.index, beside.database
    unobserved = database.read

    async def observed(fn: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal most
        begun.append((args[0], SMALL in running))
        running.append(args[0])
        most = max(most, len(running))
        try:
            return await unobserved(fn, *args, **kwargs)
        finally:
            running.remove(args[0])

    async def open_first_page(scope: str) -> None:
        pages: Any = index.catch_up(scope, [ENTITY_KIND_TASK], None, "usr_1")
        async with aclosing(pages):
            async for page in pages:
                if page.changes:
                    return

    beside.database.read = observed  # type: ignore[method-assign]
    crowd = [asyncio.create_task(open_first_page(LARGE)) for _ in range(CROWD)]
    await asyncio.sleep(0)
    before = len(begun)
    await open_first_page(SMALL)
    between = begun[before:]
    await asyncio.gather(*crowd)

    mine = between.count((SMALL, False))
    # while one of mine waits: the one whose turn is next, one beside it; and as many before it asks
    assert between.count((LARGE, False)) <= 4 * mine
    assert [scope for scope, _ in begun].count(LARGE) == CROWD * mine
    assert most == 2  # of four readers
