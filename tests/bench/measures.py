"""What is measured, the same way for both pipelines."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from tests.bench.pipelines import Floor, Ours

Pipeline = Ours | Floor

_WARM_UP = 50
_OUTSTANDING = 512
_BATCH = 128


@dataclass(frozen=True, slots=True)
class Latency:
    """Latencies in milliseconds."""

    p50: float
    p99: float


def latency_of(seconds: list[float]) -> Latency:
    """Return the median and the 99th percentile."""
    ordered = sorted(seconds)
    return Latency(ordered[len(ordered) // 2] * 1000, ordered[int(len(ordered) * 0.99)] * 1000)


@asynccontextmanager
async def following(pipeline: Pipeline) -> AsyncGenerator[None, None]:
    """Have a client watch for the length of the block."""
    task = asyncio.create_task(pipeline.follow())
    await asyncio.sleep(1)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


async def one_at_a_time(pipeline: Pipeline, count: int, background_per_second: int = 0) -> Latency:
    """Commit single changes, each after the one before has arrived; return commit to arrival."""
    arrived: dict[tuple[str, int], asyncio.Future[float]] = {}

    def seen(entity: str, revision: int) -> None:
        waiting = arrived.get((entity, revision))
        if waiting and not waiting.done():
            waiting.set_result(time.monotonic())

    pipeline.seen = seen
    half = len(pipeline.ids) // 2
    took: list[float] = []
    async with following(pipeline), asyncio.TaskGroup() as group:
        noise = group.create_task(_background(pipeline, pipeline.ids[half:], background_per_second))
        for number in range(_WARM_UP + count):
            entity = pipeline.ids[number % half]
            # The next revision is known before the commit, so that an arrival cannot be missed.
            expected = asyncio.get_running_loop().create_future()
            (revision,) = await _expecting(pipeline, entity, expected, arrived)
            committed = time.monotonic()
            at = await asyncio.wait_for(expected, 30)
            if number >= _WARM_UP:
                took.append(max(at - committed, 0))
            del arrived[(entity, revision)]
        noise.cancel()
    return latency_of(took)


async def _expecting(
    pipeline: Pipeline,
    entity: str,
    expected: "asyncio.Future[float]",
    arrived: "dict[tuple[str, int], asyncio.Future[float]]",
) -> list[int]:
    arrived[(entity, pipeline.revision(entity) + 1)] = expected
    return await pipeline.commit([entity])


async def _background(pipeline: Pipeline, ids: list[str], per_second: int) -> None:
    if not per_second:
        return
    began = time.monotonic()
    for number in itertools.count(1):
        await pipeline.commit([ids[number % len(ids)]])
        await asyncio.sleep(max(0, began + number / per_second - time.monotonic()))


async def sustained(pipeline: Pipeline, seconds: float) -> float:
    """Commit batches as fast as they arrive at the client; return changes a second through all levels."""
    outstanding = 0
    room = asyncio.Event()
    received = 0

    def seen(_entity: str, _revision: int) -> None:
        nonlocal outstanding, received
        outstanding -= 1
        received += 1
        if outstanding <= _OUTSTANDING - _BATCH:
            room.set()

    pipeline.seen = seen
    ids = itertools.cycle(pipeline.ids)
    async with following(pipeline):
        outstanding = received = 0
        began = time.monotonic()
        while time.monotonic() < began + seconds:
            outstanding += _BATCH
            await pipeline.commit(list(itertools.islice(ids, _BATCH)))
            room.clear()
            if outstanding > _OUTSTANDING - _BATCH:
                await asyncio.wait_for(room.wait(), 30)
        return received / (time.monotonic() - began)


async def calls(call: Callable[[], Awaitable[object]], seconds: float, in_flight: int) -> float:
    """Make calls with so many in flight; return calls a second."""
    until = time.monotonic() + seconds
    made = 0

    async def caller() -> None:
        nonlocal made
        while time.monotonic() < until:
            await call()
            made += 1

    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for _ in range(in_flight):
            group.create_task(caller())
    return made / (time.monotonic() - began)
