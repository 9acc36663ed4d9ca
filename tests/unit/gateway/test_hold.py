"""What a large organization, and watchers that never read, cost the gateway and others. API-4."""

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from branchline.v1 import tasks_pb2

from gateway import allowance, caller, watches
from gateway.allowance import RUNNING
from gateway.fanout import FanOut
from gateway.service import CALLS_PER_CONNECTION
from services.runtime.spine.chunks import PART_BYTES
from services.runtime.spine.hub import WOKEN_AT_ONCE, Watcher
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
                sizes.append(response.ByteSize())
                view.take(response)
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
            sizes.append(response.ByteSize())
            view.take(response)

    assert len(view.held) == 10
    assert max(sizes) <= PART_BYTES


async def test_watchers_that_never_read_hold_up_nobody_and_cost_a_bounded_amount(backend: Backend) -> None:
    watchers, rounds, rows = 200, 10, 1000
    await backend.put_all([task_entry(f"t{n}", 1, text="x" * 1000) for n in range(rows)])
    with gateway_process(backend.folder) as process:
        async with backend.client() as client, backend.client() as more, backend.client() as other:
            before = process.memory_info().rss
            idle = [opened(client) for _ in range(watchers // 2)] + [opened(more) for _ in range(watchers // 2)]
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


MISBEHAVING, OTHER = tasks_pb2.GetTaskRequest(task_id="task_1"), tasks_pb2.GetTaskRequest(task_id="task_2")
FLOOD = 2000


async def flooded(stack: AsyncExitStack, backend: Backend, connections: int) -> "list[asyncio.Future[Any]]":
    """Have one caller make very many calls over some connections. None of them is answered until it is let go."""
    backend.add_caller("other", "usr_2")
    backend.placed.add("task_2")
    backend.held["task_1"] = asyncio.Event()
    clients = [await stack.enter_async_context(backend.client()) for _ in range(connections)]
    calls = [clients[number % connections].tasks.GetTask(MISBEHAVING) for number in range(FLOOD)]
    return [asyncio.ensure_future(call) for call in calls]


async def test_of_a_flood_of_2000_calls_few_run_and_anothers_call_waits_behind_none(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allowance, "LONG_SECONDS", 60.0)
    taken = Counter[str]()
    async with AsyncExitStack() as stack:
        service = await stack.enter_async_context(backend.gateway())
        service.serving.observers.append(lambda name: taken.update([name]))
        calls = await flooded(stack, backend, connections=FLOOD // CALLS_PER_CONNECTION)
        await eventually(lambda: taken.total() == FLOOD and len(backend.got) >= RUNNING)
        other = await stack.enter_async_context(backend.client("other"))

        await other.tasks.GetTask(OTHER, timeout=10)

        order = [task_id for task_id, _ in backend.got]
        backend.held["task_1"].set()
        answers = await asyncio.gather(*calls)

    assert order == ["task_1"] * RUNNING + ["task_2"]
    assert len(answers) == FLOOD


async def test_one_connection_has_so_many_calls_at_the_gateway_and_its_others_wait_at_the_client(
    backend: Backend,
) -> None:
    taken = Counter[str]()
    async with AsyncExitStack() as stack:
        service = await stack.enter_async_context(backend.gateway())
        service.serving.observers.append(lambda name: taken.update([name]))
        calls = await flooded(stack, backend, connections=1)
        await eventually(lambda: taken.total() >= CALLS_PER_CONNECTION)
        other = await stack.enter_async_context(backend.client("other"))

        await other.tasks.GetTask(OTHER, timeout=10)

        at_once = taken.total() - 1
        backend.held["task_1"].set()
        await asyncio.gather(*calls)

    assert at_once == CALLS_PER_CONNECTION


async def test_a_flood_that_is_refused_keeps_its_places_and_waits_at_its_client(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caller, "REFUSAL_SECONDS", 60.0)
    taken = Counter[str]()
    async with AsyncExitStack() as stack:
        service = await stack.enter_async_context(backend.gateway(calls_per_minute=1))
        service.serving.observers.append(lambda name: taken.update([name]))
        calls = await flooded(stack, backend, connections=1)
        await eventually(lambda: taken.total() >= CALLS_PER_CONNECTION)
        other = await stack.enter_async_context(backend.client("other"))

        await other.tasks.GetTask(OTHER, timeout=10)

        at_once, running = taken.total() - 1, len(backend.got) - 1
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)

    assert (at_once, running) == (CALLS_PER_CONNECTION, 1)


async def test_calls_that_take_long_leave_their_callers_lane(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allowance, "LONG_SECONDS", 0.05)
    backend.placed.add("task_2")
    backend.held["task_1"] = asyncio.Event()
    async with backend.gateway(), backend.client() as client:
        hanging = [asyncio.ensure_future(client.tasks.GetTask(MISBEHAVING)) for _ in range(2 * RUNNING)]
        await eventually(lambda: len(backend.got) == 2 * RUNNING)

        await client.tasks.GetTask(OTHER, timeout=10)

        unanswered = [call for call in hanging if not call.done()]
        backend.held["task_1"].set()
        await asyncio.gather(*hanging)

    assert len(unanswered) == 2 * RUNNING


async def test_of_1000_watchers_that_never_read_few_are_told_before_others_have_their_turn(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    watchers, turn = 1000, 0
    woken = Counter[int]()
    wake = Watcher.wake

    def counted(watcher: Watcher) -> None:
        woken[turn] += 1
        wake(watcher)

    def count_turns() -> None:
        nonlocal turn
        turn += 1
        turns[0] = asyncio.get_running_loop().call_soon(count_turns)

    monkeypatch.setattr(Watcher, "wake", counted)
    async with AsyncExitStack() as stack:
        service = await stack.enter_async_context(backend.gateway())
        fan_out = next(one for loop in service.loops if isinstance(one := getattr(loop, "__self__", None), FanOut))
        clients = [await stack.enter_async_context(backend.client()) for _ in range(watchers // 50)]
        idle = [opened(clients[number % len(clients)]) for number in range(watchers)]
        for call in idle:
            stack.callback(call.cancel)
        await eventually(lambda: fan_out.watchers == watchers)
        await asyncio.gather(*(call.wait_for_connection() for call in idle))
        other = await stack.enter_async_context(backend.client())
        view = View()
        following = asyncio.create_task(follow(opened(other), view))
        stack.callback(following.cancel)
        await eventually(lambda: view.token)
        turns = [asyncio.get_running_loop().call_soon(count_turns)]
        woken.clear()

        await backend.put(task_entry("a", 1))
        await eventually(lambda: view.held == {"a": 1} and woken.total() > watchers)
        turns[0].cancel()

    # the next change may be told in the turn in which the last of the one before are
    assert max(woken.values()) <= 2 * WOKEN_AT_ONCE
