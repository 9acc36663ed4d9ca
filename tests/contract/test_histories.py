"""Random histories of one edge: whatever is cut, doubled, restarted, forgotten or slow, at rest all agree.

The owner's truth, the coordinator's index and what a watcher holds are compared at the end of each history. On the way
no revision goes backwards, and no position passes a change that the watcher has not been given.
"""

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from branchline.v1 import watches_pb2
from branchline.v1.tasks_pb2 import Task
from branchline_internal.spine.v1 import push_pb2
from branchline_internal.spine.v1.push_pb2 import WatchFrame
from google.protobuf.any_pb2 import Any as AnyState
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import bindparam, select

from services.runtime.database import Statement
from services.runtime.spine.hub import Hub
from services.runtime.spine.index import Index
from services.runtime.spine.tokens import parse_resume_token
from services.runtime.spine.watch import EVERYBODY, Page, Position, Watch, watch
from tests.support.databases import Databases
from tests.support.edges import SCOPE, TASK, Child, Coordinator, Proxy, eventually, metadata, running_child, tasks

TOPIC = "topic"
_UP_TO = Statement(
    select(tasks.c.id, tasks.c.revision, tasks.c.deleted).where(
        tasks.c.scope == SCOPE, tasks.c.change_seq <= bindparam("upto")
    )
)

Step = tuple[str, int, int]
STEPS: st.SearchStrategy[Step] = st.one_of(
    st.tuples(st.sampled_from(["change", "delete"]), st.integers(0, 2), st.integers(1, 3)),
    st.tuples(st.sampled_from(["burst", "pause"]), st.integers(0, 2), st.integers(1, 12)),
    st.tuples(
        st.sampled_from(
            [
                "cut",
                "restart coordinator",
                "crash child",
                "compact",
                "double",
                "stall",
                "go on",
                "leave",
                "go back",
                "settle",
            ]
        ),
        st.integers(0, 2),
        st.just(0),
    ),
)

View = dict[str, tuple[int, bool]]
"""The revision of every entity, and whether it is deleted."""


@dataclass(frozen=True)
class Source:
    """The index as a watch sees it."""

    index: Index

    @property
    def hub(self) -> Hub:
        return self.index.hub

    @property
    def scope(self) -> str:
        return SCOPE

    @property
    def live(self) -> bool:
        return True

    def catch_up(self, position: Position | None) -> AsyncIterator[Page]:
        return self.index.catch_up(SCOPE, [TASK], position, EVERYBODY)


@dataclass
class Watcher:
    """A client that holds what it was told, and comes back with its token."""

    coordinator: Coordinator
    view: View = field(default_factory=View)
    token: str = ""
    remembered: list[tuple[str, View]] = field(default_factory=list[tuple[str, View]])
    reads: asyncio.Event = field(default_factory=asyncio.Event)
    task: "asyncio.Task[None] | None" = None
    synced: bool = False
    wrong: list[str] = field(default_factory=list[str])

    def join(self) -> None:
        self.reads.set()
        self.task = asyncio.create_task(self._watch())

    async def leave(self) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.wait({self.task})
            if not self.task.cancelled() and (error := self.task.exception()):
                self.wrong.append(f"the watch broke: {error!r}")
        self.task, self.synced = None, False

    def go_back(self, which: int) -> None:
        if self.remembered:
            self.token, view = self.remembered[-1 - (3 * which) % len(self.remembered)]
            self.view = dict(view)

    async def _watch(self) -> None:
        begin = parse_resume_token(self.token, TOPIC)
        wanted = Watch(TOPIC, position=begin.position, heartbeat_seconds=0.02)
        async for frame in watch(Source(self.coordinator.index), wanted):
            await self.reads.wait()
            self._take(frame)
            if frame.resume_token:
                await self._check(frame.change_seq)
                self.token = frame.resume_token
                self.remembered.append((self.token, dict(self.view)))

    def _take(self, frame: WatchFrame) -> None:
        if frame.kind == watches_pb2.FRAME_KIND_RESET:
            self.view.clear()
            self.token = ""
        self.synced = self.synced or frame.kind == watches_pb2.FRAME_KIND_SYNCED
        for change in frame.changes:
            if change.revision < self.view.get(change.id, (0, False))[0]:
                self.wrong.append(f"{change.id} went back to revision {change.revision}")
            self.view[change.id] = (change.revision, change.type == watches_pb2.CHANGE_TYPE_DELETED)

    async def _check(self, position: int) -> None:
        """What is not newer than the position must have been delivered."""
        for row in await self.coordinator.database.read(lambda tx: tx.rows(_UP_TO, {"upto": position})):
            held = self.view.get(row.id, (0, True))
            if (row.deleted and held[1]) or held[0] >= row.revision:
                continue
            self.wrong.append(f"at position {position} there is {row.id} at {row.revision}, but it holds {held}")

    def live(self) -> dict[str, int]:
        return {name: revision for name, (revision, deleted) in self.view.items() if not deleted}


@dataclass
class World:
    """An owner, its coordinator, and a watcher of that, with what can happen to them."""

    child_url: str
    coordinator: Coordinator
    proxy: Proxy
    watcher: Watcher
    truth: View = field(default_factory=View)
    upper: AsyncExitStack = field(default_factory=AsyncExitStack)
    lower: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def start(self) -> None:
        await self.upper.enter_async_context(self.coordinator.running())
        self.child: Child = await self.lower.enter_async_context(running_child(self.child_url, self.proxy.address))
        self.watcher.join()

    async def stop(self) -> None:
        await self.watcher.leave()
        await self.lower.aclose()
        await self.upper.aclose()

    async def do(self, step: Step) -> None:
        what, number, count = step
        match what:
            case "change" | "delete":
                for _ in range(count):
                    await self._change(f"t{number}", deleted=what == "delete")
            case "burst":
                for k in range(count):
                    await self._change(f"t{(number + k) % 6}")
                await self._change("bad")
            case "pause":
                await asyncio.sleep(0.003 * count)
            case "cut":
                self.proxy.cut()
            case "restart coordinator":
                await self.watcher.leave()
                await self.upper.aclose()
                await self.upper.enter_async_context(self.coordinator.running())
            case "crash child":
                self.child.database._take_riding()  # pyright: ignore[reportPrivateUsage]
                await self.lower.aclose()
                self.child = await self.lower.enter_async_context(running_child(self.child_url, self.proxy.address))
            case "compact":
                await self.coordinator.index.compact()
            case "double":
                await self._double(f"t{number}")
            case "settle":
                await self._settle()
            case "stall":
                self.watcher.reads.clear()
            case "go on":
                self.watcher.reads.set()
            case "leave":
                await self.watcher.leave()
            case _:
                await self.watcher.leave()
                self.watcher.go_back(number)
                self.watcher.join()

    async def _change(self, name: str, *, deleted: bool = False) -> None:
        revision = self.truth.get(name, (0, False))[0] + 1
        await self.child.change((name, revision), deleted=deleted)
        self.truth[name] = (revision, deleted)

    async def _double(self, name: str) -> None:
        """Push an old state again, as after a lost acknowledgement."""
        revision, deleted = self.truth.get(name, (0, False))
        if revision < 2 or deleted:
            return
        state = AnyState()
        state.Pack(Task(id=name, revision=revision - 1))
        entry = push_pb2.PushEntry(outbox_seq=1, id=name, revision=revision - 1, state=state)
        await self.coordinator.ingest.submit(push_pb2.PushRequest(entries=[entry]))

    async def _settle(self) -> None:
        """Wait until the coordinator has everything."""

        async def pushed() -> bool:
            await self.child.database.write(lambda tx: None)
            self.child.database._ride_now()  # pyright: ignore[reportPrivateUsage]
            return (await self.child.outbox.counts())[0] == 0

        await eventually(pushed, 10)

    async def rest(self) -> None:
        self.watcher.reads.set()
        if self.watcher.task is None:
            self.watcher.join()

        async def watched() -> bool:
            return self.watcher.synced and self.watcher.live() == await self.coordinator.held()

        await self._settle()
        held = await self.coordinator.held()
        wanted = {name: revision for name, (revision, deleted) in self.truth.items() if not deleted and name != "bad"}
        assert held == wanted
        try:
            await eventually(watched, 5)
        except TimeoutError:
            assert self.watcher.live() == held
        assert not self.watcher.wrong


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.lists(STEPS, min_size=15, max_size=40))
async def test_at_rest_all_agree(databases: Databases, steps: list[Step]) -> None:
    with pytest.MonkeyPatch.context() as small:
        for name, value in {
            "index.PAGE_CHANGES": 3,
            "index.TOMBSTONE_SECONDS": -1.0,
            "outbox._PAGE_ROWS": 3,
            "outbox._LINE_ROWS": 5,
            "push.BATCH_ENTRIES": 2,
            "hub.PENDING_CHANGES": 4,
        }.items():
            small.setattr(f"services.runtime.spine.{name}", value)
        folder = Path(tempfile.mkdtemp(prefix="edge-"))
        coordinator = Coordinator(databases.make(metadata), folder / "c.sock", raises=ValueError("a bug"))
        proxy = Proxy(folder / "p.sock", coordinator.address)
        world = World(databases.make(metadata), coordinator, proxy, Watcher(coordinator))
        async with proxy.running():
            await world.start()
            try:
                for step in steps:
                    await world.do(step)
                await world.rest()
            finally:
                await world.stop()
