"""What stands behind a gateway under test: a real index, served by real gRPC, that can go away and come back."""

import asyncio
import hashlib
import subprocess
import sys
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil
from branchline.client import Client
from branchline.v1 import organizations_pb2, organizations_pb2_grpc, tasks_pb2, tasks_pb2_grpc
from branchline.v1 import vocabulary_pb2 as words
from branchline.v1.organizations_pb2 import ROLE_ADMIN, Member
from branchline.v1.tasks_pb2 import Task
from branchline.v1.users_pb2 import User, UserTaskState
from branchline.v1.watches_pb2 import WATCH_FRAME_KIND_SYNCED, WatchChange, WatchFrame
from branchline_internal.organization.v1 import organization_pb2, organization_pb2_grpc
from branchline_internal.repository.v1 import repository_pb2, repository_pb2_grpc
from branchline_internal.spine.v1.push_pb2 import WatchSelection
from sqlalchemy import MetaData

from gateway.service import GatewayConfig, build
from services.runtime.clock import Clock
from services.runtime.config import Secret
from services.runtime.database import Database, open_database
from services.runtime.errors import NotFound, Unauthenticated
from services.runtime.principal import METADATA_KEY, Signer, bind_principal
from services.runtime.service import Service
from services.runtime.serving import Call
from services.runtime.spine.hub import Hub
from services.runtime.spine.index import Entry, Index, IndexTable
from services.runtime.spine.tables import add_spine_tables, index_table
from services.runtime.spine.tokens import Position, parse_consistency_token, parse_resume_token
from services.runtime.spine.watch import EVERYBODY, Page, Watch, watch
from tests.support.databases import created

KEY = "k" * 32
ORGANIZATION_ID = "org_1"
TASK, STATE = words.ENTITY_KIND_TASK, words.ENTITY_KIND_USER_TASK_STATE
KINDS = (TASK, STATE)

metadata = MetaData()
add_spine_tables(metadata, coordinator=True)
tasks = index_table("tasks", metadata, comment="Coordinator index of a test")
states = index_table("states", metadata, comment="Coordinator index of a test")


def index_of(database: Database) -> Index:
    return Index(database, [IndexTable(TASK, tasks, Task), IndexTable(STATE, states, UserTaskState)], Clock())


def task_entry(
    name: str, revision: int, *, scope: str = ORGANIZATION_ID, text: str = "", deleted: bool = False
) -> Entry:
    return Entry(TASK, ORGANIZATION_ID, name, revision, Task(id=name, revision=revision, title=text), deleted=deleted)


def state_entry(name: str, revision: int, user_id: str) -> Entry:
    state = UserTaskState(task_id=name, user_id=user_id, revision=revision)
    return Entry(STATE, ORGANIZATION_ID, name, revision, state, viewer_id=user_id)


@dataclass
class Scope:
    """The source of a coordinator's watch."""

    index: Index
    scope: str
    selection: WatchSelection
    live: bool = True

    @property
    def hub(self) -> Hub:
        return self.index.hub

    def catch_up(self, position: Position | None) -> AsyncIterator[Page]:
        return self.index.catch_up(self.scope, KINDS, position, self.selection.viewer_id, tail=self.selection.tail)

    def visible(self, change: WatchChange) -> bool:
        return self.selection.viewer_id in (EVERYBODY, change.viewer_id) or not change.viewer_id

    async def frames(self, topic: str, remaining: float | None) -> AsyncIterator[WatchFrame]:
        point = parse_consistency_token(self.selection.consistency_token)
        await self.index.await_point(point, ORGANIZATION_ID, self.selection.viewer_id, remaining)
        position = parse_resume_token(self.selection.resume_token, topic)
        wanted = Watch(topic, position, self.visible, until_synced=self.selection.until_synced)
        async for frame in watch(self, wanted):
            yield frame


@dataclass
class Backend(organization_pb2_grpc.OrganizationServiceServicer):
    """Organization and repository in one, as far as a gateway sees them."""

    folder: Path
    url: str = ""
    index: Index = field(init=False)
    database: Database = field(init=False)
    tokens: dict[str, User] = field(default_factory=dict[str, User])
    members: dict[str, set[str]] = field(default_factory=dict[str, set[str]])
    placed: set[str] = field(default_factory=lambda: {"task_1"})
    selections: list[WatchSelection] = field(default_factory=list[WatchSelection])
    """Every upstream watch that was opened."""
    asked: int = 0
    """Calls of Authenticate."""
    answering: asyncio.Event = field(default_factory=asyncio.Event)
    """Upstream watches are accepted and wait for this."""
    elsewhere: dict[str, str] = field(default_factory=dict[str, str])
    """Owners that are not served here, with their addresses."""
    got: list[tuple[str, float | None]] = field(default_factory=list[tuple[str, float | None]])
    """Every call of GetTask, with the time it had."""
    held: dict[str, asyncio.Event] = field(default_factory=dict[str, asyncio.Event])
    """What calls of GetTask for a task wait for."""

    def __post_init__(self) -> None:
        self.url = self.url or created(metadata, self.folder / f"{uuid.uuid4().hex}.sqlite")
        self.add_caller("token", "usr_1")
        self.answering.set()

    @property
    def addresses(self) -> dict[str, str]:
        owners = dict.fromkeys(("organization", "repository", "task", "sandbox", "user"), f"unix:{self.folder}/backend")
        return {**owners, "gateway": f"unix:{self.folder}/gateway", **self.elsewhere}

    def add_caller(self, token: str, user_id: str) -> None:
        self.tokens[hashlib.sha256(token.encode()).hexdigest()] = User(id=user_id, display_name=user_id)
        self.members[user_id] = {ORGANIZATION_ID}

    def revoke(self, token: str) -> None:
        del self.tokens[hashlib.sha256(token.encode()).hexdigest()]

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None, None]:
        """Serve, on the database that is there."""
        self.database = open_database(self.url)
        await self.database.start()
        self.index = index_of(self.database)
        await self.index.start()
        signer = Signer(KEY, "backend")

        async def admit(call: Call) -> None:
            bind_principal(signer.verify(call.metadata(METADATA_KEY)))

        service = Service("backend", self.addresses["organization"], admit, 0.2)
        service.serve(self, organization_pb2.DESCRIPTOR, "OrganizationService")
        service.serve(_Repository(self), repository_pb2.DESCRIPTOR, "RepositoryService")
        service.serve(_Tasks(self), tasks_pb2.DESCRIPTOR, "TaskService")
        service.serve(_Organizations(self), organizations_pb2.DESCRIPTOR, "OrganizationService")
        try:
            async with service.running():
                yield
        finally:
            await self.database.close()

    @asynccontextmanager
    async def gateway(self, calls_per_minute: int = 10**6) -> AsyncGenerator[Service, None]:
        """Run a gateway in front of it."""
        config = GatewayConfig(
            addresses=self.addresses,
            signing_key=Secret(KEY),
            calls_per_minute=calls_per_minute,
            drain_seconds=0.2,
        )
        service = build(config)
        async with service.running():
            yield service

    def client(self, token: str = "token") -> Client:
        return Client(self.addresses["gateway"], token)

    async def put(self, *entries: Entry) -> None:
        """Commit changes, each in a transaction of its own."""
        for entry in entries:
            await self.database.write(self.index.put, entry)

    async def put_all(self, entries: list[Entry]) -> None:
        await self.database.write(self.index.put_many, entries)

    async def put_unheard(self, *entries: Entry) -> None:
        """Commit changes while nothing serves."""
        database = open_database(self.url)
        await database.start()
        index = index_of(database)
        for entry in entries:
            await database.write(index.put, entry)
        await database.close()

    async def Authenticate(self, request: organization_pb2.AuthenticateRequest, context: Any) -> Any:
        self.asked += 1
        user = self.tokens.get(request.token_hash)
        if user is None:
            raise Unauthenticated(words.ERROR_REASON_TOKEN_INVALID, "the bearer token is unknown, expired or revoked")
        memberships = [
            Member(organization_id=one, user_id=user.id, role=ROLE_ADMIN) for one in self.members.get(user.id, ())
        ]
        return organization_pb2.AuthenticateResponse(user=user, memberships=memberships)

    async def ResolveRoute(self, request: organization_pb2.ResolveRouteRequest, context: Any) -> Any:
        wanted = getattr(request, request.WhichOneof("target") or "")
        known = {ORGANIZATION_ID, *self.placed}
        if wanted not in known or ORGANIZATION_ID not in self.members.get(request.user_id, ()):
            raise NotFound(TASK, wanted)
        return organization_pb2.ResolveRouteResponse(organization_id=ORGANIZATION_ID, role=ROLE_ADMIN)

    async def AwaitConsistency(self, request: organization_pb2.AwaitConsistencyRequest, context: Any) -> Any:
        point = parse_consistency_token(request.consistency_token)
        await self.index.await_point(point, request.organization_id, "", context.time_remaining())
        return organization_pb2.AwaitConsistencyResponse()

    async def WatchIndex(self, request: organization_pb2.WatchIndexRequest, context: Any) -> AsyncIterator[Any]:
        self.selections.append(request.selection)
        await self.answering.wait()
        scope = Scope(self.index, request.organization_id, request.selection)
        topic = f"{'history' if request.history else 'organization'}/{request.organization_id}"
        async for frame in scope.frames(topic, context.time_remaining()):
            yield organization_pb2.WatchIndexResponse(frame=frame)


@dataclass
class _Repository(repository_pb2_grpc.RepositoryServiceServicer):
    backend: Backend

    async def WatchIndex(self, request: repository_pb2.WatchIndexRequest, context: Any) -> AsyncIterator[Any]:
        if request.task_id not in self.backend.placed:
            raise NotFound(TASK, request.task_id)
        self.backend.selections.append(request.selection)
        scope = Scope(self.backend.index, request.task_id, request.selection)
        async for frame in scope.frames(f"task/{request.task_id}", context.time_remaining()):
            yield repository_pb2.WatchIndexResponse(frame=frame)


@dataclass
class _Tasks(tasks_pb2_grpc.TaskServiceServicer):
    backend: Backend

    async def GetTask(self, request: tasks_pb2.GetTaskRequest, context: Any) -> tasks_pb2.GetTaskResponse:
        self.backend.got.append((request.task_id, context.time_remaining()))
        if request.task_id in self.backend.held:
            await self.backend.held[request.task_id].wait()
        return tasks_pb2.GetTaskResponse(task=Task(id=request.task_id, title="a title"))

    async def CreateTask(self, request: tasks_pb2.CreateTaskRequest, context: Any) -> tasks_pb2.CreateTaskResponse:
        return tasks_pb2.CreateTaskResponse(task=Task(id="task_new"), consistency_token=request.title)


@dataclass
class _Organizations(organizations_pb2_grpc.OrganizationServiceServicer):
    backend: Backend

    async def RemoveMember(self, request: organizations_pb2.RemoveMemberRequest, context: Any) -> Any:
        self.backend.members.get(request.user_id, set()).discard(request.organization_id)
        return organizations_pb2.RemoveMemberResponse()


@dataclass
class View:
    """What one watching client holds, and what it was told."""

    held: dict[str, int] = field(default_factory=dict[str, int])
    frames: list[WatchFrame] = field(default_factory=list[WatchFrame])
    token: str = ""
    places: list[tuple[str, dict[str, int]]] = field(default_factory=list[tuple[str, dict[str, int]]])
    """Each resume token with what was held when it came."""

    def take(self, frame: WatchFrame) -> None:
        """Apply a frame as every client must."""
        if frame.kind == 1:
            self.held.clear()
        for change in frame.changes:
            if change.deleted:
                self.held.pop(change.id, None)
            else:
                self.held[change.id] = change.revision
        if frame.resume_token:
            self.token = frame.resume_token
            self.places.append((frame.resume_token, dict(self.held)))
        self.frames.append(WatchFrame(kind=frame.kind, change_seq=frame.change_seq, resume_token=frame.resume_token))

    @property
    def kinds(self) -> list[int]:
        return [frame.kind for frame in self.frames]


def opened(client: Client, token: str = "", consistency_token: str = "", **options: Any) -> Any:
    """Open a watch of the organization."""
    return client.organizations.WatchOrganization(
        organizations_pb2.WatchOrganizationRequest(
            organization_id=ORGANIZATION_ID, resume_token=token, consistency_token=consistency_token
        ),
        **options,
    )


async def until_synced(call: Any, view: View | None = None) -> View:
    """Read a watch until it is complete."""
    view = view or View()
    async with asyncio.timeout(20):
        while True:
            response = await call.read()
            assert response is not grpc.aio.EOF
            view.take(response.frame)
            if response.frame.kind == WATCH_FRAME_KIND_SYNCED:
                return view


async def follow(call: Any, view: View) -> None:
    """Read a watch for ever."""
    while (response := await call.read()) is not grpc.aio.EOF:
        view.take(response.frame)


async def eventually(holds: Any, seconds: float = 20.0) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(seconds):
        while not holds():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.01)


async def serve_gateway(folder: str) -> None:
    """Run a gateway in a process of its own, until it is killed."""
    async with Backend(Path(folder)).gateway():
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


@contextmanager
def gateway_process(folder: Path) -> Generator[psutil.Process, None, None]:
    """Run a gateway whose memory is its own."""
    program = (
        f"import asyncio; from tests.unit.gateway import backend; asyncio.run(backend.serve_gateway({str(folder)!r}))"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            while b"ready" not in process.stdout.readline():
                assert process.poll() is None
            yield psutil.Process(process.pid)
        finally:
            process.kill()


def peak_bytes(process: psutil.Process, *, reset: bool = False) -> int:
    """Return the most memory that a process has held since the last reset."""
    if reset:
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")
    line = next(one for one in Path(f"/proc/{process.pid}/status").read_text().splitlines() if one.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
