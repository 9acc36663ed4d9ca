"""Couriers: an entity that cannot be reached holds up no other, and what ails the receiver is no entity's fault."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import grpc
import pytest
from branchline.v1 import errors_pb2
from branchline.v1.errors_pb2 import ErrorReason
from branchline.v1.sessions_pb2 import Session
from branchline.v1.tasks_pb2 import Task
from grpc_status import rpc_status

from services.runtime.clock import Clock
from services.runtime.database import Database
from services.runtime.errors import DomainError, Unavailable
from services.runtime.spine import courier as courier_module
from services.runtime.spine import waits as waits_module
from services.runtime.spine.courier import Courier
from services.runtime.spine.outbox import Mark, Outbox, OutboxRow
from tests.support.edges import cancelled, eventually

OF_THE_RECEIVER = (
    errors_pb2.ERROR_REASON_NOT_READY,
    errors_pb2.ERROR_REASON_DRAINING,
    errors_pb2.ERROR_REASON_OVERLOADED,
    errors_pb2.ERROR_REASON_INDEX_UNREACHABLE,
    errors_pb2.ERROR_REASON_DATABASE_BUSY,
    errors_pb2.ERROR_REASON_DATABASE_UNAVAILABLE,
)


@pytest.fixture
def outbox(database: Database, monkeypatch: pytest.MonkeyPatch) -> Outbox:
    monkeypatch.setattr(courier_module, "_PAUSES_UNAVAILABLE", (0.05, 0.2))
    return Outbox(database, Clock())


def mark(entity_id: str, revision: int = 1) -> Mark:
    return Mark(entity_id, revision, Task(id=entity_id, revision=revision), destination="below")


def other(entity_id: str, revision: int = 1) -> Mark:
    return Mark(entity_id, revision, Session(id=entity_id), destination="below")


def as_called(error: DomainError) -> grpc.aio.AioRpcError:
    """Return an error as it comes out of a call."""
    status = rpc_status.to_status(error.to_status())
    trailers = grpc.aio.Metadata(*status.trailing_metadata)
    return grpc.aio.AioRpcError(status.code, grpc.aio.Metadata(), trailers, details=status.details)


def unreachable() -> grpc.aio.AioRpcError:
    return as_called(Unavailable(errors_pb2.ERROR_REASON_SANDBOX_UNREACHABLE, "its machine does not answer"))


@asynccontextmanager
async def carrying(courier: Courier) -> AsyncGenerator[None, None]:
    running = asyncio.create_task(courier.run())
    try:
        yield
        assert not running.done()
    finally:
        await cancelled(running)


async def until(look: Callable[[], bool], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not look():  # noqa: ASYNC110 - what is looked at tells nobody
            await asyncio.sleep(0.005)


async def test_thousands_of_entities_that_cannot_be_reached_stop_no_other(outbox: Outbox) -> None:
    tries = Counter[str]()

    async def deliver(row: OutboxRow) -> None:
        tries[row.entity_id] += 1
        if row.entity_id.startswith("away"):
            raise unreachable()

    courier = Courier(outbox, "below", deliver, attempts=1000)
    async with carrying(courier):
        await outbox.database.write(outbox.mark, [mark(f"away{k}") for k in range(2500)])
        await until(lambda: len(tries) == 2500)
        for k in range(20):
            await outbox.database.write(outbox.mark, [mark(f"fine{k}")])
            await until(lambda k=k: tries[f"fine{k}"] == 1, 2)
        assert len(courier._lanes) < 64  # pyright: ignore[reportPrivateUsage]

    assert max(tries.values()) > 1


async def test_what_is_left_of_many_that_could_not_be_reached_arrives_once_it_can(outbox: Outbox) -> None:
    away, got = True, set[str]()

    async def deliver(row: OutboxRow) -> None:
        if away:
            raise unreachable()
        got.add(row.entity_id)

    courier = Courier(outbox, "below", deliver, attempts=1000)
    async with carrying(courier):
        await outbox.database.write(outbox.mark, [mark(f"e{k}") for k in range(300)])
        await asyncio.sleep(0.3)
        away = False
        await until(lambda: len(got) == 300)
        await until(lambda: not courier._lanes)  # pyright: ignore[reportPrivateUsage]

    assert courier._bytes == 0  # pyright: ignore[reportPrivateUsage]


async def test_an_entity_that_cannot_be_reached_is_parked_after_its_attempts(outbox: Outbox) -> None:
    tries = Counter[str]()

    async def deliver(row: OutboxRow) -> None:
        tries[row.entity_id] += 1
        raise unreachable()

    async with carrying(Courier(outbox, "below", deliver, attempts=4)):
        await outbox.database.write(outbox.mark, [mark("a"), mark("b")])
        await eventually(lambda: _parked(outbox, 2))

    rows = await outbox.listed(parked=True, destination="below", after_seq=0, most=10)
    assert tries == {"a": 4, "b": 4}
    assert [(row.attempts, row.parked_reason) for row in rows] == [(4, "its machine does not answer")] * 2


async def _counted(outbox: Outbox, attempts: int) -> bool:
    return (await outbox.listed(parked=False, destination="below", after_seq=0, most=1))[0].attempts >= attempts


async def _parked(outbox: Outbox, count: int) -> bool:
    return (await outbox.counts())[1] == count


async def test_attempts_are_counted_over_a_restart(outbox: Outbox) -> None:
    tries = 0

    async def deliver(_: OutboxRow) -> None:
        nonlocal tries
        tries += 1
        raise unreachable()

    await outbox.database.write(outbox.mark, [mark("a")])
    async with carrying(Courier(outbox, "below", deliver, attempts=5)):
        await until(lambda: tries == 3)
    outbox.database._ride_now()  # pyright: ignore[reportPrivateUsage]
    await eventually(lambda: _counted(outbox, 2))
    before = tries
    again = Outbox(outbox.database, Clock())
    async with carrying(Courier(again, "below", deliver, attempts=5)):
        await eventually(lambda: _parked(again, 1))

    assert tries - before <= 3


@pytest.mark.parametrize("reason", [None, *OF_THE_RECEIVER])
async def test_what_ails_the_receiver_is_counted_against_nobody(
    outbox: Outbox, reason: ErrorReason.ValueType | None
) -> None:
    tries = 0

    async def deliver(_: OutboxRow) -> None:
        nonlocal tries
        tries += 1
        if tries > 4:
            return
        if reason is not None:
            raise as_called(Unavailable(reason, "not now"))
        raise grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata())

    async with carrying(Courier(outbox, "below", deliver, attempts=2)):
        await outbox.database.write(outbox.mark, [mark("a")])
        await until(lambda: tries == 5)
        await outbox.database.write(lambda tx: None)

    assert not await _parked(outbox, 1)


async def test_nothing_about_an_entity_overtakes_what_waits_and_its_newest_state_goes(outbox: Outbox) -> None:
    got: list[tuple[str, int]] = []
    failures = 3

    async def deliver(row: OutboxRow) -> None:
        nonlocal failures
        if row.holds(Task) and failures:
            failures -= 1
            raise unreachable()
        got.append(("task" if row.holds(Task) else "session", row.revision))

    courier = Courier(outbox, "below", deliver)
    async with carrying(courier):
        await outbox.database.write(outbox.mark, [mark("a", 1)])
        await until(lambda: failures == 2)
        await outbox.database.write(outbox.mark, [other("a", 1)])
        await outbox.database.write(outbox.mark, [other("a", 2)])
        await until(lambda: len(got) == 2)

    assert got == [("task", 1), ("session", 2)]
    assert courier._bytes == 0  # pyright: ignore[reportPrivateUsage]


async def test_something_newer_is_not_made_to_wait_as_long_as_what_failed(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(courier_module, "_PAUSES_UNAVAILABLE", (600.0, 600.0))
    monkeypatch.setattr(waits_module, "_SOON_SECONDS", 0.01)
    got: list[int] = []

    async def deliver(row: OutboxRow) -> None:
        got.append(row.revision)
        if row.revision == 1:
            raise unreachable()

    async with carrying(Courier(outbox, "below", deliver)):
        await outbox.database.write(outbox.mark, [mark("a", 1)])
        await until(lambda: got == [1])
        await asyncio.sleep(0.05)
        await outbox.database.write(outbox.mark, [mark("a", 2)])
        await until(lambda: got == [1, 2])
