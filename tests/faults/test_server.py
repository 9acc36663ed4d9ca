"""A PostgreSQL server that is away, crashes, hangs or is full: commands say so, and nothing acknowledged is lost."""

import asyncio
import contextlib
import signal
import subprocess
import tempfile
from collections.abc import AsyncGenerator, Callable, Generator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from branchline.v1 import repositories_pb2, users_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.sandbox.providers.ports import free_port
from tests.support.client import Client
from tests.support.databases import Server, installed_on, look_into, running_server
from tests.support.process import Processes, own_processes
from tests.support.stack import eventually, failure_of, request_id

SERVICES = ("organization", "user", "history", "repository", "gateway")
NOT_SERVING, SERVING = health_pb2.HealthCheckResponse.NOT_SERVING, health_pb2.HealthCheckResponse.SERVING
RECOVERY_SECONDS = 60.0


@dataclass
class House:
    """An installation on a server that is in the test's hands."""

    server: Server
    processes: Processes
    client: Client
    organization_id: str
    working: "asyncio.Task[None]" = field(init=False)
    acknowledged: list[str] = field(default_factory=list[str])
    refused: set[tuple[grpc.StatusCode, str]] = field(default_factory=set[tuple[grpc.StatusCode, str]])

    async def work(self) -> None:
        """Add repositories for ever; remember which were acknowledged, and how others were refused."""
        while True:
            name = request_id()
            request = repositories_pb2.CreateRepositoryRequest(
                request_id=name, organization_id=self.organization_id, remote_url=f"https://git.test/{name}"
            )
            try:
                answer = await self.client.repositories.CreateRepository(request, timeout=40)
            except grpc.aio.AioRpcError as error:
                self.refused.add((error.code(), failure_of(error).reason))
                await asyncio.sleep(0.05)
            else:
                self.acknowledged.append(answer.repository.id)
                await asyncio.sleep(0.02)

    async def health(self, service: str) -> int:
        address = self.processes.environment[f"BRANCHLINE_ADDRESSES__{service.upper()}"]
        async with grpc.aio.insecure_channel(address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            return (await stub.Check(health_pb2.HealthCheckRequest(), timeout=5, wait_for_ready=True)).status

    async def until_health(self, status: int, of: Callable[[Iterable[bool]], bool] = all) -> None:
        async def look() -> bool:
            return of([await self.health(service) == status for service in SERVICES[:-1]])

        await eventually(look, RECOVERY_SECONDS)

    async def until_more(self) -> None:
        """Wait until commands are acknowledged again."""
        count = len(self.acknowledged)

        async def more() -> bool:
            return len(self.acknowledged) > count + 3

        await eventually(more, RECOVERY_SECONDS)

    async def until_refused(self) -> None:
        async def look() -> bool:
            return (grpc.StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE") in self.refused

        try:
            await eventually(look, 60)
        except TimeoutError as error:
            raise AssertionError(f"commands were refused with nothing but {self.refused}") from error

    async def check_books(self) -> None:
        """See that every acknowledged command is there, at its owner and in the index. No more work is done."""
        self.working.cancel()
        await asyncio.wait({self.working})

        async def settled() -> bool:
            rows = look_into(self.server.url_of("of_organization"), "SELECT count(*) FROM outbox")
            return rows == [(0,)]

        await eventually(settled, RECOVERY_SECONDS)
        for database, table in (("of_organization", "repositories"), ("of_repository", "repositories")):
            held = {row[0] for row in look_into(self.server.url_of(database), f"SELECT id FROM {table}")}
            assert not set(self.acknowledged) - held
        await self.client.users.GetCurrentUser(users_pb2.GetCurrentUserRequest())


@asynccontextmanager
async def house(server: Server, folder: Path) -> AsyncGenerator[House, None]:
    processes = own_processes(folder, installed_on(server))
    async with AsyncExitStack() as stack:
        stack.push_async_callback(processes.stop)
        for name in SERVICES:
            await processes.start(name, "serve", name)
        await processes.start("bootstrap", "bootstrap")
        client, organization_id = await processes.client(stack)
        made = House(server, processes, client, organization_id)
        made.working = asyncio.create_task(made.work())
        try:
            await made.until_more()
            yield made
        finally:
            made.working.cancel()
            await asyncio.wait({made.working})


async def test_a_server_that_is_away_and_comes_back_costs_nothing_acknowledged(tmp_path: Path) -> None:
    with running_server(port=free_port(), settings=()) as server:
        async with house(server, tmp_path) as made:
            server.stop()
            await made.until_refused()
            await made.until_health(NOT_SERVING)
            server.start()
            await made.until_health(SERVING)
            await made.until_more()
            await made.check_books()


async def test_a_server_that_crashes_and_restarts_costs_nothing_acknowledged(tmp_path: Path) -> None:
    with running_server(settings=()) as server:
        async with house(server, tmp_path) as made:
            for _ in range(3):
                server.kill()
                server.start()
                await made.until_more()
            await made.until_health(SERVING)
            await made.check_books()


async def test_a_server_that_hangs_is_told_of_and_used_again(tmp_path: Path) -> None:
    with running_server(settings=()) as server:
        async with house(server, tmp_path) as made:
            server.tell(signal.SIGSTOP)
            try:
                await made.until_health(NOT_SERVING)
                await made.until_refused()
            finally:
                server.tell(signal.SIGCONT)
            await made.until_health(SERVING)
            await made.until_more()
            await made.check_books()


@pytest.fixture
def small() -> Generator[Path, None, None]:
    """A file system of 160 MiB in memory, where the server's user finds it."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="small-") as name:
        Path(name).chmod(0o755)
        folder = Path(name) / "tables"
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160m,mode=755", "tmpfs", str(folder)], check=True)
        yield folder
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


async def test_a_full_server_is_told_of_and_goes_on_when_there_is_room(tmp_path: Path, small: Path) -> None:
    with running_server(settings=("max_wal_size=32MB", "min_wal_size=32MB"), tables=small) as server:
        async with house(server, tmp_path) as made:
            ballast = small / "ballast"
            with ballast.open("wb") as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(65536))
                    file.flush()
            await made.until_refused()
            await made.until_health(NOT_SERVING, any)
            ballast.unlink()
            await made.until_health(SERVING)
            await made.until_more()
            await made.check_books()
