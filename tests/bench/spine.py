"""What a change takes through all levels, and how many go through: ours and the floor in turns."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from tests.bench.pipelines import Floor, Ours, floor, ours
from tests.bench.result import Figures, Options, Row, against, interleave, latencies
from tests.support.databases import Server, running_server

Pipeline = Ours | Floor

_TASKS = 1000
_WARM_UP = 50
_OUTSTANDING = 512
_BATCH = 128
_ARRIVAL_SECONDS = 30.0


async def one_change(options: Options, folder: Path) -> list[Row]:
    """Change one task at a time, each after the one before has arrived at the client."""
    return await _latencies(options, folder, "one change to a client's watch", 1.6, 3.0)


async def one_change_on_postgres(options: Options, folder: Path) -> list[Row]:
    """Do the same on PostgreSQL, against bare psycopg."""
    with running_server(settings=()) as server:
        return await _latencies(options, folder, "one change to a client's watch on PostgreSQL", 2.0, 3.5, server)


async def sustained(options: Options, folder: Path) -> list[Row]:
    """Change tasks in batches, as fast as they arrive at the client."""
    return await _rates(options, folder, "sustained changes through all levels", 0.3)


async def sustained_on_postgres(options: Options, folder: Path) -> list[Row]:
    """Do the same on PostgreSQL, against bare psycopg."""
    with running_server(settings=()) as server:
        return await _rates(options, folder, "sustained changes through all levels on PostgreSQL", 0.25, server)


async def _latencies(
    options: Options, folder: Path, name: str, p50: float, p99: float, server: Server | None = None
) -> list[Row]:
    async with floor(folder / "floor", _TASKS, server) as low, ours(folder / "ours", _TASKS, server) as own:
        measure = partial(_one_at_a_time, count=options.samples)
        rounds = await interleave(options.rounds, partial(measure, low), partial(measure, own))
    return [*against(f"{name}, p50", "ms", rounds["p50"], p50), *against(f"{name}, p99", "ms", rounds["p99"], p99)]


async def _rates(options: Options, folder: Path, name: str, bound: float, server: Server | None = None) -> list[Row]:
    async with floor(folder / "floor", _TASKS, server) as low, ours(folder / "ours", _TASKS, server) as own:
        measure = partial(_sustained, seconds=options.seconds)
        rounds = await interleave(options.rounds, partial(measure, low), partial(measure, own))
    return against(name, "1/s", rounds["rate"], bound, at_least=True)


@asynccontextmanager
async def _following(pipeline: Pipeline) -> AsyncGenerator[None, None]:
    """Have a client watch for the length of the block."""
    task = asyncio.create_task(pipeline.follow())
    await asyncio.sleep(1)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


async def _one_at_a_time(pipeline: Pipeline, *, count: int) -> Figures:
    """Return the latencies from before the commit to the arrival."""
    wanted: tuple[str, int] = ("", 0)
    arrived: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    def seen(entity: str, revision: int) -> None:
        if (entity, revision) == wanted and not arrived.done():
            arrived.set_result(time.perf_counter())

    pipeline.seen = seen
    took: list[float] = []
    async with _following(pipeline):
        for number in range(_WARM_UP + count):
            entity = pipeline.ids[number % len(pipeline.ids)]
            wanted = (entity, pipeline.revision(entity) + 1)
            arrived = asyncio.get_running_loop().create_future()
            began = time.perf_counter()
            await pipeline.commit([entity])
            async with asyncio.timeout(_ARRIVAL_SECONDS):
                took.append(await arrived - began)
    return latencies(took[_WARM_UP:])


async def _sustained(pipeline: Pipeline, *, seconds: float) -> Figures:
    """Return the changes a second that went through all levels."""
    outstanding = received = 0
    room = asyncio.Event()

    def seen(_entity: str, _revision: int) -> None:
        nonlocal outstanding, received
        outstanding -= 1
        received += 1
        if outstanding <= _OUTSTANDING - _BATCH:
            room.set()

    pipeline.seen = seen
    ids = itertools.cycle(pipeline.ids)
    async with _following(pipeline):
        outstanding = received = 0
        began = time.monotonic()
        while time.monotonic() < began + seconds:
            outstanding += _BATCH
            await pipeline.commit(list(itertools.islice(ids, _BATCH)))
            room.clear()
            if outstanding > _OUTSTANDING - _BATCH:
                async with asyncio.timeout(_ARRIVAL_SECONDS):
                    await room.wait()
        return {"rate": received / (time.monotonic() - began)}
