"""The repository's parts over a real database, without its neighbours; and the whole service with a task service."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import pytest_asyncio
from branchline.v1.common_pb2 import ENTITY_KIND_TASK, Prompt
from branchline.v1.repositories_pb2 import Repository
from branchline.v1.tasks_pb2 import BranchChoice, CreateTaskRequest, Task
from branchline.v1.tasks_pb2_grpc import TaskServiceStub
from branchline_internal.repository.v1.repository_pb2 import EnsureRepositoryRequest
from branchline_internal.repository.v1.repository_pb2_grpc import RepositoryServiceStub
from branchline_internal.spine.v1.push_pb2 import PushEntry, PushRequest
from branchline_internal.spine.v1.push_pb2_grpc import PushServiceStub
from branchline_internal.task.v1 import task_pb2
from google.protobuf.message import Message
from sqlalchemy import select

from services.repository.creation import Creation
from services.repository.deletion import Deletion
from services.repository.ingest import RepositoryIngest
from services.repository.service import RepositoryConfig, build
from services.repository.store import RepositoryStore
from services.repository.tables import WATCHED
from services.repository.workbench import Workbench
from services.runtime.clock import Clock
from services.runtime.config import Secret, ServiceConfig
from services.runtime.database import Database, Reader, Statement, open_database
from services.runtime.errors import NotFound
from services.runtime.principal import Principal, bind_principal
from services.runtime.service import Chassis, Service
from services.runtime.spine.index import Index
from services.runtime.spine.ingest import Ingest, Refused
from services.runtime.spine.outbox import COORDINATOR, Outbox
from services.runtime.spine.tables import outbox as outbox_table
from tests.support.databases import migrated

PRINCIPAL = Principal(user_id="usr_1", organization_id="org_1", role=10, default_agent="mock")
KEY = Secret("k" * 32)

MARKED = Statement(select(outbox_table).order_by(outbox_table.c.seq))


@dataclass
class Room:
    """The parts of a repository service."""

    database: Database
    outbox: Outbox
    clock: Clock
    index: Index
    store: RepositoryStore
    workbench: Workbench
    deletion: Deletion
    handlers: RepositoryIngest
    ingest: Ingest
    creation: Creation
    ahead: list[timedelta]
    """How far its clock is ahead: the last one counts."""

    async def add_repository(self, repository_id: str = "repo_1", organization_id: str = "org_1") -> None:
        repository = Repository(id=repository_id, organization_id=organization_id, display_name="acme/shop", revision=1)
        await self.database.write(self.store.ensure, EnsureRepositoryRequest(repository=repository))

    async def create(self, repository_id: str = "repo_1", branch: str = "", text: str = "Add a window") -> Task:
        return await self.choose(BranchChoice(new_branch=branch) if branch else BranchChoice(), repository_id, text)

    async def choose(self, choice: BranchChoice, repository_id: str = "repo_1", text: str = "Add a window") -> Task:
        """Create a task on a branch of choice."""
        request = CreateTaskRequest(repository_id=repository_id, prompt=Prompt(text=text), branch=choice)
        answer = await self.database.write(self.creation.create, request, self.creation.prepare(request))
        return answer.task

    async def push(self, *states: Any, deleted: bool = False) -> Refused:
        """Have a task's states applied as one batch; return what was refused."""
        return await self.ingest.submit(PushRequest(entries=[entry(state, deleted=deleted) for state in states]))

    async def marked(self, message: type[Message], destination: str = COORDINATOR) -> list[Any]:
        """Return what waits to leave, oldest first, as (state, deleted)."""
        rows = await self.database.read(Reader.rows, MARKED)
        name = message.DESCRIPTOR.full_name
        return [
            (message.FromString(row.payload), row.deleted)
            for row in rows
            if row.destination == destination and row.type_url.endswith("/" + name)
        ]

    async def place(self, task_id: str) -> Any:
        return (await self.database.read(self.workbench.places, [task_id])).get(task_id)

    async def statements_of(self, work: Callable[[], Any]) -> int:
        before = self.database.statements
        await work()
        return self.database.statements - before


def entry(state: Any, *, deleted: bool = False) -> PushEntry:
    pushed = PushEntry(id=state.id, revision=getattr(state, "revision", 1), deleted=deleted)
    pushed.state.Pack(state)
    return pushed


def newer(task: Task, **changes: Any) -> Task:
    """Return the next state of a task."""
    following = Task()
    following.CopyFrom(task)
    following.revision += 1
    for name, value in changes.items():
        if isinstance(value, Message):
            getattr(following, name).CopyFrom(value)
        else:
            setattr(following, name, value)
    return following


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Return the URL of an empty database."""
    return migrated("repository", tmp_path)


@pytest_asyncio.fixture
async def room(url: str) -> AsyncGenerator[Room, None]:
    ahead = [timedelta()]
    database, clock = open_database(url), Clock(now=lambda: datetime.now(UTC) + ahead[-1])
    await database.start()
    index = Index(database, WATCHED, clock)
    await index.start()
    outbox = Outbox(database, clock)
    store, workbench = RepositoryStore(outbox, clock), Workbench(index)
    deletion = Deletion(database, outbox, clock, store, workbench)
    handlers = RepositoryIngest(outbox, clock, store, workbench, deletion)
    creation = Creation(outbox, clock, store, workbench, "local")
    bind_principal(PRINCIPAL)
    ingest = handlers.ingest(database)
    yield Room(database, outbox, clock, index, store, workbench, deletion, handlers, ingest, creation, ahead)
    await database.close()


@dataclass
class Owner:
    """A task service that takes what it is told."""

    created: list[task_pb2.CreateTaskRequest] = field(default_factory=list[task_pb2.CreateTaskRequest])
    deleted: list[str] = field(default_factory=list[str])
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once it may answer."""
    knows: bool = True
    """Whether it has the tasks that it is told to delete."""

    async def CreateTask(self, request: task_pb2.CreateTaskRequest, _context: Any) -> task_pb2.CreateTaskResponse:
        await self.ready.wait()
        self.created.append(request)
        return task_pb2.CreateTaskResponse()

    async def DeleteTask(self, request: task_pb2.DeleteTaskRequest, _context: Any) -> task_pb2.DeleteTaskResponse:
        if not self.knows:
            raise NotFound(ENTITY_KIND_TASK, request.task_id)
        self.deleted.append(request.task_id)
        return task_pb2.DeleteTaskResponse()


@dataclass
class Running:
    """A repository service that runs, and who calls it."""

    service: Service
    owner: Owner
    caller: Chassis

    def stub(self, stub: Any, principal: Principal = PRINCIPAL) -> Any:
        bind_principal(principal)
        return self.caller.stub(stub, "repository")

    async def add_repository(self, repository_id: str = "repo_1", organization_id: str = "org_1") -> None:
        repository = Repository(id=repository_id, organization_id=organization_id, display_name="acme/shop", revision=1)
        stub = self.stub(RepositoryServiceStub, Principal(service="organization"))
        await stub.EnsureRepository(EnsureRepositoryRequest(repository=repository))

    async def create(self, principal: Principal = PRINCIPAL, **given: Any) -> Task:
        fields: dict[str, Any] = {"repository_id": "repo_1", "prompt": Prompt(text="Add a window"), **given}
        return (await self.stub(TaskServiceStub, principal).CreateTask(CreateTaskRequest(**fields))).task

    async def push(self, *states: Any, deleted: bool = False) -> None:
        """Push as the task service does, and wait for the acknowledgement."""
        call = self.stub(PushServiceStub, Principal(service="task")).Push()
        await call.write(
            PushRequest(child="task", batch=1, entries=[entry(state, deleted=deleted) for state in states])
        )
        answer = await call.read()
        call.cancel()
        assert list(answer.rejected) == []


@asynccontextmanager
async def running_repository(url: str, owner: Owner) -> AsyncGenerator[Running, None]:
    with TemporaryDirectory() as sockets:  # a socket's path must be short
        addresses = {name: f"unix:{sockets}/{name}" for name in ("organization", "repository", "task", "caller")}
        folder = Path(sockets)
        config = RepositoryConfig(
            addresses=addresses, data_dir=folder, database_url=Secret(url), signing_key=KEY, drain_seconds=0.1
        )
        child = Service("task", addresses["task"], _everybody, 0.1)
        child.serve(owner, task_pb2.DESCRIPTOR, "TaskService")
        caller = Chassis("caller", ServiceConfig(addresses=addresses, data_dir=folder, signing_key=KEY), folder, ())
        service = build(config)
        async with child.running(), service.running():
            yield Running(service, owner, caller)
            for close in caller.service.after_stop[1:]:
                await close()


async def _everybody(_call: Any) -> None:
    return


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


@pytest_asyncio.fixture
async def running(url: str) -> AsyncGenerator[Running, None]:
    owner = Owner()
    owner.ready.set()
    async with running_repository(url, owner) as service:
        yield service
