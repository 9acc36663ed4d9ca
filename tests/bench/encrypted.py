"""TLS on every hop beside plaintext on every hop, both over TCP: one task read by many at once."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
from branchline.v1 import tasks_pb2, tasks_pb2_grpc

from tests.bench.floor import OPTIONS
from tests.bench.installation import READING, Installed, installed, task_id
from tests.bench.reads import Call, connected
from tests.bench.result import Figures, Options, Row, against, interleave
from tests.support.certificates import certificates, tls_settings
from tests.support.process import ports

_FEW = 10
_IN_FLIGHT = 32
_READY_SECONDS = 120.0


async def get_task(options: Options, folder: Path) -> list[Row]:
    """Read one task through the gateway, 32 at a time."""
    certs = certificates(folder / "certs")
    async with (
        installed(folder / "plain", _FEW, settings=ports()) as plain,
        installed(folder / "tls", _FEW, settings=ports()) as secured,
        connected(plain.address) as open_channel,
        _encrypted(secured, certs) as safe_channel,
    ):
        rounds = await interleave(
            options.rounds,
            partial(_rate, _reading(open_channel, plain), options.samples),
            partial(_rate, _reading(safe_channel, secured), options.samples),
        )
    name = f"GetTask with TLS against plaintext, {_IN_FLIGHT} in flight"
    return against(name, "calls/s", rounds["rate"], 0.8, at_least=True)


@asynccontextmanager
async def _encrypted(installation: Installed, certs: Path) -> AsyncGenerator[Any, None]:
    """Start an installation again with TLS on every hop; give a channel to its gateway."""
    processes = installation.processes
    await processes.stop()
    processes.environment.update(tls_settings(certs))
    for name in READING:
        await processes.start(name, "serve", name)
    roots = grpc.ssl_channel_credentials((certs / "ca" / "ca.crt").read_bytes())
    async with grpc.aio.secure_channel(installation.address, roots, options=OPTIONS) as channel:
        async with asyncio.timeout(_READY_SECONDS):
            await channel.channel_ready()
        await _reading(channel, installation)()
        yield channel


def _reading(channel: Any, installation: Installed) -> Call:
    stub: Any = tasks_pb2_grpc.TaskServiceStub(channel)
    request = tasks_pb2.GetTaskRequest(task_id=task_id(1))
    return lambda: stub.GetTask(request, metadata=installation.metadata, timeout=60)


async def _rate(call: Call, count: int) -> Figures:
    """Make so many calls, some at a time; return how many a second."""
    left = iter(range(count))

    async def some() -> None:
        for _ in left:
            await call()

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(_IN_FLIGHT):
            group.create_task(some())
    return {"rate": count / (time.perf_counter() - began)}
