"""One edge of the tree, child to coordinator to watcher, on both databases over real gRPC: nothing lost or stuck."""

import asyncio
import gc
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from branchline.v1 import errors_pb2
from branchline.v1.common_pb2 import Consistency
from branchline.v1.sessions_pb2 import Session
from branchline.v1.tasks_pb2 import Task
from branchline.v1.watches_pb2 import CHANGE_TYPE_DELETED
from branchline_internal.admin.v1 import admin_pb2
from branchline_internal.spine.v1 import push_pb2, push_pb2_grpc
from google.protobuf.any_pb2 import Any as AnyState
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from services.runtime.admin import AdminServicer
from services.runtime.clock import Clock
from services.runtime.database import Database, DatabaseUnavailable, Reader, Statement, open_database
from services.runtime.errors import FailedPrecondition, ResourceExhausted, Unavailable
from services.runtime.principal import OPERATOR, Principal, bind_principal
from services.runtime.spine import outbox as outbox_module
from services.runtime.spine.chunks import PART_BYTES
from services.runtime.spine.courier import BatchCourier, Courier
from services.runtime.spine.index import Entry, Index, IndexTable
from services.runtime.spine.ingest import Ingest, RejectedEntryError
from services.runtime.spine.outbox import COORDINATOR, STATE_BYTES, Mark, Outbox, OutboxRow
from services.runtime.spine.tokens import consistency_token, parse_consistency
from tests.support.databases import Databases
from tests.support.edges import TASK, Child, Coordinator, Proxy, cancelled, eventually, metadata, running_child, tasks

SCOPE = "org_1"


@pytest.fixture
def coordinator(databases: Databases, tmp_path: Path) -> Coordinator:
    return Coordinator(databases.make(metadata), tmp_path / "c.sock")


@pytest.fixture
def child_url(databases: Databases) -> str:
    return databases.make(metadata)


async def pending(outbox: Outbox) -> int:
    return (await outbox.counts())[0]


async def delivered(child: Child) -> bool:
    """Say whether nothing waits. What has arrived is forgotten with the next write."""
    await child.database.write(lambda tx: None)
    child.database._ride_now()  # pyright: ignore
    return await pending(child.outbox) == 0


# The edge.


async def test_an_outage_costs_one_row_per_entity_and_the_newest_state_arrives(
    coordinator: Coordinator, child_url: str
) -> None:
    async with running_child(child_url, coordinator.address) as child:
        for revision in range(1, 21):
            await child.change(("a", revision), ("b", revision))
        waiting = await pending(child.outbox)
        async with coordinator.running():
            await eventually(lambda: delivered(child))
            arrived = await coordinator.held()

    assert waiting == 2
    assert arrived == {"a": 20, "b": 20}
    assert coordinator.applied == [("a", 20), ("b", 20)]


async def test_changes_go_on_through_restarts_of_the_coordinator_and_cuts_at_any_moment(
    coordinator: Coordinator, child_url: str, tmp_path: Path
) -> None:
    proxy = Proxy(tmp_path / "p.sock", coordinator.address)
    async with proxy.running(), running_child(child_url, proxy.address) as child:

        async def work() -> None:
            for revision in range(1, 301):
                await child.change((f"t{revision % 7}", revision))

        working = asyncio.create_task(work())
        for round_ in range(6):
            async with coordinator.running():
                for _ in range(4):
                    await asyncio.sleep(0.01 + 0.007 * round_)
                    proxy.cut()
        await working
        async with coordinator.running():
            await eventually(lambda: delivered(child))
            arrived = await coordinator.held()

    assert arrived == {f"t{revision % 7}": revision for revision in range(294, 301)}
    for name in arrived:
        revisions = [revision for entity, revision in coordinator.applied if entity == name]
        assert revisions == sorted(set(revisions))


async def test_reconnecting_leaves_no_task_behind(
    coordinator: Coordinator, child_url: str, tmp_path: Path
) -> None:  # F24
    proxy = Proxy(tmp_path / "p.sock", coordinator.address)
    async with proxy.running(), coordinator.running(), running_child(child_url, proxy.address) as child:
        await child.change(("a", 1))
        await eventually(lambda: delivered(child))
        gc.collect()
        before = len(asyncio.all_tasks())
        for revision in range(2, 22):
            proxy.cut()
            await child.change(("a", revision))
            await eventually(lambda: delivered(child))
        await asyncio.sleep(0.05)
        gc.collect()
        after = len(asyncio.all_tasks())

    assert proxy.connections >= 20
    assert after <= before + 2


async def test_a_child_stops_though_its_stream_breaks_at_the_same_moment(
    coordinator: Coordinator, child_url: str, tmp_path: Path
) -> None:  # F25
    proxy = Proxy(tmp_path / "p.sock", coordinator.address)
    async with proxy.running(), coordinator.running():
        for revision in range(1, 41):
            async with running_child(child_url, proxy.address) as child:
                await child.change(("a", revision))
                await asyncio.sleep(0.002 * (revision % 5))
                proxy.cut()
                await asyncio.sleep(0.0002 * revision)
                child.pushing.cancel()
                await asyncio.wait({child.pushing}, timeout=5)
                assert child.pushing.done()


async def test_a_database_that_fails_on_either_side_stops_no_loop(
    coordinator: Coordinator, child_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # F3
    failing = {"child": 0, "coordinator": 0}

    def fails(database: Database, name: str, which: str) -> None:
        real = getattr(database, which)

        async def sometimes(*args: Any, **kwargs: Any) -> Any:
            if failing[name] and args[0].__qualname__ in {"_read_pending", "Ingest._apply", "_park"}:
                failing[name] -= 1
                raise DatabaseUnavailable("injected")
            return await real(*args, **kwargs)

        monkeypatch.setattr(database, which, sometimes)

    async with coordinator.running(), running_child(child_url, coordinator.address) as child:
        fails(child.database, "child", "read")
        fails(child.database, "child", "write")
        fails(coordinator.database, "coordinator", "write")
        for revision in range(1, 6):
            failing["child"], failing["coordinator"] = 2, 2
            child.outbox.line(COORDINATOR).fall_behind()
            await child.change(("a", revision), ("bad", revision))
            await eventually(lambda: delivered(child))
        assert await coordinator.held() == {"a": 5}
        assert (await child.outbox.counts()) == (0, 1)
        assert not child.pushing.done()


@pytest.mark.parametrize("raised", [RejectedEntryError("bad"), ValueError("any bug"), KeyError("another"), None])
async def test_whatever_a_handler_raises_parks_its_entry_alone(
    coordinator: Coordinator, child_url: str, raised: Exception | None
) -> None:  # F9
    coordinator.raises = raised  # None: the database's own, a key that is taken
    async with running_child(child_url, coordinator.address) as child:
        await child.change(*((f"a{k}", 1) for k in range(20)), ("bad", 1), *((f"b{k}", 1) for k in range(20)))
        await child.database.write(child.outbox.mark, [Mark("s", 1, Session(id="s"))])  # a type that is not taken
        async with coordinator.running():
            await eventually(lambda: delivered(child))
            arrived = await coordinator.held()
            counts = await child.outbox.counts()
            reasons = {row.entity_id: row.parked_reason for row in await parked(child.outbox)}

            coordinator.raises = RejectedEntryError("still")
            coordinator.bad = "nothing"
            assert await child.outbox.retry([]) == 2
            await eventually(lambda: delivered(child))
            assert "bad" in await coordinator.held()

    assert len(arrived) == 40
    assert counts == (0, 2)
    assert "takes no" in reasons["s"]
    assert reasons["bad"]


async def parked(outbox: Outbox) -> list[Any]:
    return await outbox.listed(parked=True, destination="", after_seq=0, most=100)


async def test_an_outage_of_the_coordinators_database_parks_nothing(
    coordinator: Coordinator, child_url: str
) -> None:  # F9
    coordinator.raises = DatabaseUnavailable("it is full")
    async with running_child(child_url, coordinator.address) as child, coordinator.running():
        await child.change(("a", 1), ("bad", 1))
        await asyncio.sleep(0.3)
        before = await child.outbox.counts(), await coordinator.held()
        coordinator.raises, coordinator.bad = None, "nothing"
        await eventually(lambda: delivered(child))

        assert before == ((2, 0), {})
        assert await coordinator.held() == {"a": 1, "bad": 1}


async def test_large_states_travel_in_small_batches(
    coordinator: Coordinator, child_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # F22
    sizes: list[int] = []
    submit = Ingest.submit

    def measured(self: Ingest, request: push_pb2.PushRequest) -> Any:
        sizes.append(sum(entry.ByteSize() for entry in request.entries))
        return submit(self, request)

    monkeypatch.setattr(Ingest, "submit", measured)
    async with running_child(child_url, coordinator.address) as child:
        for k in range(20):
            await child.change((f"t{k}", 1), title="x" * 400_000)
        async with coordinator.running():
            await eventually(lambda: delivered(child))
            assert len(await coordinator.held()) == 20

    assert max(sizes) < 1_100_000
    assert len(sizes) >= 8


async def test_a_state_that_no_edge_could_carry_is_refused_where_it_is_made(database: Database) -> None:  # F22
    outbox = Outbox(database, Clock())
    large = Mark("t", 1, Task(id="t", title="x" * STATE_BYTES))

    with pytest.raises(ResourceExhausted):
        await database.write(outbox.mark, [mark("a", 1), large])

    assert await outbox.counts() == (0, 0)


async def test_a_page_of_parked_rows_is_bounded_whatever_their_reasons_say(database: Database) -> None:  # F22
    outbox, count = Outbox(database, Clock()), 400
    await database.write(outbox.mark, [mark(f"t{k}", 1) for k in range(count)])
    for row in await taken(outbox, count, forget=False):
        await outbox.park(row, "\N{GRINNING FACE}" * 2000)
    bind_principal(Principal(service=OPERATOR))
    request, pages, seen = admin_pb2.ListOutboxRequest(parked=True, page_size=1000), 0, set[int]()

    while (page := await AdminServicer(outbox).ListOutbox(request, cast("Any", None))).rows:
        assert page.ByteSize() < PART_BYTES + 64 * 1024
        seen |= {row.seq for row in page.rows}
        pages, request.after_seq = pages + 1, page.rows[-1].seq

    assert (len(seen), pages) == (count, 4)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 9)), min_size=1, max_size=6), max_size=6))
async def test_duplicates_and_reorderings_leave_the_newest_revision(
    databases: Databases, tmp_path: Path, batches: list[list[tuple[str, int]]]
) -> None:
    coordinator = Coordinator(databases.make(metadata), tmp_path / "c.sock")
    wanted: dict[str, int] = {}
    async with coordinator.running(), grpc.aio.insecure_channel(coordinator.address) as channel:
        call: Any = push_pb2_grpc.PushServiceStub(channel).Push()
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
        assert await coordinator.held() == wanted


def packed(name: str, revision: int) -> AnyState:
    state = AnyState()
    state.Pack(Task(id=name, revision=revision))
    return state


# The outbox's line.


def mark(entity: str, revision: int = 1, *, to: str = COORDINATOR, title: str = "") -> Mark:
    return Mark(entity, revision, Task(id=entity, revision=revision, title=title), destination=to)


async def taken(
    outbox: Outbox, count: int, *, forget: bool = True, to: str = COORDINATOR, most: int = 100
) -> list[OutboxRow]:
    rows: list[OutboxRow] = []
    async with asyncio.timeout(10):
        while len(rows) < count:
            more = await outbox.line(to).take(most)
            if forget:
                outbox.arrived(more)
            rows += more
    return rows


def brief(rows: list[OutboxRow]) -> list[tuple[str, int]]:
    return [(row.entity_id, row.revision) for row in rows]


async def test_a_line_hands_out_the_newest_of_each_in_order_from_memory_and_from_the_table(database: Database) -> None:
    outbox = Outbox(database, Clock())
    for entity, revision in (("a", 1), ("b", 1), ("a", 2)):
        await database.write(outbox.mark, [mark(entity, revision)])

    from_table = brief(await taken(outbox, 2, forget=False))
    line = outbox.line(COORDINATOR)
    assert not line.waiting
    for entity, revision in (("c", 1), ("d", 1), ("c", 2)):
        await database.write(outbox.mark, [mark(entity, revision)])
    from_memory = brief(await taken(outbox, 2, forget=False))
    line.fall_behind()
    again = brief(await taken(outbox, 4))

    assert from_table == [("b", 1), ("a", 2)]
    assert from_memory == [("d", 1), ("c", 2)]
    assert again == [*from_table, *from_memory]


async def test_a_row_that_is_marked_again_on_its_way_outlives_the_old_acknowledgement(database: Database) -> None:
    outbox = Outbox(database, Clock())
    await database.write(outbox.mark, [mark("a", 1)])
    (old,) = await taken(outbox, 1, forget=False)
    await database.write(outbox.mark, [mark("a", 2)])
    outbox.arrived([old])
    await database.write(lambda tx: None)

    assert brief(await taken(outbox, 1, forget=False)) == [("a", 2)]
    restarted = Outbox(database, Clock())
    assert brief(await taken(restarted, 1)) == [("a", 2)]


async def test_what_is_marked_while_the_table_is_read_is_not_lost(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "_PAGE_ROWS", 7)
    outbox = Outbox(database, Clock())
    await database.write(outbox.mark, [mark(f"old{k:03}") for k in range(100)])
    outbox.line(COORDINATOR)
    found: list[OutboxRow] = []

    async def work() -> None:
        for k in range(100):
            await database.write(outbox.mark, [mark(f"new{k:03}"), mark(f"old{k:03}", 2)])
        await database.write(outbox.mark, [mark("end")])

    working = asyncio.create_task(work())
    while not found or found[-1].entity_id != "end":
        found += await taken(outbox, 1)
    await working
    found.pop()
    newest = {row.entity_id: row.revision for row in found}

    assert newest == {f"old{k:03}": 2 for k in range(100)} | {f"new{k:03}": 1 for k in range(100)}
    for entity in newest:
        revisions = [row.revision for row in found if row.entity_id == entity]
        assert revisions == sorted(set(revisions))


async def test_what_is_committed_behind_the_back_of_a_look_at_the_table_is_not_lost(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox, looked, go_on = Outbox(database, Clock()), threading.Event(), threading.Event()
    await database.write(outbox.mark, [mark("early")])
    read_pending = outbox_module._read_pending  # pyright: ignore[reportPrivateUsage]

    def slowly(tx: Reader, destination: str, after: int) -> tuple[list[OutboxRow], bool]:
        page = read_pending(tx, destination, after)
        looked.set()
        go_on.wait(10)
        return page

    monkeypatch.setattr(outbox_module, "_read_pending", slowly)
    taking = asyncio.create_task(taken(outbox, 2))
    await asyncio.to_thread(looked.wait, 10)
    await database.write(outbox.mark, [mark("late")])
    go_on.set()

    assert brief(await taking) == [("early", 1), ("late", 1)]


async def test_a_line_that_is_not_emptied_is_bounded_and_loses_nothing(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "_LINE_ROWS", 20)
    monkeypatch.setattr(outbox_module, "_PAGE_ROWS", 8)
    outbox = Outbox(database, Clock())
    await database.write(outbox.mark, [mark("first")])
    assert brief(await taken(outbox, 1)) == [("first", 1)]
    line: Any = outbox.line(COORDINATOR)
    most = 0
    for k in range(150):
        await database.write(outbox.mark, [mark(f"t{k:03}")])
        most = max(most, len(line._rows.values()) + len(line._late.values()))

    found = await taken(outbox, 150)

    assert most <= 21
    assert brief(found) == [(f"t{k:03}", 1) for k in range(150)]


async def test_new_rows_are_numbered_behind_old_ones_although_the_clock_was_set_back(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await database.write(Outbox(database, Clock()).mark, [mark("a"), mark("b")])
    monkeypatch.setattr(outbox_module.time, "time_ns", lambda: 1)
    outbox = Outbox(database, Clock())
    await outbox.start()
    first = await taken(outbox, 1, most=1)

    await database.write(outbox.mark, [mark("b", 2)])

    assert brief([*first, *await taken(outbox, 1)]) == [("a", 1), ("b", 2)]


async def test_a_row_committed_late_with_an_early_number_is_carried(database: Database) -> None:
    """As on PostgreSQL, where transactions commit in another order than they began."""
    outbox = Outbox(database, Clock())
    line = outbox.line(COORDINATOR)
    early = OutboxRow(5, COORDINATOR, "type", "early", 1, deleted=False, payload=b"")
    await database.write(outbox.mark, [mark(f"t{k}") for k in range(3)])
    assert len(await line.take(2)) == 2

    line.put([early])

    assert [row.entity_id for row in await taken(outbox, 2)] == ["t2", "early"]


async def test_waiting_for_a_delivery_ends_with_it_or_with_the_time(database: Database) -> None:
    outbox = Outbox(database, Clock())
    await database.write(outbox.mark, [mark("a", to="below")])
    waiting = [asyncio.create_task(outbox.await_delivery("below", "a", 10)) for _ in range(2)]
    async with asyncio.timeout(5):
        await outbox.await_delivery("below", "a", 0.01)
        outbox.arrived(await outbox.line("below").take(1))
        await asyncio.gather(*waiting)

    assert not outbox._awaited  # pyright: ignore[reportPrivateUsage]


# Couriers.


@asynccontextmanager
async def carrying(courier: Courier | BatchCourier) -> AsyncGenerator[None, None]:
    running = asyncio.create_task(courier.run())
    try:
        yield
        assert not running.done()
    finally:
        await cancelled(running)


async def test_an_entity_that_hangs_delays_nobody(database: Database) -> None:  # F10
    outbox = Outbox(database, Clock())
    got: list[str] = []

    async def deliver(row: OutboxRow) -> None:
        if row.entity_id.startswith("hang"):
            await asyncio.Event().wait()
        got.append(row.entity_id)

    async with carrying(Courier(outbox, "below", deliver, deadline_seconds=1.0, attempts=1000)):
        await database.write(outbox.mark, [mark(f"hang{k}", to="below") for k in range(60)])
        async with asyncio.timeout(0.9):  # less than the deadline: behind none of them
            await database.write(outbox.mark, [mark(f"fine{k}", to="below") for k in range(50)])
            await until(lambda: len(got) == 50)
        await database.write(outbox.mark, [mark(f"hang{k}", to="below") for k in range(60, 120)])
        await asyncio.sleep(2.2)  # all have failed once, and wait among themselves
        async with asyncio.timeout(0.9):
            await database.write(outbox.mark, [mark(f"more{k}", to="below") for k in range(50)])
            await until(lambda: len(got) == 100)


async def test_deliveries_keep_the_order_of_an_entity_and_only_its_newest_state_waits(database: Database) -> None:
    outbox = Outbox(database, Clock())
    got: list[int] = []
    go_on = asyncio.Event()

    async def deliver(row: OutboxRow) -> None:
        got.append(row.revision)
        await go_on.wait()

    courier = Courier(outbox, "below", deliver)
    async with carrying(courier):
        await database.write(outbox.mark, [mark("a", 1, to="below")])
        await until(lambda: got == [1])
        for revision in range(2, 50):
            await database.write(outbox.mark, [mark("a", revision, to="below", title="x" * 1000)])
        outbox.line("below").fall_behind()  # what is being delivered is not begun again
        await asyncio.sleep(0.05)
        assert len(courier._lanes["a"]) <= 2  # pyright: ignore[reportPrivateUsage]
        go_on.set()
        await until(lambda: got == [1, 49])
        await asyncio.sleep(0.05)

    assert got == [1, 49]
    assert courier._bytes == 0  # pyright: ignore[reportPrivateUsage]


async def until(look: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not look():  # noqa: ASYNC110 - what is looked at tells nobody
            await asyncio.sleep(0.005)


async def test_what_is_refused_is_parked_at_once_and_what_fails_after_some_attempts(database: Database) -> None:
    outbox = Outbox(database, Clock())
    tries: dict[str, int] = {}

    async def deliver(row: OutboxRow) -> None:
        tries[row.entity_id] = tries.get(row.entity_id, 0) + 1
        if row.entity_id == "refused":
            raise FailedPrecondition(errors_pb2.ERROR_REASON_RESOURCE_NOT_FOUND, "never")
        if row.entity_id == "poison":
            raise ValueError("a bug")
        if row.entity_id == "away" and tries["away"] < 5:
            raise Unavailable(errors_pb2.ERROR_REASON_OVERLOADED, "not now")

    async with carrying(Courier(outbox, "below", deliver, attempts=3)):
        names = ("refused", "poison", "away", "fine")
        await database.write(outbox.mark, [mark(name, to="below") for name in names])
        await eventually(lambda: both(outbox, parked_count=2))
        await until(lambda: tries.get("away") == 5)
    rows = {row.entity_id: row for row in await parked(outbox)}

    assert (tries["refused"], tries["poison"], tries["fine"]) == (1, 3, 1)
    assert {name: row.attempts for name, row in rows.items()} == {"refused": 1, "poison": 3}
    assert "a bug" in rows["poison"].parked_reason


async def both(outbox: Outbox, *, parked_count: int) -> bool:
    return (await outbox.counts())[1] == parked_count


async def test_a_batch_courier_keeps_the_order_and_parks_the_one_to_blame(database: Database) -> None:
    outbox = Outbox(database, Clock())
    got: list[str] = []
    fails = {
        "refused": FailedPrecondition(errors_pb2.ERROR_REASON_RESOURCE_NOT_FOUND, "no"),
        "poison": ValueError("a bug"),
    }
    outage = [Unavailable(errors_pb2.ERROR_REASON_OVERLOADED, "not now")] * 4

    async def deliver(rows: Any) -> None:
        if outage:
            raise outage.pop()
        for row in rows:
            if row.entity_id in fails:
                raise fails[row.entity_id]
        got.extend(row.entity_id for row in rows if row.entity_id not in got)

    wanted = [f"e{k:02}" for k in range(30)]
    names = [*wanted[:10], "refused", *wanted[10:20], "poison", *wanted[20:]]
    async with carrying(BatchCourier(outbox, "history", deliver, attempts=3, linger_seconds=0.001)):
        await database.write(outbox.mark, [mark(name, to="history") for name in names])
        await until(lambda: len(got) == 30)
        await eventually(lambda: both(outbox, parked_count=2))

    assert got == wanted
    assert {row.entity_id for row in await parked(outbox)} == {"refused", "poison"}


# The index.


async def opened_index(databases: Databases, clock: Clock | None = None) -> tuple[Database, Index]:
    database = open_database(databases.make(metadata))
    await database.start()
    index = Index(database, [IndexTable(TASK, tasks, Task)], clock or Clock())
    await index.start()
    return database, index


def entry(name: str, revision: int, scope: str = SCOPE, *, deleted: bool = False) -> Entry:
    return Entry(TASK, scope, name, revision, Task(id=name, revision=revision), deleted=deleted)


async def test_numbers_have_no_doubles_and_nobody_hears_of_an_older_revision_behind_a_newer(
    databases: Databases,
) -> None:
    """Also with many writers at once: taking the scope's number first makes them take turns."""
    database, index = await opened_index(databases)
    heard: list[tuple[str, int, int]] = []
    publish = index.hub.publish

    def listen(scope: str, changes: Any) -> None:
        heard.extend((change.id, change.revision, change.change_seq) for change in changes)
        publish(scope, changes)

    index.hub.publish = listen  # type: ignore[method-assign]
    jobs = [(f"t{k % 3}", 1 + (k * 7) % 40) for k in range(120)]
    with index.hub.watcher(SCOPE):
        await asyncio.gather(*(database.write(index.put, entry(*job)) for job in jobs))
    await database.close()

    seqs = [seq for _, _, seq in heard]
    assert seqs == sorted(set(seqs))
    for name in ("t0", "t1", "t2"):
        revisions = [revision for entity, revision, _ in heard if entity == name]
        assert revisions == sorted(set(revisions))
        assert revisions[-1] == max(revision for entity, revision in jobs if entity == name)


async def test_of_a_batch_the_newer_states_alone_are_stored_whatever_they_change(
    databases: Databases,
) -> None:
    database, index = await opened_index(databases)
    await database.write(index.put_many, [entry(name, 5) for name in ("same", "leaves", "shown", "old", "lost")])
    batch = [
        entry("same", 6),
        entry("leaves", 6, deleted=True),
        entry("shown", 6)._replace(viewer_id="user_1"),
        entry("old", 5),
        entry("lost", 4, deleted=True),
        entry("new", 1),
    ]
    stored = await database.write(index.put_many, batch)
    columns = Statement(select(tasks.c.id, tasks.c.revision, tasks.c.deleted, tasks.c.viewer_id))
    rows = await database.read(lambda tx: tx.rows(columns))
    await database.close()

    assert [one.id for one in stored] == ["same", "leaves", "shown", "new"]
    assert sorted(tuple(row) for row in rows) == [
        ("leaves", 6, True, ""),
        ("lost", 5, False, ""),
        ("new", 1, False, ""),
        ("old", 5, False, ""),
        ("same", 6, False, ""),
        ("shown", 6, False, "user_1"),
    ]


async def test_a_snapshot_read_page_by_page_while_rows_change_and_are_forgotten_ends_with_the_truth(
    databases: Databases, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.runtime.spine.index.PAGE_CHANGES", 10)
    monkeypatch.setattr("services.runtime.spine.index.TOMBSTONE_SECONDS", -1.0)
    database, index = await opened_index(databases)
    await database.write(index.put_many, [entry(f"t{k:03}", 1) for k in range(60)])
    view: dict[str, int] = {}
    pages = resets = 0
    async for page in index.catch_up(SCOPE, [TASK], None, ""):
        if page.reset:
            view.clear()
            resets += 1
        for change in page.changes:
            assert change.revision >= view.get(change.id, 0)
            view[change.id] = change.revision
            if change.type == CHANGE_TYPE_DELETED:
                del view[change.id]
        pages += 1
        if pages == 3:
            await database.write(index.put_many, [entry(f"t{k:03}", 2, deleted=True) for k in (1, 25, 55)])
            await index.compact()
        if pages == 5:
            await database.write(index.put_many, [entry("new", 1), entry("t002", 2), entry("t040", 2)])
    await database.close()

    wanted = {f"t{k:03}": 1 for k in range(60) if k not in {1, 25, 55}} | {"new": 1, "t002": 2, "t040": 2}
    assert view == wanted
    assert resets == 2  # what was forgotten in the middle cannot be told otherwise


async def test_an_index_knows_its_database_and_no_other(databases: Databases) -> None:
    database, index = await opened_index(databases)
    again = Index(database, [IndexTable(TASK, tasks, Task)], Clock())
    await again.start()
    other_database, other = await opened_index(databases)

    assert index.epoch == again.epoch != other.epoch
    await database.close()
    await other_database.close()


async def test_a_consistency_token_waits_for_its_revision_in_the_callers_scope_alone(
    databases: Databases,
) -> None:  # F31
    database, index = await opened_index(databases)
    token = consistency_token([(TASK, "a", 2)])
    point = parse_consistency(Consistency(at_least_as_fresh=[token])).point
    await database.write(index.put, entry("a", 7, "org_2"))
    await database.write(index.put, entry("a", 1))

    with pytest.raises(Unavailable) as refused:
        await index.await_point(point, SCOPE, "user", 0.3)
    waiting = asyncio.create_task(index.await_point(point, SCOPE, "user", 10))
    await asyncio.sleep(0.02)
    assert not waiting.done()
    await database.write(index.put, entry("a", 2))
    async with asyncio.timeout(5):
        await waiting
        await index.await_point(point, "org_2", "user", 10)
    await database.close()

    assert refused.value.reason == "INDEX_BEHIND"
    told = f"{refused.value} {refused.value.metadata}"
    assert "7" not in told
    assert "org_2" not in told
