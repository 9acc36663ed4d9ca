"""Work goes on while something befalls one container; afterwards all that was acknowledged is there, and all agree.

One installation for all of them. Each fault is one test, and one row of the table that is printed at the end.
"""

import asyncio
import itertools
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import pytest_asyncio
from branchline.v1.history_pb2 import HistoryEvent
from branchline.v1.sessions_pb2 import Session
from branchline.v1.tasks_pb2 import Task
from branchline.v1.transcripts_pb2 import TranscriptEntry
from google.protobuf.message import Message

from tests.compose.installation import OWNERS, Composed, composed
from tests.compose.work import git_repository, organization_of
from tests.support.books import (
    Books,
    broken_promises,
    disagreements,
    settled,
    watch_tasks,
    wrong_endings,
    wrong_numbers,
)
from tests.support.client import Client
from tests.support.databases import look_into
from tests.support.people import Person
from tests.support.views import View

PEOPLE = 2
BEFORE_SECONDS, AFTER_SECONDS = 4.0, 4.0

pytestmark = pytest.mark.timeout(600)

Fault = Callable[[Composed], Awaitable[None]]


async def restarted(installation: Composed, service: str) -> None:
    """Wait until a service that Docker starts again is healthy."""
    await asyncio.to_thread(installation.until_healthy, service)


def killed(service: str) -> Fault:
    async def befall(installation: Composed) -> None:
        await asyncio.to_thread(installation.crash, service)
        await restarted(installation, service)

    return befall


def replaced(service: str) -> Fault:
    """The container goes, and another of another image takes its place."""

    async def befall(installation: Composed) -> None:
        await asyncio.to_thread(installation.replace_image, service)

    return befall


async def paused(installation: Composed) -> None:
    async with installation.paused("repository"):
        await asyncio.sleep(8)
    await restarted(installation, "repository")


async def cut_off(installation: Composed) -> None:
    async with installation.cut_off("task"):
        await asyncio.sleep(8)
    await restarted(installation, "task")


async def restarted_in_order(installation: Composed) -> None:
    await asyncio.to_thread(installation.compose, "restart", "postgres")
    await well(installation)


async def filled(installation: Composed) -> None:
    """The server may end for want of room, and is started again until there is some."""
    async with installation.disk_full():
        await asyncio.sleep(8)
    await well(installation)


async def well(installation: Composed) -> None:
    """Wait until PostgreSQL and all that live on it are healthy."""
    for name in ("postgres", *OWNERS):
        await restarted(installation, name)


FAULTS: dict[str, Fault] = {
    **{f"kill {name}": killed(name) for name in (*OWNERS, "gateway")},
    "pause repository": paused,
    "task off its network and back": cut_off,
    "kill postgres": killed("postgres"),
    "restart postgres": restarted_in_order,
    "fill the disk of postgres": filled,
    **{f"replace image of {name}": replaced(name) for name in (*OWNERS, "gateway")},
}


@dataclass
class Row:
    """What became of one fault."""

    fault: str
    seconds: float
    """From the fault until everything was healthy again."""

    settled_seconds: float
    """From the end of the work until nothing was under way."""

    acknowledged: int
    tasks: int
    problems: list[str] = field(default_factory=list[str])


@pytest.fixture(scope="module")
def installation(images: None) -> Iterator[Composed]:
    with composed(Path(__file__).with_name("small-disk.yaml")) as made, made.disk_held():
        yield made


@pytest.fixture(scope="module")
def table() -> Iterator[list[Row]]:
    rows: list[Row] = []
    yield rows
    print(f"\n{'fault':34} {'healthy':>8} {'settled':>8} {'messages':>8} {'tasks':>6}  wrong")  # noqa: T201
    for row in rows:
        figures = f"{row.seconds:7.1f}s {row.settled_seconds:7.1f}s {row.acknowledged:8} {row.tasks:6}"
        print(f"{row.fault:34} {figures}  {len(row.problems) or 'nothing'}")  # noqa: T201


@pytest_asyncio.fixture
async def views(client: Client) -> AsyncGenerator[tuple[list[View], list[View]], None]:
    """Watchers of everything, open through the fault."""
    organization_id = await organization_of(client)
    tasks = [View("organization", client.watch_organization(organization_id)).open()]
    feeds = [View("history", client.watch_history(organization_id)).open()]
    yield tasks, feeds
    for view in (*tasks, *feeds):
        await view.close()


_numbers = itertools.count(1)


@pytest.mark.parametrize("name", FAULTS)
async def test_what_was_acknowledged_outlives_a_fault(
    installation: Composed, client: Client, views: tuple[list[View], list[View]], table: list[Row], name: str
) -> None:  # OPS-2, OPS-3, API-4, SES-7
    organization_id, repository_id = await organization_of(client), await git_repository(client)
    enough, acknowledged = asyncio.Event(), asyncio.Event()
    people = [
        Person(client, organization_id, repository_id, random.Random(f"{name}/{number}"), _numbers, acknowledged)
        for number in range(PEOPLE)
    ]
    task_views: dict[str, View] = {}
    watching = asyncio.create_task(watch_tasks(client, people, task_views))
    at_work = [asyncio.create_task(person.work(enough)) for person in people]
    async with asyncio.timeout(60):
        await acknowledged.wait()
    await asyncio.sleep(BEFORE_SECONDS)
    began = time.monotonic()
    await FAULTS[name](installation)
    seconds = time.monotonic() - began
    await asyncio.sleep(AFTER_SECONDS)
    enough.set()
    stopped = time.monotonic()
    await asyncio.gather(*at_work)
    books = Books(installation)
    await settled(books)
    rested = time.monotonic() - stopped
    watching.cancel()

    problems = [f"stuck: {words}" for person in people for words in person.stuck]
    problems += [*broken_promises(books, people), *wrong_endings(books), *wrong_numbers(books)]
    problems += await disagreements(client, organization_id, books, *views, task_views)
    problems += list(different_indexes(installation))
    for view in task_views.values():
        await view.close()
    promises = sum(len(person.promises) for person in people)
    table.append(Row(name, seconds, rested, promises, sum(len(person.tasks) for person in people), problems))
    assert not problems, "\n".join(problems)


def different_indexes(installation: Composed) -> Iterator[str]:
    """Compare owners with indexes by SQL, as the superuser sees them."""
    pairs = (
        (("task", "tasks", "id"), ("repository", "task_details", "id"), Task),
        (("task", "task_workbench_sessions", "session_id"), ("repository", "session_index", "id"), Session),
        (("task", "transcript_entries", "id"), ("repository", "transcript_entries", "id"), TranscriptEntry),
        (("history", "events", "id"), ("organization", "history_feed", "id"), HistoryEvent),
    )
    for owner, index, kind in pairs:
        owned, indexed = _held(installation, *owner, kind), _held(installation, *index, kind)
        if owned != indexed:
            one, other = " ".join(owner), " ".join(index)
            unlike = [key for key in owned if owned[key] != indexed.get(key)]
            yield f"{one} has {len(owned)}, {other} {len(indexed)}; unlike: {unlike}"


def _held(installation: Composed, service: str, table: str, key: str, kind: type[Message]) -> dict[str, Message]:
    """Return what a table holds, as messages: the order of a map's entries in their bytes means nothing."""
    alive = " WHERE NOT deleted" if service in ("repository", "organization") else ""
    rows = look_into(installation.database(service), f"SELECT {key}, payload FROM {table}{alive}")
    return {str(row[0]): kind.FromString(bytes(row[1])) for row in rows}
