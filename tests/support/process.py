"""Branchline as users run it: its own processes, killed and started again."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import psutil
from branchline.v1 import users_pb2
from msgspec.structs import asdict

from cli.installation import GATEWAY, SERVICES, scripted_agents, socket_folder
from cli.settings import Databases
from services.sandbox.providers.ports import free_port
from tests.support.client import Client
from tests.support.databases import installed
from tests.support.stack import DEADLINE_SECONDS, eventually

_DATABASE = "BRANCHLINE_DATABASES__"
PROGRAM = Path(sys.executable).with_name("branchline")


@dataclass
class Processes:
    """Processes of one installation, by name."""

    folder: Path
    environment: dict[str, str]
    address: str
    running: dict[str, asyncio.subprocess.Process] = field(default_factory=dict[str, asyncio.subprocess.Process])

    def database(self, service: str) -> str:
        """Return the URL of a service's database, to look behind its back."""
        file = f"sqlite:///{self.folder / 'data' / service / f'{service}.sqlite'}"
        return self.environment.get(_DATABASE + service.upper(), file)

    async def start(self, name: str, *arguments: str, kill_at: str = "") -> None:
        """Start a command in a session of its own; have it killed at a moment."""
        log = (self.folder / f"{name}.log").open("ab")
        self.running[name] = await asyncio.create_subprocess_exec(
            str(PROGRAM),
            *arguments,
            "--data-dir",
            str(self.folder / "data"),
            env={**os.environ, **self.environment, "TEST_KILL_AT": kill_at},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        log.close()

    async def kill(self, name: str) -> None:
        """Kill with SIGKILL."""
        process = self.running.pop(name)
        process.kill()
        await process.wait()

    async def killed(self, name: str) -> None:
        """Wait until a process was killed at its moment."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            assert await self.running.pop(name).wait() == -signal.SIGKILL

    async def stop(self) -> None:
        """Stop all, politely and then not."""
        for process in self.running.values():
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
        for process in self.running.values():
            try:
                async with asyncio.timeout(20):
                    await process.wait()
            except TimeoutError:
                process.kill()
        self.running.clear()
        self.kill_sandboxes()

    def sandbox_processes(self, program: str = "") -> list[psutil.Process]:
        """Return all processes of this installation's sandboxes, or those that run a program."""
        root = str(self.folder / "data" / "sandbox")
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("HOME", "").startswith(root) and process.name().startswith(program):
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def agents(self) -> set[int]:
        """Return the agents that run in this installation's sandboxes, their launchers not counted."""
        found: set[int] = set()
        for process in self.sandbox_processes():
            with contextlib.suppress(psutil.Error):
                command = process.cmdline()
                if "scripted-agent" in " ".join(command) and "mock-acp" not in command[-1]:
                    found.add(process.pid)
        return found

    def kill_sandboxes(self) -> None:
        """Kill every sandbox with SIGKILL."""
        processes = self.sandbox_processes()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=5)

    async def client(self, stack: AsyncExitStack, token: str = "") -> tuple[Client, str]:
        """Return a client once the gateway answers, and the first organization."""
        path = self.folder / "data" / "token"

        async def connected() -> tuple[Client, str] | None:
            known = token or (path.read_text() if path.exists() else "")
            if not known:
                return None
            client = Client(self.address, known)
            try:
                me = await client.users.GetCurrentUser(users_pb2.GetCurrentUserRequest(), timeout=5)
            except grpc.aio.AioRpcError:  # not up yet
                await client.close()
                return None
            return client, me.memberships[0].organization_id

        client, organization_id = await eventually(connected)
        stack.push_async_callback(client.close)
        return client, organization_id


def one_process(folder: Path) -> Processes:
    """Prepare `branchline up`."""
    address = f"127.0.0.1:{free_port()}"
    return Processes(folder, {"BRANCHLINE_ADDRESSES__GATEWAY": address, **_common(folder)}, address)


def own_processes(folder: Path, databases: Databases | None = None) -> Processes:
    """Prepare `branchline serve` for each service, their databases made already, or new ones."""
    sockets = socket_folder(folder / "data")
    addresses = {name: f"unix:{sockets / name}" for name in SERVICES}
    addresses["gateway"] = f"127.0.0.1:{free_port()}"
    environment = {f"BRANCHLINE_ADDRESSES__{name.upper()}": address for name, address in addresses.items()}
    environment["BRANCHLINE_SIGNING_KEY"] = "a key for tests, long enough for HS256"
    environment["BRANCHLINE_GATEWAY__CALLS_PER_MINUTE"] = "1000000"
    environment["BRANCHLINE_SANDBOX__LOCAL__AGENTS"] = json.dumps(scripted_agents())
    return Processes(folder, {**environment, **_common(folder, databases)}, addresses["gateway"])


def ports() -> dict[str, str]:
    """Return settings that give the services behind the gateway ports in the place of sockets."""
    return {f"BRANCHLINE_ADDRESSES__{name.upper()}": f"127.0.0.1:{free_port()}" for name in SERVICES if name != GATEWAY}


def _common(folder: Path, databases: Databases | None = None) -> dict[str, str]:
    remotes = folder / "remotes"
    remotes.mkdir(parents=True, exist_ok=True)
    given = asdict(installed() if databases is None else databases)
    return {
        "BRANCHLINE_SANDBOX__LOCAL__WRITABLE_PATHS": json.dumps([str(remotes)]),
        **{_DATABASE + name.upper(): url.value for name, url in given.items() if url.value},
    }


async def branchline(environment: Mapping[str, str], *arguments: str) -> tuple[int, str]:
    """Run a command to its end; return its code and all that it said."""
    process = await asyncio.create_subprocess_exec(
        str(PROGRAM), *arguments, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        async with asyncio.timeout(60):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode is not None
    return process.returncode, output.decode()
