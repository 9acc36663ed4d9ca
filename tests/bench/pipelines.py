"""The two pipelines that are measured in the same way: ours and the floor."""

import asyncio
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc
from branchline.client import Client
from branchline.gateway.v1 import organizations_pb2, repositories_pb2
from branchline.resource.v1 import task_pb2
from branchline.resource.v1.repository_pb2 import Repository
from branchline.resource.v1.session_pb2 import Session
from branchline.resource.v1.task_pb2 import Task
from branchline.spine.v1 import push_pb2_grpc
from branchline.spine.v1.push_pb2 import PushEntry, PushRequest
from branchline.task.v1.task_pb2 import CreateTaskRequest
from pydantic import SecretStr

from services.organization import tables as organization_tables
from services.organization.ingest import OrganizationIngest
from services.organization.store import OrganizationStore
from services.repository import tables as repository_tables
from services.repository.store import RepositoryStore
from services.runtime.config import ServiceConfig
from services.runtime.migrations import migrate
from services.runtime.service import Chassis, chassis
from services.runtime.spine.index import Index
from services.runtime.spine.ingest import Pushed
from services.runtime.spine.push import PushClient
from services.runtime.spine.tables import SpineTables
from services.task.store import TaskRecord, TaskStore
from services.task.tables import spine as task_spine
from tests.bench.floor import OPTIONS, WATCH, Pusher, Store
from tests.support.process import Processes, own_processes
from tests.support.stack import free_port, request_id

Seen = Callable[[str, int], None]
"""Called with an entity's id and revision when a client has received it."""


def a_task(organization_id: str, repository_id: str, number: int) -> Task:
    """Return a task of usual size (about 500 bytes)."""
    task = Task(
        id=f"task_{number:032d}",
        organization_id=organization_id,
        repository_id=repository_id,
        title=f"Mend the thing number {number} that nobody wanted",
        text="Please mend the thing. " * 6,
        branch=f"fix/mend-the-thing-number-{number}",
        status=task_pb2.TASK_STATUS_IDLE,
        owner_user_id="usr_" + "0" * 32,
        active_sandbox_id="sbx_" + "0" * 32,
        sandbox_provider="local",
        head_commit="0" * 40,
        revision=1,
    )
    task.create_time.FromSeconds(1_700_000_000 + number)
    task.update_time.FromSeconds(1_700_000_000 + number)
    task.sessions.add(id="ses_" + "0" * 32, name="Session 1", agent="mock")
    return task


class Ours:
    """Branchline: organization, repository and gateway as processes, the task service's rows and push here."""

    def __init__(self, processes: Processes, parts: Chassis, client: Client, organization_id: str) -> None:
        self.processes = processes
        self.client = client
        self.organization_id = organization_id
        self.address = processes.address
        self.ids: list[str] = []
        self.seen: Seen = lambda _id, _revision: None
        self._parts = parts
        self._store = TaskStore(parts)
        self._records: dict[str, TaskRecord] = {}

    async def commit(self, ids: Sequence[str]) -> list[int]:
        """Change tasks as the task service does."""
        records = [self._records[task_id] for task_id in ids]
        async with self._parts.database.transaction() as tx:
            for record in records:
                await self._store.save(tx, record)
        return [record.task.revision for record in records]

    def revision(self, task_id: str) -> int:
        """Return the newest revision of a task."""
        return self._records[task_id].task.revision

    async def load(self, count: int) -> None:
        """Read the tasks that were seeded."""
        for number in range(count):
            task_id = f"task_{number:032d}"
            async with self._parts.database.read() as connection:
                self._records[task_id] = await self._store.get(connection, task_id)
        self.ids = list(self._records)

    async def follow(self) -> None:
        """Watch the organization and tell of every task that arrives."""
        request = organizations_pb2.WatchOrganizationRequest(organization_id=self.organization_id)
        async for response in self.client.organizations.WatchOrganization(request):
            for change in response.frame.changes:
                if change.kind == "task":
                    self.seen(change.id, change.revision)


@asynccontextmanager
async def ours(folder: Path, tasks: int) -> AsyncGenerator[Ours, None]:
    """Run Branchline with so many idle tasks."""
    processes = own_processes(folder)
    processes.environment["BRANCHLINE_CALLS_PER_MINUTE"] = "100000000"
    processes.environment["BRANCHLINE_LOG_LEVEL"] = "warning"
    above = ("organization", "user", "history", "repository", "gateway")
    key = processes.environment["BRANCHLINE_SIGNING_KEY"]
    listen = processes.environment["BRANCHLINE_ADDRESSES__TASK"]
    config = ServiceConfig(listen=listen, data_dir=folder / "data" / "task", signing_key=SecretStr(key))
    async with AsyncExitStack() as stack:
        stack.push_async_callback(processes.stop)
        for name in above:
            await processes.start(name, "serve", name)
        await processes.start("bootstrap", "bootstrap")
        client, organization_id = await processes.client(stack)
        added = await client.repositories.AddRepository(
            repositories_pb2.AddRepositoryRequest(
                request_id=request_id(), organization_id=organization_id, remote_url="file:///nowhere/bench.git"
            )
        )
        await processes.stop()
        await seed(folder / "data", organization_id, added.repository, tasks)
        parts = chassis("task", config, task_spine, Path("services/task").absolute())
        channel = parts.channel(processes.environment["BRANCHLINE_ADDRESSES__REPOSITORY"])
        push = PushClient(parts.outbox, lambda: push_pb2_grpc.PushServiceStub(channel), "task")
        parts.service.loops.append(push.run)
        for name in above:
            await processes.start(name, "serve", name)
        await stack.enter_async_context(parts.service.running())
        client, _ = await processes.client(stack)
        pipeline = Ours(processes, parts, client, organization_id)
        await pipeline.load(tasks)
        yield pipeline


async def seed(data: Path, organization_id: str, row: Repository, count: int) -> None:
    """Write tasks into the databases of the three levels, as if they had been pushed."""
    above = _rooms(data, "organization", organization_tables.spine)
    index = Index(above.database, organization_tables.spine, organization_tables.WATCHED, above.clock)
    root = OrganizationIngest(above, OrganizationStore(above.database, index, above.clock))
    middle = _rooms(data, "repository", repository_tables.spine)
    details = Index(middle.database, repository_tables.spine, repository_tables.WATCHED, middle.clock)
    coordinator = RepositoryStore(middle, details)
    below = _rooms(data, "task", task_spine)
    await asyncio.to_thread(migrate, Path("services/task/migrations").absolute(), below.database.path)
    owner = TaskStore(below)
    for start in range(0, count, 1000):
        batch = [a_task(organization_id, row.id, number) for number in range(start, min(start + 1000, count))]
        async with above.database.transaction() as tx:
            await root.tasks(tx, [Pushed(task.id, task.revision, False, task) for task in batch])
        async with middle.database.transaction() as tx:
            await coordinator.put_tasks(tx, batch)
        async with below.database.transaction() as tx:
            for task in batch:
                session = Session(id=f"ses_{task.id[5:]}", task_id=task.id, revision=1)
                await owner.create(tx, CreateTaskRequest(task=task, session=session, repository=row))
    for parts in (above, middle, below):
        await parts.database.close()


def _rooms(data: Path, name: str, spine: SpineTables) -> Chassis:
    config = ServiceConfig(listen="127.0.0.1:0", data_dir=data / name, signing_key=SecretStr("unused" * 8))
    return chassis(name, config, spine, Path("services", name).absolute())


class Floor:
    """Three levels and a gateway of the floor."""

    def __init__(self, address: str, store: Store, pusher: Pusher, tasks: int) -> None:
        self.address = address
        self.seen: Seen = lambda _id, _revision: None
        self._store = store
        self._pusher = pusher
        self._rows = {
            f"task_{number:032d}": a_task("org_" + "0" * 32, "repo_" + "0" * 32, number) for number in range(tasks)
        }
        self.ids = list(self._rows)
        self._batch = 0

    def revision(self, entity: str) -> int:
        """Return the newest revision of an entity."""
        return self._rows[entity].revision

    async def commit(self, ids: Sequence[str]) -> list[int]:
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
        return [entry.revision for entry in request.entries]

    async def follow(self) -> None:
        """Watch the gateway and tell of everything that arrives."""
        async with grpc.aio.insecure_channel(self.address, options=OPTIONS) as channel:
            async for batch in channel.unary_stream(WATCH)(b""):
                for entry in PushRequest.FromString(batch).entries:
                    self.seen(entry.id, entry.revision)


@asynccontextmanager
async def floor(folder: Path, tasks: int) -> AsyncGenerator[Floor, None]:
    """Run the floor with so many entities."""
    folder.mkdir(parents=True, exist_ok=True)
    root, middle, door = (f"127.0.0.1:{free_port()}" for _ in range(3))
    commands = (
        (root, "--database", str(folder / "root.sqlite")),
        (middle, "--database", str(folder / "middle.sqlite"), "--upstream", root),
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
                yield Floor(door, Store(folder / "child.sqlite"), Pusher(channel), tasks)
    finally:
        for process in running:
            process.terminate()
            await process.wait()
