"""What a large organization, and watchers that never read, cost the gateway and others. API-4."""

import asyncio
import statistics
import time
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
import pytest_asyncio
from branchline.client import Client
from branchline.gateway.v1 import tasks_pb2

from gateway import watches
from gateway.fanout import FanOut
from services.runtime.spine.chunks import PART_BYTES
from tests.unit.gateway.backend import (
    Backend,
    View,
    eventually,
    follow,
    gateway_process,
    opened,
    peak_bytes,
    task_entry,
    until_synced,
)

MIB = 1024 * 1024


@pytest_asyncio.fixture
async def backend(tmp_path: Path) -> AsyncGenerator[Backend, None]:
    backend = Backend(tmp_path)
    async with backend.running():
        yield backend


async def test_a_snapshot_of_20000_rows_passes_through_and_is_never_held(backend: Backend) -> None:
    for first in range(0, 20_000, 1000):
        await backend.put_all([task_entry(f"t{n}", 1, text="x" * 1000) for n in range(first, first + 1000)])
    with gateway_process(backend.folder) as process:
        async with backend.client() as client:
            await client.tasks.GetTask(tasks_pb2.GetTaskRequest(task_id="task_1"))
            before = peak_bytes(process, reset=True)
            started = time.monotonic()
            call, view, sizes, first_frame = opened(client), View(), list[int](), 0.0
            while not view.token:
                response = await call.read()
                first_frame = first_frame or time.monotonic() - started
                sizes.append(response.frame.ByteSize())
                view.take(response.frame)
            added = peak_bytes(process) - before

    assert len(view.held) == 20_000
    assert max(sizes) <= PART_BYTES
    assert added < 20 * MIB
    assert first_frame < 2


async def test_pages_of_large_entities_end_at_a_mebibyte(backend: Backend) -> None:  # F22, F30
    await backend.put(*(task_entry(f"t{n}", 1, text="x" * 400_000) for n in range(10)))
    async with backend.gateway(), backend.client() as client:
        call, sizes, view = opened(client), list[int](), View()
        while not view.token:
            response = await call.read()
            sizes.append(response.frame.ByteSize())
            view.take(response.frame)

    assert len(view.held) == 10
    assert max(sizes) <= PART_BYTES


async def test_watchers_that_never_read_hold_up_nobody_and_cost_a_bounded_amount(backend: Backend) -> None:
    watchers, rounds, rows = 200, 10, 1000
    await backend.put_all([task_entry(f"t{n}", 1, text="x" * 1000) for n in range(rows)])
    with gateway_process(backend.folder) as process:
        async with backend.client() as client, Client(backend.addresses["gateway"], "token") as other:
            before = process.memory_info().rss
            idle = [opened(client) for _ in range(watchers)]
            view = View()
            following = asyncio.create_task(follow(opened(other), view))
            await eventually(lambda: view.token)
            waits: list[float] = []
            for revision in range(2, rounds + 2):
                for first in range(0, rows, 100):
                    changed = [task_entry(f"t{n}", revision, text="x" * 1000) for n in range(first, first + 100)]
                    await backend.put_all(changed)
                started = time.monotonic()
                await eventually(lambda revision=revision: view.held.get(f"t{rows - 1}") == revision)
                waits.append(time.monotonic() - started)
            added = process.memory_info().rss - before
            joined = await until_synced(opened(other))
            following.cancel()
            for call in idle:
                call.cancel()

    assert joined.held == view.held
    assert added < watchers * 1.5 * MIB  # each was offered 11 MiB
    assert statistics.median(waits) < 0.5


async def test_a_watcher_that_never_reads_is_cut_off(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watches, "STALLED_SECONDS", 1.0)
    await backend.put_all([task_entry(f"t{n}", 1, text="x" * 100_000) for n in range(200)])
    async with backend.gateway() as service, backend.client() as client, backend.client() as other:
        fan_out = next(one for loop in service.loops if isinstance(one := getattr(loop, "__self__", None), FanOut))
        idle = opened(client)
        await eventually(lambda: fan_out.watchers == 1)
        view = View()
        following = asyncio.create_task(follow(opened(other), view))
        await eventually(lambda: view.token and fan_out.watchers == 1)
        await asyncio.sleep(1.5)
        still_there = not following.done()
        following.cancel()
        idle.cancel()

    assert still_there
