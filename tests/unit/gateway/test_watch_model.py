"""The one watch over a replica against a model: upstreams cut, queues that overflow, tombstones forgotten. API-4."""

import asyncio
import itertools
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
import pytest_asyncio
from branchline.v1.tasks_pb2 import TaskFilter
from branchline.v1.watches_pb2 import CHANGE_TYPE_UPSERTED, FRAME_KIND_RESET
from branchline_internal.spine.v1.push_pb2 import WatchFrame, WatchSelection
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway import replica as replicas
from gateway.replica import Replica
from gateway.replica import View as Source
from gateway.ring import Ring
from gateway.selection import OrganizationView, task_matcher
from services.runtime.clock import Clock
from services.runtime.database import Database, open_database
from services.runtime.spine import hub
from services.runtime.spine.index import Entry, Index
from services.runtime.spine.tokens import Position, parse_resume_token
from services.runtime.spine.watch import Watch, watch
from tests.support.databases import created
from tests.unit.gateway.backend import Scope, index_of, metadata, state_entry, task_entry

TOPIC = "topic"
NAMES = [f"e{n}" for n in range(6)]
USERS = ("u1", "u2")


@dataclass
class Call:
    """An upstream call without the wire: `cut` breaks it as a lost connection does."""

    frames: AsyncGenerator[WatchFrame, None]
    broken: asyncio.Event = field(default_factory=asyncio.Event)

    async def read(self) -> Any:
        reading = asyncio.ensure_future(anext(self.frames, grpc.aio.EOF))
        breaking = asyncio.ensure_future(self.broken.wait())
        try:
            await asyncio.wait({reading, breaking}, return_when=asyncio.FIRST_COMPLETED)
            if self.broken.is_set():
                raise ConnectionError("the connection was cut")
            frame = reading.result()
        finally:
            for task in (reading, breaking):
                task.cancel()
            await asyncio.wait({reading, breaking})
        return _Response(frame) if isinstance(frame, WatchFrame) else frame

    def cancel(self) -> None:
        self.broken.set()


@dataclass
class _Response:
    frame: WatchFrame


@dataclass
class Client:
    """A watching client: what it holds, every place that it was given, and whether each place was true."""

    viewer: str
    held: dict[str, int] = field(default_factory=dict[str, int])
    places: list[tuple[str, dict[str, int]]] = field(default_factory=list[tuple[str, dict[str, int]]])
    reading: asyncio.Event = field(default_factory=asyncio.Event)
    task: "asyncio.Task[None] | None" = None


class World:
    """One scope of a real index, a replica of it, and clients of that."""

    numbers = itertools.count()

    def __init__(self, index: Index, database: Database, clock: "Time") -> None:
        self.index, self.database, self.clock = index, database, clock
        self.scope = f"scope_{next(self.numbers)}"
        self.log: list[tuple[int, str, int, bool, str]] = []
        self.calls: list[Call] = []
        self.revisions: dict[str, int] = {}
        self.replica = Replica(TOPIC, self.upstream, lambda position: Ring(position, 4))
        self.clients: list[Client] = []

    def upstream(self, selection: WatchSelection) -> Call:
        call = Call(Scope(self.index, self.scope, selection).frames(TOPIC))
        self.calls.append(call)
        return call

    def cut(self) -> None:
        for call in self.calls:
            call.cancel()
        self.calls.clear()

    async def put(self, place: int, *, deleted: bool) -> None:
        name = NAMES[place]
        revision = self.revisions[name] = self.revisions.get(name, 0) + 1
        viewer = USERS[place] if place < len(USERS) else ""
        entry = state_entry(name, revision, viewer) if viewer else task_entry(name, revision, deleted=deleted)
        entry = Entry(entry.kind, self.scope, name, revision, entry.state, viewer_id=viewer, deleted=deleted)
        await self.database.write(self.index.put, entry)
        self.log.append((len(self.log) + 1, name, revision, deleted, viewer))

    def start(self, viewer: str, token: str, held: dict[str, int]) -> Client:
        client = Client(viewer, held)
        client.reading.set()
        client.task = asyncio.create_task(self.run(client, token))
        self.clients.append(client)
        return client

    async def run(self, client: Client, token: str) -> None:
        """Watch for ever, through every break, as a client does."""
        while True:
            source = Source(self.replica, self.upstream, client.viewer)
            begin = parse_resume_token(token, TOPIC)
            sight = OrganizationView(client.viewer, (), task_matcher(TaskFilter()), begin.position is not None)
            frames = watch(source, Watch(TOPIC, position=begin.position, sight=sight))
            with suppress(ConnectionError):
                async for frame in frames:
                    token = frame.resume_token or token
                    self.take(client, frame)
                    await client.reading.wait()
            await frames.aclose()
            await asyncio.sleep(0)

    def take(self, client: Client, frame: WatchFrame) -> None:
        if frame.kind == FRAME_KIND_RESET:
            client.held.clear()
        for change in frame.changes:
            assert change.viewer_id in ("", client.viewer)
            if change.type != CHANGE_TYPE_UPSERTED:
                client.held.pop(change.id, None)
            else:
                client.held[change.id] = change.revision
        position = parse_resume_token(frame.resume_token, TOPIC).position
        if position is not None:
            self.check(client, position)
            client.places.append((frame.resume_token, dict(client.held)))

    def check(self, client: Client, position: Position) -> None:
        """Everything up to the position was delivered, or something newer in its place."""
        then = {
            name: (revision, deleted)
            for seq, name, revision, deleted, viewer in self.log
            if seq <= position.change_seq and viewer in ("", client.viewer)
        }
        for name, (revision, deleted) in then.items():
            held = client.held.get(name, 0)
            went_later = any(one[1] == name and one[2] > revision and one[3] for one in self.log)
            if deleted:
                assert held == 0 or held > revision, (name, held, revision)
            else:
                assert held >= revision or (held == 0 and went_later), (name, held, revision)

    def present(self, viewer: str) -> dict[str, int]:
        now = {one[1]: one for one in self.log if one[4] in ("", viewer)}
        return {name: revision for name, (_, _, revision, deleted, _) in now.items() if not deleted}


class Time:
    """A clock that tests move."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def index(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[tuple[Index, Database, Time], None]:
    database = open_database(created(metadata, tmp_path_factory.mktemp("model") / "index.sqlite"))
    await database.start()
    time = Time()
    made = index_of(database)
    made._clock = Clock(now=lambda: time.now)  # pyright: ignore[reportPrivateUsage]
    await made.start()
    yield made, database, time
    await database.close()


step = st.one_of(
    st.tuples(st.just("put"), st.integers(0, len(NAMES) - 1)),
    st.tuples(st.just("put"), st.integers(0, len(NAMES) - 1)),
    st.tuples(st.just("delete"), st.integers(0, len(NAMES) - 1)),
    st.tuples(st.just("burst"), st.integers(4, 12)),
    st.tuples(st.just("cut"), st.just(0)),
    st.tuples(st.just("watch"), st.integers(0, 1)),
    st.tuples(st.just("return"), st.integers(0, 50)),
    st.tuples(st.just("stop reading"), st.integers(0, 5)),
    st.tuples(st.just("read on"), st.integers(0, 5)),
    st.tuples(st.just("compact"), st.just(0)),
    st.tuples(st.just("reborn"), st.just(0)),
    st.tuples(st.just("pause"), st.integers(1, 20)),
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.lists(step, max_size=30))
async def test_every_view_is_true_at_every_place_and_equal_at_rest(
    index: tuple[Index, Database, Time], monkeypatch: pytest.MonkeyPatch, steps: list[tuple[str, int]]
) -> None:
    monkeypatch.setattr(hub, "PENDING_CHANGES", 3)
    monkeypatch.setattr(replicas, "_REJOIN_SECONDS", 0.001)
    monkeypatch.setattr(replicas, "Backoff", Hasty)
    world = World(*index)
    following = asyncio.create_task(world.replica.follow())
    world.start("u1", "", {})
    try:
        for what, number in steps:
            await do(world, what, number)
        for client in world.clients:
            client.reading.set()
        async with asyncio.timeout(10):
            while any(client.held != world.present(client.viewer) for client in world.clients):
                await asyncio.sleep(0.002)
                for client in world.clients:
                    if client.task is not None and client.task.done():
                        client.task.result()
    finally:
        tasks = [following, *(client.task for client in world.clients if client.task is not None)]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    for task in tasks:
        assert task.cancelled() or task.exception() is None, task.exception()


class Hasty:
    """A backoff that waits for nothing."""

    def __init__(self, **_: float) -> None:
        pass

    def next_seconds(self) -> float:
        return 0.0

    def reset(self) -> None:
        pass


async def do(world: World, what: str, number: int) -> None:
    if what in {"put", "delete"}:
        await world.put(number, deleted=what == "delete")
    elif what == "burst":
        for place in range(number):
            await world.put(place % len(NAMES), deleted=False)
    elif what == "cut":
        world.cut()
    elif what == "watch":
        world.start(USERS[number], "", {})
    elif what == "return":
        client = world.clients[number % len(world.clients)]
        if client.places:
            token, held = client.places[number % len(client.places)]
            world.start(client.viewer, token, dict(held))
    elif what in {"stop reading", "read on"}:
        reading = world.clients[number % len(world.clients)].reading
        reading.clear() if what == "stop reading" else reading.set()
    elif what == "compact":
        world.clock.now += timedelta(days=2)
        await world.index.compact()
    elif what == "reborn":
        world.index.epoch += "+"
        world.cut()
    else:
        for _ in range(number):
            await asyncio.sleep(0.001)


def test_the_model_sees_a_place_that_passed_a_change() -> None:
    world = object.__new__(World)
    world.log = [(1, "e3", 1, False, ""), (2, "e4", 1, False, "")]

    with pytest.raises(AssertionError):
        world.check(Client("u1", {"e4": 1}), Position("epoch", 2))
