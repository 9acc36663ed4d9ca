"""How long a Docker sandbox takes from nothing to a server that answers, against `docker run` of the same."""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from services.sandbox.agent_server import Unreachable
from services.sandbox.door.tokens import Minter
from services.sandbox.http import Http
from services.sandbox.providers.docker.config import DockerProviderConfig
from services.sandbox.providers.docker.provider import DockerProvider
from tests.bench.result import Figures, Options, Row, against, interleave, p50
from tests.support.engine import SANDBOX_IMAGE, docker, require_engine

_BOUND = 1.3
_SANDBOXES = 3
_LIMITS = (
    *("--init", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--pids-limit", "1024", "--cpus", "2"),
    *(
        "--memory",
        "4g",
        "--memory-swap",
        "4g",
        "--read-only",
        "--tmpfs",
        "/tmp",
        "--tmpfs",
        "/var/tmp",
        "--tmpfs",
        "/run",
    ),
)
_SERVER = ("sandbox-agent", "server", "--no-telemetry", "--token", "floor", "--host", "0.0.0.0", "--port", "2468")
_ADDRESS = "{{.NetworkSettings.IPAddress}}"


async def ready(options: Options, folder: Path) -> list[Row]:
    """Measure both in turns, with the same volume and limits. Only ours has a network made for it."""
    require_engine()
    http, name = Http(), f"bench-{secrets.token_hex(4)}"
    config = DockerProviderConfig(installation=name, subnets="10.215.0.0/22")
    provider = DockerProvider(folder, config, Minter(b"bench"), 7711, lambda: http)
    await provider.start()

    async def make(number: int) -> None:
        await provider.create(f"sbx_{number}")

    async def remove(number: int) -> None:
        await provider.destroy(f"sbx_{number}")

    async def run(number: int) -> None:
        volume = f"type=volume,source={name}-{number},target=/home/sandbox"
        named = ("--detach", "--name", f"{name}-{number}", "--mount", volume)
        await asyncio.to_thread(docker, "run", *named, *_LIMITS, SANDBOX_IMAGE, *_SERVER)
        address = await asyncio.to_thread(docker, "inspect", "--format", _ADDRESS, f"{name}-{number}")
        await _answers(http, f"http://{address}:2468/v1/acp")

    async def drop(number: int) -> None:
        await asyncio.to_thread(docker, "rm", "--force", f"{name}-{number}")
        await asyncio.to_thread(docker, "volume", "rm", f"{name}-{number}")

    try:
        rounds = await interleave(options.rounds, lambda: _measured(run, drop), lambda: _measured(make, remove))
        return against("Docker sandbox: create to ready agent, p50", "ms", rounds["p50"], _BOUND)
    finally:
        await provider.close()
        await http.close()


async def _measured(make: Callable[[int], Awaitable[None]], remove: Callable[[int], Awaitable[None]]) -> Figures:
    took: list[float] = []
    for number in range(_SANDBOXES):
        began = time.perf_counter()
        try:
            await make(number)
            took.append(time.perf_counter() - began)
        finally:
            await remove(number)
    return {"p50": p50(took)}


async def _answers(http: Http, url: str) -> None:
    async with asyncio.timeout(30):
        while True:
            try:
                await http.send("GET", url, 2.0, None, headers={"Authorization": "Bearer floor"})
            except Unreachable:
                await asyncio.sleep(0.02)
            else:
                return
