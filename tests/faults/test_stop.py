"""A polite stop: it ends within seconds and cleanly, whatever is open, at work, or does not answer."""

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import psutil
import pytest
from branchline.v1 import tasks_pb2
from branchline.v1.tasks_pb2 import Task

from tests.faults.test_restart import COUNT, COUNTED, create_task, said, send, some_words, until
from tests.support.client import Client
from tests.support.process import SERVICES, Processes, one_process, own_processes
from tests.support.stack import eventually
from tests.support.views import View

IDLE, WAITING = tasks_pb2.TASK_ACTIVITY_IDLE, tasks_pb2.TASK_ACTIVITY_WAITING
STOP_SECONDS = 12.0


@asynccontextmanager
async def at_work(
    folder: Path, processes: Processes, script: str, names: tuple[str, ...] = ("up",)
) -> AsyncGenerator[tuple[Client, Task], None]:
    """Run an installation with an agent at work and watchers that hold on."""
    async with AsyncExitStack() as stack:
        stack.push_async_callback(processes.stop)
        for name in names:
            await processes.start(name, *(("up",) if name == "up" else ("serve", name)))
        if "up" not in names:
            await processes.start("bootstrap", "bootstrap", "--agent", "mock")
        client, organization_id = await processes.client(stack)
        task = await until(client, (await create_task(client, organization_id, folder, "go")).id, IDLE)
        for frames in (
            *(client.watch_organization(organization_id) for _ in range(20)),
            client.watch_task(task.id),
            client.watch_history(organization_id),
        ):
            view = View("watcher", frames).open()
            stack.push_async_callback(view.close)
            await eventually(_is_synced(view))
        await send(client, task, script)
        yield client, task


def _is_synced(view: View) -> Callable[[], "asyncio.Future[bool]"]:
    async def look() -> bool:
        return view.synced

    return lambda: asyncio.ensure_future(look())


async def stop(processes: Processes, name: str) -> tuple[int, float]:
    """Stop a process politely; return its exit code and how long it took."""
    process, begun = processes.running.pop(name), time.monotonic()
    process.send_signal(signal.SIGTERM)
    try:
        async with asyncio.timeout(60):
            code = await process.wait()
    except TimeoutError:
        process.kill()
        raise
    return code, time.monotonic() - begun


def complaints(folder: Path, name: str) -> list[str]:
    lines = (folder / f"{name}.log").read_text().splitlines()
    return [line for line in lines if "Traceback" in line or "[error" in line or "never awaited" in line]


async def test_a_stop_in_mid_turn_under_open_watches_is_quick_and_the_turn_goes_on(tmp_path: Path) -> None:  # OPS-3
    processes = one_process(tmp_path)
    async with at_work(tmp_path, processes, COUNT) as (client, task):
        await eventually(lambda: some_words(client, task))

        code, seconds = await stop(processes, "up")

        assert (code, seconds < STOP_SECONDS, complaints(tmp_path, "up")) == (0, True, [])
        await processes.start("up", "up")
        await until(client, task.id, IDLE, turn=1)
        assert await said(client, task) == COUNTED


async def test_a_stop_waits_for_no_machine_that_does_not_answer(tmp_path: Path) -> None:  # OPS-3
    processes = one_process(tmp_path)
    async with at_work(tmp_path, processes, "ask May I?") as (client, task):
        await until(client, task.id, WAITING)
        machines = [one for one in processes.sandbox_processes() if one.name().startswith("sandbox-agent")]
        for machine in machines:
            machine.send_signal(signal.SIGSTOP)

        code, seconds = await stop(processes, "up")

        for machine in machines:
            with contextlib.suppress(psutil.NoSuchProcess):
                machine.send_signal(signal.SIGCONT)
        assert machines
        assert (code, seconds < STOP_SECONDS, complaints(tmp_path, "up")) == (0, True, [])


@pytest.mark.timeout(240)
async def test_each_service_stops_though_the_others_do_not_answer(tmp_path: Path) -> None:  # OPS-2, OPS-3
    processes = own_processes(tmp_path)
    async with at_work(tmp_path, processes, COUNT, SERVICES) as (client, task):
        await eventually(lambda: some_words(client, task))
        for name in SERVICES:
            processes.running[name].send_signal(signal.SIGSTOP)

        stopped: dict[str, tuple[int, bool, list[str]]] = {}
        for name in SERVICES:
            processes.running[name].send_signal(signal.SIGCONT)
            code, seconds = await stop(processes, name)
            stopped[name] = (code, seconds < STOP_SECONDS, complaints(tmp_path, name))

        clean: tuple[int, bool, list[str]] = (0, True, [])
        assert stopped == dict.fromkeys(SERVICES, clean)
