"""Watchers that the coordinator brings to the present: one that is older than the replica, many at once."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from branchline.v1.organizations_pb2 import WatchOrganizationResponse
from branchline.v1.watches_pb2 import FRAME_KIND_SYNCED as SYNCED
from branchline_internal.spine.v1.push_pb2 import WatchSelection

from gateway import replica as replicas
from gateway.frames import FrameWriter
from gateway.replica import Replica
from gateway.replica import View as Source
from services.runtime.database import Database, open_database
from services.runtime.errors import Unavailable
from services.runtime.spine.index import Index
from services.runtime.spine.tokens import parse_resume_token
from services.runtime.spine.watch import HEARTBEAT_SECONDS, Watch, watch
from tests.support.databases import copied, created
from tests.unit.gateway.backend import (
    ORGANIZATION_ID,
    Backend,
    Scope,
    View,
    as_new_as,
    eventually,
    follow,
    index_of,
    metadata,
    opened,
    task_entry,
)
from tests.unit.gateway.test_watch_model import Call

TOPIC = "topic"
WRITER = FrameWriter(WatchOrganizationResponse.DESCRIPTOR)
MANY = 60


@dataclass
class Coordinator:
    """An index as an upstream, without the wire."""

    database: Database
    index: Index
    asked: int = 0

    async def put(self, *states: tuple[str, int]) -> None:
        for name, revision in states:
            await self.database.write(self.index.put, task_entry(name, revision))

    def upstream(self, selection: WatchSelection) -> Call:
        self.asked += 1
        return Call(Scope(self.index, ORGANIZATION_ID, selection).frames(TOPIC))


@asynccontextmanager
async def coordinator(url: str) -> AsyncGenerator[Coordinator, None]:
    database = open_database(url)
    await database.start()
    index = index_of(database)
    await index.start()
    yield Coordinator(database, index)
    await database.close()


@dataclass
class Lives:
    """The same database twice: what the replica follows, and an older state of it, which answers watchers."""

    newer: Coordinator
    older: Coordinator
    replica: Replica

    async def watch(self) -> View:
        """Watch until synced."""
        view = View()
        source = Source(self.replica, self.older.upstream, "usr_1")
        async for frame in watch(source, Watch(TOPIC, until_synced=True)):
            view.take(WatchOrganizationResponse.FromString(WRITER.write(frame, HEARTBEAT_SECONDS)))
        return view


@pytest.fixture
async def lives(tmp_path: Path) -> AsyncIterator[Lives]:
    url = created(metadata, tmp_path / "newer.sqlite")
    async with coordinator(url) as first:
        await first.put(("a", 1))
    other = copied(url, tmp_path / "older.sqlite")
    async with coordinator(url) as newer, coordinator(other) as older:
        await newer.put(("a", 2), ("b", 1))
        replica = Replica(TOPIC, newer.upstream)
        following = asyncio.create_task(replica.follow())
        await replica.until_live()
        yield Lives(newer, older, replica)
        following.cancel()
        await asyncio.wait({following})


async def test_a_coordinator_older_than_the_replica_is_asked_again_until_it_is_not(lives: Lives) -> None:
    watching = asyncio.create_task(lives.watch())
    await eventually(lambda: lives.older.asked >= 3 or watching.done())
    assert not watching.done()
    await lives.older.put(("a", 2), ("b", 1))
    view = await watching

    assert lives.older.index.epoch == lives.newer.index.epoch
    assert view.held == {"a": 2, "b": 1}
    assert view.kinds.count(1) == 1  # one reset: what the older state showed was no error, only old
    place = parse_resume_token(view.token, TOPIC).position
    assert lives.replica.ring is not None
    assert place == lives.replica.ring.position


async def test_a_coordinator_that_stays_older_is_said_not_to_answer(
    lives: Lives, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "READY_SECONDS", 0.3)

    with pytest.raises(Unavailable):
        await lives.watch()
    assert lives.older.asked >= 2


@dataclass
class Asked(Backend):
    """A backend that notes how many watchers wait for its first answer at the same moment, and when each asked."""

    hold_seconds: float = 0.0
    asking: int = 0
    most_asking: int = 0
    times: list[float] = field(default_factory=list[float])

    async def WatchIndex(self, request: Any, context: Any) -> AsyncIterator[Any]:
        if not request.selection.tail:
            self.times.append(asyncio.get_running_loop().time())
            self.asking += 1
            self.most_asking = max(self.most_asking, self.asking)
            await asyncio.sleep(self.hold_seconds)
            self.asking -= 1
        async for response in super().WatchIndex(request, context):
            yield response


async def reset_all(backend: Asked) -> None:
    """Have many watchers, and then another life of the coordinator's database."""
    views = [View() for _ in range(MANY)]
    async with backend.gateway(), backend.client() as client:
        async with backend.running():
            await backend.put(task_entry("old", 1))
            following = [asyncio.create_task(follow(opened(client), view)) for view in views]
            await eventually(lambda: all(SYNCED in view.kinds for view in views))
        backend.url = created(metadata, backend.folder / "another.sqlite")
        await backend.put_unheard(task_entry("new", 1))
        backend.most_asking, backend.times = 0, []
        async with backend.running():
            await eventually(lambda: all(view.held == {"new": 1} for view in views))
        for task in following:
            task.cancel()


async def test_after_a_reset_a_bounded_number_of_watchers_asks_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "_SPREAD_SECONDS", 0.0)
    backend = Asked(tmp_path, hold_seconds=0.05)

    await reset_all(backend)

    assert len(backend.times) >= MANY
    assert 1 < backend.most_asking <= replicas._TURNS  # pyright: ignore[reportPrivateUsage]


async def test_after_a_reset_watchers_ask_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "_TURNS", 10 * MANY)
    monkeypatch.setattr(replicas, "_SPREAD_SECONDS_EACH", 0.03)
    backend = Asked(tmp_path)

    await reset_all(backend)

    assert backend.times[-1] - backend.times[0] > 0.9  # of 1.8 seconds


async def test_a_watcher_that_waits_for_a_point_holds_up_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "_TURNS", 1)
    backend = Backend(tmp_path)
    async with backend.running(), backend.gateway(), backend.client() as client:
        await backend.put(task_entry("a", 1))
        waits, fine = View(), View()
        waiting = asyncio.create_task(follow(opened(client, consistency=as_new_as("a", 1000)), waits))
        await eventually(lambda: any(one.consistency.at_least_as_fresh for one in backend.selections))
        following = asyncio.create_task(follow(opened(client), fine))
        await eventually(lambda: fine.held == {"a": 1}, 5)
        waiting.cancel()
        following.cancel()

    assert waits.held == {}
