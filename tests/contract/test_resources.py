"""Resources kept as payloads, on both databases."""

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

import pytest
import pytest_asyncio
from branchline.v1.common_pb2 import ENTITY_KIND_TASK
from branchline.v1.tasks_pb2 import Task
from sqlalchemy import BigInteger, Column, LargeBinary, MetaData, String, Table

from services.runtime.database import Database, Tx, open_database
from services.runtime.errors import NotFound
from services.runtime.spine.resources import Resources
from tests.support.databases import Databases

metadata = MetaData()
tasks = Table(
    "tasks",
    metadata,
    Column("id", String, primary_key=True),
    Column("branch", String, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("payload", LargeBinary, nullable=False),
)


def columns(task: Task) -> dict[str, Any]:
    return {"id": task.id, "branch": task.branch}


TASKS = Resources(tasks, Task, ENTITY_KIND_TASK, columns)
OF_BRANCH = TASKS.by("branch", where=(tasks.c.revision > 0,), order="revision", limit=2)


@pytest_asyncio.fixture
async def database(databases: Databases) -> AsyncGenerator[Database, None]:
    opened = open_database(databases.make(metadata))
    await opened.start()
    yield opened
    await opened.close()


def task(name: str, revision: int = 1, branch: str = "main", title: str = "") -> Task:
    return Task(id=name, revision=revision, branch=branch, title=title)


async def test_a_state_is_kept_unless_what_is_held_is_as_new(database: Database) -> None:
    def work(tx: Tx) -> list[bool]:
        return [
            TASKS.put(tx, task("a", 2, title="first")),
            TASKS.put(tx, task("a", 2, title="same")),
            TASKS.put(tx, task("a", 1, title="older")),
            TASKS.put(tx, task("a", 3, branch="dev", title="newer")),
        ]

    stored = await database.write(work)

    assert stored == [True, False, False, True]
    assert await database.read(TASKS.get, "a") == task("a", 3, branch="dev", title="newer")


async def test_what_is_not_there_is_none_or_not_found(database: Database) -> None:
    assert await database.read(TASKS.find, "x") is None
    with pytest.raises(NotFound) as missing:
        await database.read(TASKS.get, "x")

    assert (missing.value.kind, missing.value.name) == ("task", "x")


async def test_many_are_put_found_by_their_columns_and_removed(database: Database) -> None:
    given = [task("a", 3), task("b", 1), task("c", 2), task("d", 1, branch="dev")]
    await database.write(TASKS.put_many, given)

    def look(tx: Any) -> tuple[list[str], list[str], list[str]]:
        by = [found.id for found in OF_BRANCH(tx, branch="main")]
        many = sorted(found.id for found in TASKS.find_many(tx, ["a", "d", "x"]))
        return by, many, [found.id for found in OF_BRANCH(tx, branch="none")]

    assert await database.read(look) == (["b", "c"], ["a", "d"], [])
    assert [await database.write(TASKS.delete, "b"), await database.write(TASKS.delete, "b")] == [True, False]
    assert await database.read(TASKS.find, "b") is None


async def test_no_change_of_what_was_taken_is_lost(database: Database) -> None:
    await database.write(TASKS.put, task("a"))

    def add(tx: Tx) -> None:
        taken = TASKS.take(tx, "a")
        time.sleep(0.01)  # so that transactions that run side by side would meet
        taken.title += "x"
        taken.revision += 1
        TASKS.put(tx, taken)

    await asyncio.gather(*(database.write(add) for _ in range(8)))

    assert await database.read(TASKS.get, "a") == task("a", 9, title="x" * 8)
    with pytest.raises(NotFound):
        await database.write(TASKS.take, "b")
