"""One edge of the tree, child to coordinator to watcher: real gRPC, real SQLite, nothing lost."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from branchline.resource.v1 import watch_pb2
from branchline.resource.v1.session_pb2 import Session
from branchline.resource.v1.task_pb2 import Task
from branchline.spine.v1 import push_pb2, push_pb2_grpc
from google.protobuf.any_pb2 import Any
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import MetaData, create_engine

from services.runtime.clock import Clock
from services.runtime.database import Database, Transaction
from services.runtime.errors import DeadlineExceeded
from services.runtime.spine.index import Entry, Index, IndexTable
from services.runtime.spine.ingest import Handler, Ingest, Pushed, PushServicer, RejectedEntryError, each, handlers
from services.runtime.spine.outbox import Mark, Outbox
from services.runtime.spine.push import PushClient
from services.runtime.spine.tables import index_table, spine_tables
from services.runtime.spine.tokens import consistency_token, parse_consistency_token
from services.runtime.spine.watch import watch
from tests.support.stack import eventually, free_port

metadata = MetaData()
spine = spine_tables(metadata)
tasks = index_table("tasks", metadata, comment="Coordinator index of a test")
SCOPE = "org_1"


def database(path: Path) -> Database:
    path.parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(f"sqlite:///{path}")
    metadata.create_all(engine)
    engine.dispose()
    return Database(path)


@dataclass
class Coordinator:
    """The upper end of an edge; it can go away and come back on the same port with the same database."""

    path: Path
    port: int = field(default_factory=free_port)
    applied: list[tuple[str, int]] = field(default_factory=list)

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[Index, None]:
        store = database(self.path)
        index = Index(store, spine, [IndexTable("task", tasks, Task)], Clock())

        async def apply(tx: Transaction, pushed: Pushed[Task]) -> None:
            if pushed.state.title == "bad":
                raise RejectedEntryError("bad data")
            entry = Entry("task", SCOPE, pushed.id, pushed.revision, pushed.state, deleted=pushed.deleted)
            if await index.put(tx, entry):
                self.applied.append((pushed.id, pushed.revision))

        ingest = Ingest(store, handlers(Handler(Task, each(apply))))
        server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        push_pb2_grpc.add_PushServiceServicer_to_server(PushServicer(ingest), server)
        server.add_insecure_port(f"127.0.0.1:{self.port}")
        await server.start()
        applying = asyncio.create_task(ingest.run())
        try:
            yield index
        finally:
            await server.stop(None)
            await cancelled(applying)
            await store.close()


@dataclass
class Child:
    """The lower end of an edge."""

    database: Database
    outbox: Outbox

    async def change(self, *states: tuple[str, int], title: str = "fine", deleted: bool = False) -> None:
        async with self.database.transaction() as tx:
            marks = [
                Mark(name, revision, Task(id=name, revision=revision, title=title), deleted=deleted)
                for name, revision in states
            ]
            await self.outbox.mark(tx, marks)


@asynccontextmanager
async def child_of(coordinator: Coordinator, path: Path) -> AsyncGenerator[Child, None]:
    store = database(path)
    outbox = Outbox(store, spine, Clock())
    channel = grpc.aio.insecure_channel(
        f"127.0.0.1:{coordinator.port}", options=(("grpc.max_reconnect_backoff_ms", 200),)
    )
    pushing = asyncio.create_task(PushClient(outbox, lambda: push_pb2_grpc.PushServiceStub(channel), "child").run())
    try:
        yield Child(store, outbox)
    finally:
        await cancelled(pushing)
        await channel.close()
        await store.close()


async def cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})


async def empty(child: Child) -> bool:
    return await child.outbox.count(parked=False) == 0


async def held(index: Index) -> dict[str, int]:
    view = await index.view(SCOPE, ["task"])
    assert view is not None
    return {change.id: change.revision for change in view.changes if not change.deleted}


async def test_an_outage_costs_one_row_per_entity_and_the_newest_state_arrives(tmp_path: Path) -> None:
    coordinator = Coordinator(tmp_path / "coordinator.sqlite")
    async with child_of(coordinator, tmp_path / "child.sqlite") as child:
        for revision in range(1, 21):
            await child.change(("a", revision), ("b", revision))
        waiting = await child.outbox.count(parked=False)
        async with coordinator.running() as index:
            await eventually(lambda: empty(child))
            arrived = await held(index)

    assert waiting == 2
    assert arrived == {"a": 20, "b": 20}
    assert coordinator.applied == [("a", 20), ("b", 20)]


async def test_changes_go_on_through_restarts_of_the_coordinator(tmp_path: Path) -> None:
    coordinator = Coordinator(tmp_path / "coordinator.sqlite")
    async with child_of(coordinator, tmp_path / "child.sqlite") as child:

        async def work() -> None:
            for revision in range(1, 301):
                await child.change((f"t{revision % 7}", revision))

        working = asyncio.create_task(work())
        while not working.done():
            async with coordinator.running():
                await asyncio.sleep(0.1)
        async with coordinator.running() as index:
            await eventually(lambda: empty(child))
            arrived = await held(index)

    assert arrived == {f"t{revision % 7}": revision for revision in range(294, 301)}
    for name in arrived:
        revisions = [revision for entity, revision in coordinator.applied if entity == name]
        assert revisions == sorted(set(revisions))


async def test_a_bad_entry_is_parked_with_its_reason_and_its_neighbours_arrive(tmp_path: Path) -> None:
    coordinator = Coordinator(tmp_path / "coordinator.sqlite")
    async with child_of(coordinator, tmp_path / "child.sqlite") as child:
        await child.change(("a", 1))
        await child.change(("x", 1), title="bad")
        async with child.database.transaction() as tx:
            await child.outbox.mark(tx, [Mark("s", 1, Session(id="s"))])  # a type that this coordinator does not take
        await child.change(("b", 1))
        async with coordinator.running() as index:
            await eventually(lambda: empty(child))
            arrived = await held(index)
            parked = await child.outbox.count(parked=True)

    assert arrived == {"a": 1, "b": 1}
    assert parked == 2


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 9)), min_size=1, max_size=6), max_size=6),
)
async def test_duplicates_and_reorderings_leave_the_newest_revision(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[tuple[str, int]]]
) -> None:
    coordinator = Coordinator(tmp_path_factory.mktemp("reorder") / "coordinator.sqlite")
    wanted: dict[str, int] = {}
    async with coordinator.running() as index:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{coordinator.port}") as channel:
            call = push_pb2_grpc.PushServiceStub(channel).Push()
            for number, batch in enumerate(batches, start=1):
                entries = [
                    push_pb2.PushEntry(outbox_seq=place, id=name, revision=revision, state=packed(name, revision))
                    for place, (name, revision) in enumerate(batch)
                ]
                await call.write(push_pb2.PushRequest(child="child", batch=number, entries=entries))
                response = await call.read()
                assert (response.batch, list(response.rejected)) == (number, [])
                for name, revision in batch:
                    wanted[name] = max(revision, wanted.get(name, 0))
            call.cancel()
        assert await held(index) == wanted


def packed(name: str, revision: int) -> Any:
    state = Any()
    state.Pack(Task(id=name, revision=revision))
    return state


async def test_a_watcher_sees_the_snapshot_then_each_change_and_a_tombstone(tmp_path: Path) -> None:
    coordinator = Coordinator(tmp_path / "coordinator.sqlite")
    async with child_of(coordinator, tmp_path / "child.sqlite") as child, coordinator.running() as index:
        await child.change(("a", 1))
        await eventually(lambda: empty(child))
        frames = watch(index, SCOPE, "topic", ["task"], "")
        opening = [(await anext(frames)).frame for _ in range(3)]

        await child.change(("a", 2), deleted=True)
        change = (await anext(frames)).frame
        await frames.aclose()

    assert [frame.kind for frame in opening] == [
        watch_pb2.WATCH_FRAME_KIND_RESET,
        watch_pb2.WATCH_FRAME_KIND_SNAPSHOT,
        watch_pb2.WATCH_FRAME_KIND_SYNCED,
    ]
    assert [(one.id, one.revision, one.deleted) for one in change.changes] == [("a", 2, True)]


async def test_a_place_before_forgotten_tombstones_gives_a_reset(tmp_path: Path) -> None:
    coordinator = Coordinator(tmp_path / "coordinator.sqlite")
    async with child_of(coordinator, tmp_path / "child.sqlite") as child, coordinator.running() as index:
        await child.change(("a", 1), ("b", 1))
        await eventually(lambda: empty(child))
        frames = watch(index, SCOPE, "topic", ["task"], "")
        token = [(await anext(frames)).frame for _ in range(3)][-1].resume_token
        await frames.aclose()
        await child.change(("a", 2), deleted=True)
        await eventually(lambda: empty(child))

        missed = (await anext(watch(index, SCOPE, "topic", ["task"], token))).frame
        await index.compact(Clock().seconds() + 1)
        late = (await anext(watch(index, SCOPE, "topic", ["task"], token))).frame

    assert [(one.id, one.deleted) for one in missed.changes] == [("a", True)]
    assert late.kind == watch_pb2.WATCH_FRAME_KIND_RESET


async def test_a_consistency_token_waits_for_its_revision_and_not_for_ever(tmp_path: Path) -> None:
    coordinator = Coordinator(tmp_path / "coordinator.sqlite")
    point = parse_consistency_token(consistency_token([("task", "a", 2)]))
    async with child_of(coordinator, tmp_path / "child.sqlite") as child, coordinator.running() as index:
        await child.change(("a", 1))
        with pytest.raises(DeadlineExceeded):
            await index.await_point(point, 0.2)
        waiting = asyncio.create_task(index.await_point(point))
        await child.change(("a", 2))
        await asyncio.wait_for(waiting, 10)
