"""Memory of idle processes, beside processes that import the same libraries and do nothing."""

import asyncio
import sys
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import psutil

from cli.installation import SERVICES
from tests.bench.installation import start
from tests.bench.result import Options, Row
from tests.support.process import Processes, one_process, own_processes

LIBRARIES = "grpc, sqlalchemy, aiosqlite, protovalidate"
WORKFLOWS = ("task",)
"""Services that have workflows, and therefore DBOS."""

_MB = 1024 * 1024
_IDLE = "import time, {libraries}; print(flush=True); time.sleep(3600)"


@asynccontextmanager
async def _importing(libraries: str) -> AsyncGenerator[psutil.Process, None]:
    """Run a process that imports libraries and sleeps."""
    program = _IDLE.format(libraries=libraries)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE, cwd="/"
    )
    assert process.stdout
    try:
        await process.stdout.readline()
        yield psutil.Process(process.pid)
    finally:
        process.kill()
        await process.wait()


async def _floors(stack: AsyncExitStack) -> tuple[psutil.Process, psutil.Process]:
    plain = await stack.enter_async_context(_importing(LIBRARIES))
    return plain, await stack.enter_async_context(_importing(f"{LIBRARIES}, dbos"))


async def services(options: Options, folder: Path) -> list[Row]:
    """Run each service in a process of its own."""
    processes = own_processes(folder)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(processes.stop)
        await start(processes, SERVICES)
        await processes.start("bootstrap", "bootstrap")
        await _settled(processes, options)
        plain, durable = await _floors(stack)
        return [
            _row(f"memory of {name}", processes, name, durable if name in WORKFLOWS else plain, 1.3)
            for name in SERVICES
        ]


async def everything(options: Options, folder: Path) -> list[Row]:
    """Run all services in one process."""
    processes = one_process(folder)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(processes.stop)
        await processes.start("up", "up")
        await _settled(processes, options)
        _, durable = await _floors(stack)
        return [_row("memory of `up`", processes, "up", durable, 1.6)]


async def _settled(processes: Processes, options: Options) -> None:
    """Wait until all is ready, and some time more."""
    async with AsyncExitStack() as calling:
        await processes.client(calling)
    await asyncio.sleep(options.settle_seconds)


def _row(name: str, processes: Processes, service: str, floor: psutil.Process, bound: float) -> Row:
    mine = psutil.Process(processes.running[service].pid).memory_info().rss / _MB
    least = floor.memory_info().rss / _MB
    return Row(name, "MB", mine, least, mine / least, bound)
