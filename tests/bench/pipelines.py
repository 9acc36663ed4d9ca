"""The two pipelines that are measured in the same way: ours and the floor.

Each has three levels and a gateway in processes of their own; the lowest level, a child that changes tasks and pushes
them up, is in this process, and so is the client that watches.
"""

import asyncio
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from branchline.v1 import organizations_pb2, organizations_pb2_grpc
from branchline.v1.tasks_pb2 import Task
from branchline_internal.spine.v1.push_pb2 import PushEntry, PushRequest

from services.sandbox.providers.ports import free_port
from tests.bench.child import Child
from tests.bench.floor import OPTIONS, WATCH, Pusher, Store
from tests.bench.installation import Installed, a_task, installed, task_id
from tests.support.databases import Server

Seen = Callable[[str, int], None]
"""Called with an entity's id and revision when a client has received it."""


class Ours:
    """Branchline: a child of the repository here, above it the repository, organization and gateway."""

    def __init__(self, installation: Installed, child: Child, tasks: Sequence[Task]) -> None:
        self.seen: Seen = lambda _id, _revision: None
        self._installation = installation
        self._child = child
        self._tasks = {task.id: task for task in tasks}
        self.ids = list(self._tasks)

    def revision(self, entity: str) -> int:
        """Return the newest revision of a task."""
        return self._tasks[entity].revision

    async def commit(self, ids: Sequence[str]) -> None:
        """Change tasks as the task service does."""
        for entity in ids:
            self._tasks[entity].revision += 1
        await self._child.commit([self._tasks[entity] for entity in ids])

    async def follow(self) -> None:
        """Watch the organization and tell of every task that arrives."""
        async with grpc.aio.insecure_channel(self._installation.address, options=OPTIONS) as channel:
            stub: Any = organizations_pb2_grpc.OrganizationServiceStub(channel)
            request = organizations_pb2.WatchOrganizationRequest(organization_id=self._installation.organization_id)
            async for response in stub.WatchOrganization(request, metadata=self._installation.metadata):
                for change in response.changes:
                    self.seen(change.task.id, change.task.revision)


@asynccontextmanager
async def ours(folder: Path, count: int, server: Server | None = None) -> AsyncGenerator[Ours, None]:
    """Run Branchline with so many idle tasks, on SQLite or on a PostgreSQL server."""
    async with (
        installed(folder, count, server=server) as installation,
        installation.child("task", "repository") as child,
    ):
        tasks = [a_task(installation.organization_id, installation.repository_id, number) for number in range(count)]
        yield Ours(installation, child, tasks)


class Floor:
    """Three levels and a gateway of the floor."""

    def __init__(self, address: str, middle: str, store: Store, pusher: Pusher, tasks: int) -> None:
        self.address = address
        self.middle = middle
        self.seen: Seen = lambda _id, _revision: None
        self._store = store
        self._pusher = pusher
        self._rows = {task_id(number): a_task("org_" + "0" * 32, "repo_" + "0" * 32, number) for number in range(tasks)}
        self.ids = list(self._rows)
        self._batch = 0

    def revision(self, entity: str) -> int:
        """Return the newest revision of an entity."""
        return self._rows[entity].revision

    async def commit(self, ids: Sequence[str]) -> None:
        """Commit rows and send them up."""
        request = PushRequest(child="floor", batch=self._batch)
        for entity in ids:
            row = self._rows[entity]
            row.revision += 1
            entry = PushEntry(outbox_seq=row.revision, id=entity, revision=row.revision)
            entry.state.Pack(row)
            request.entries.append(entry)
        await self._store.commit([(entry.id, entry.revision, entry.state.value) for entry in request.entries])
        self._pusher.push(request.SerializeToString())

    async def follow(self) -> None:
        """Watch the gateway and tell of everything that arrives."""
        async with grpc.aio.insecure_channel(self.address, options=OPTIONS) as channel:
            watch: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(WATCH)
            async for batch in watch(b""):
                for entry in PushRequest.FromString(batch).entries:
                    self.seen(entry.id, entry.revision)


@asynccontextmanager
async def floor(folder: Path, tasks: int, server: Server | None = None) -> AsyncGenerator[Floor, None]:
    """Run the floor with so many entities, on SQLite or on a PostgreSQL server."""
    folder.mkdir(parents=True, exist_ok=True)
    root, middle, door = (f"127.0.0.1:{free_port()}" for _ in range(3))

    def database(name: str) -> str:
        return str(folder / f"{name}.sqlite") if server is None else server.create(f"floor_{name}")

    commands = (
        (root, "--database", database("root")),
        (middle, "--database", database("middle"), "--upstream", root),
        (door, "--upstream", root),
    )
    running: list[asyncio.subprocess.Process] = []
    try:
        for command in commands:
            running.append(await asyncio.create_subprocess_exec(sys.executable, "-m", "tests.bench.floor", *command))
        async with grpc.aio.insecure_channel(middle, options=OPTIONS) as channel:
            await channel.channel_ready()
            async with grpc.aio.insecure_channel(door, options=OPTIONS) as gateway:
                await gateway.channel_ready()
                pusher = Pusher(channel)
                try:
                    yield Floor(door, middle, Store(database("child")), pusher, tasks)
                finally:
                    await pusher.close()
    finally:
        for process in running:
            process.terminate()
            await process.wait()
