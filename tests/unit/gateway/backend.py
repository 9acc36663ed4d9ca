"""What stands behind a gateway under test: a real index, served by real gRPC, that can go away and come back."""

import asyncio
import base64
import hashlib
import subprocess
import sys
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil
from branchline.v1 import common_pb2, errors_pb2, organizations_pb2, organizations_pb2_grpc, tasks_pb2, tasks_pb2_grpc
from branchline.v1.common_pb2 import Consistency
from branchline.v1.history_pb2 import HistoryEvent
from branchline.v1.organizations_pb2 import Member
from branchline.v1.roles_pb2 import ROLE_ADMIN, Role
from branchline.v1.tasks_pb2 import TASK_STATE_ACTIVE, Task, TaskFilter, TaskSummary
from branchline.v1.transcripts_pb2 import TranscriptEntry
from branchline.v1.users_pb2 import TokenScope, User, UserTaskState
from branchline.v1.watches_pb2 import CHANGE_TYPE_UPSERTED, FRAME_KIND_RESET, FRAME_KIND_SYNCED, FrameHeader
from branchline_internal.organization.v1 import organization_pb2, organization_pb2_grpc
from branchline_internal.repository.v1 import repository_pb2, repository_pb2_grpc
from branchline_internal.spine.v1.push_pb2 import ResumePoint, WatchFrame, WatchSelection
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from sqlalchemy import Column, MetaData, String

from gateway.service import GatewayConfig, build
from services.runtime.clock import Clock
from services.runtime.config import Secret
from services.runtime.database import Database, open_database
from services.runtime.errors import NotFound, Unauthenticated
from services.runtime.principal import METADATA_KEY, Signer, bind_principal, current_principal
from services.runtime.service import Service
from services.runtime.serving import Call
from services.runtime.spine.hub import Kind
from services.runtime.spine.index import Entry, Index, IndexTable
from services.runtime.spine.source import watch_index
from services.runtime.spine.tables import add_spine_tables, index_table
from services.runtime.spine.tokens import consistency_token, parse_consistency
from tests.support.client import Client
from tests.support.databases import created

KEY = "k" * 32
ORGANIZATION_ID = "org_1"
TASK, STATE = common_pb2.ENTITY_KIND_TASK, common_pb2.ENTITY_KIND_USER_TASK_STATE
EVENT, ENTRY = common_pb2.ENTITY_KIND_HISTORY_EVENT, common_pb2.ENTITY_KIND_TRANSCRIPT_ENTRY
OF_ORGANIZATION, OF_TASK, OF_HISTORY = (TASK, STATE), (TASK, ENTRY), (EVENT,)

metadata = MetaData()
add_spine_tables(metadata, coordinator=True)
tasks = index_table("tasks", metadata, comment="Coordinator index of a test")
states = index_table("states", metadata, comment="Coordinator index of a test")
events = index_table("events", metadata, comment="Coordinator index of a test")
entries = index_table("entries", metadata, Column("session_id", String(64)), comment="Coordinator index of a test")


def index_of(database: Database) -> Index:
    tables = [
        IndexTable(TASK, tasks, TaskSummary),
        IndexTable(STATE, states, UserTaskState, identity=("task_id", "user_id")),
        IndexTable(EVENT, events, HistoryEvent),
        IndexTable(ENTRY, entries, TranscriptEntry, identity=("id", "session_id")),
    ]
    return Index(database, tables, Clock())


def task_entry(name: str, revision: int, *, text: str = "", deleted: bool = False, **fields: Any) -> Entry:
    given: dict[str, Any] = {"state": TASK_STATE_ACTIVE, **fields}
    task = TaskSummary(id=name, revision=revision, title=text, **given)
    return Entry(TASK, ORGANIZATION_ID, name, revision, task, deleted=deleted)


def state_entry(name: str, revision: int, user_id: str) -> Entry:
    state = UserTaskState(task_id=name, user_id=user_id, revision=revision)
    return Entry(STATE, ORGANIZATION_ID, name, revision, state, viewer_id=user_id)


def event_entry(name: str, sequence: int, task_id: str = "") -> Entry:
    event = HistoryEvent(id=name, sequence=sequence, task_id=task_id)
    return Entry(EVENT, ORGANIZATION_ID, name, sequence, event, task_id=task_id)


def transcript_entry(name: str, revision: int, session_id: str, task_id: str = "task_1") -> Entry:
    entry = TranscriptEntry(id=name, revision=revision, session_id=session_id)
    return Entry(ENTRY, task_id, name, revision, entry, task_id=task_id, columns={"session_id": session_id})


@dataclass
class Scope:
    """A coordinator's watch of one scope."""

    index: Index
    scope: str
    selection: WatchSelection
    kinds: Sequence[Kind] = OF_ORGANIZATION

    async def frames(self, topic: str, remaining: float | None = None) -> AsyncGenerator[WatchFrame, None]:
        fresh = parse_consistency(self.selection.consistency)
        viewer = self.selection.viewer_id
        await self.index.await_point(fresh.point, ORGANIZATION_ID, viewer, remaining, fresh.wait_seconds)
        async for frame in watch_index(self.index, topic, self.scope, self.kinds, self.selection):
            yield frame


@dataclass
class Backend(organization_pb2_grpc.OrganizationServiceServicer):
    """Organization and repository in one, as far as a gateway sees them."""

    folder: Path
    url: str = ""
    index: Index = field(init=False)
    database: Database = field(init=False)
    tokens: dict[str, User] = field(default_factory=dict[str, User])
    members: dict[str, dict[str, Role.ValueType]] = field(default_factory=dict[str, dict[str, Role.ValueType]])
    """Roles by organization, by user."""
    scopes: dict[str, TokenScope] = field(default_factory=dict[str, TokenScope])
    """What tokens are held to, by their hashes."""
    placed: set[str] = field(default_factory=lambda: {"task_1"})
    selections: list[WatchSelection] = field(default_factory=list[WatchSelection])
    """Every upstream watch that was opened."""
    filters: list[tuple[list[int], TaskFilter]] = field(default_factory=list[tuple[list[int], TaskFilter]])
    """How much of the organization each of them wanted."""
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
    creations: int = 0
    """Calls of CreateTask."""
    accepted: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    """Invitations that were accepted: codes, and the users whom they were told of."""

    def __post_init__(self) -> None:
        self.url = self.url or created(metadata, self.folder / f"{uuid.uuid4().hex}.sqlite")
        self.add_caller("token", "usr_1")
        self.answering.set()

    @property
    def addresses(self) -> dict[str, str]:
        owners = dict.fromkeys(("organization", "repository", "task", "sandbox", "user"), f"unix:{self.folder}/backend")
        return {**owners, "gateway": f"unix:{self.folder}/gateway", **self.elsewhere}

    def add_caller(
        self, token: str, user_id: str, role: Role.ValueType = ROLE_ADMIN, scope: TokenScope | None = None
    ) -> None:
        hashed = hashlib.sha256(token.encode()).hexdigest()
        self.tokens[hashed] = User(id=user_id, display_name=user_id)
        self.members.setdefault(user_id, {ORGANIZATION_ID: role})
        if scope is not None:
            self.scopes[hashed] = scope

    def revoke(self, token: str) -> None:
        del self.tokens[hashlib.sha256(token.encode()).hexdigest()]

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None, None]:
        """Serve, on the database that is there."""
        self.database = open_database(self.url)
        await self.database.start()
        self.index = index_of(self.database)
        await self.index.start()
        signers = [Signer(KEY, owner) for owner in self.addresses]

        async def admit(call: Call) -> None:
            for signer in signers:  # it is all services at once
                with suppress(Unauthenticated):
                    return bind_principal(signer.verify(call.metadata(METADATA_KEY)))
            raise Unauthenticated(errors_pb2.ERROR_REASON_PRINCIPAL_INVALID, "a principal for nobody here")

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
            raise Unauthenticated(
                errors_pb2.ERROR_REASON_TOKEN_INVALID, "the bearer token is unknown, expired or revoked"
            )
        memberships = [
            Member(organization_id=one, user_id=user.id, role=role)
            for one, role in self.members.get(user.id, {}).items()
        ]
        scope = self.scopes.get(request.token_hash)
        return organization_pb2.AuthenticateResponse(user=user, memberships=memberships, scope=scope)

    async def ResolveRoute(self, request: organization_pb2.ResolveRouteRequest, context: Any) -> Any:
        wanted = getattr(request, request.WhichOneof("target") or "")
        known = {ORGANIZATION_ID, *self.placed}
        role = self.members.get(request.user_id, {}).get(ORGANIZATION_ID)
        if wanted not in known or role is None:
            raise NotFound(TASK, wanted)
        return organization_pb2.ResolveRouteResponse(organization_id=ORGANIZATION_ID, role=role)

    async def AwaitConsistency(self, request: organization_pb2.AwaitConsistencyRequest, context: Any) -> Any:
        fresh = parse_consistency(request.consistency)
        remaining = context.time_remaining()
        await self.index.await_point(fresh.point, request.organization_id, "", remaining, fresh.wait_seconds)
        return organization_pb2.AwaitConsistencyResponse()

    async def WatchIndex(self, request: organization_pb2.WatchIndexRequest, context: Any) -> AsyncIterator[Any]:
        self.selections.append(request.selection)
        self.filters.append((list(request.kinds), request.tasks))
        await self.answering.wait()
        kinds = OF_HISTORY if request.history else OF_ORGANIZATION
        scope = Scope(self.index, request.organization_id, request.selection, kinds)
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
        scope = Scope(self.backend.index, request.task_id, request.selection, OF_TASK)
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
        self.backend.creations += 1
        return tasks_pb2.CreateTaskResponse(task=Task(id="task_new"), consistency_token=request.prompt.text)


@dataclass
class _Organizations(organizations_pb2_grpc.OrganizationServiceServicer):
    backend: Backend

    async def RemoveMember(self, request: organizations_pb2.RemoveMemberRequest, context: Any) -> Any:
        self.backend.members.get(request.user_id, {}).pop(request.organization_id, None)
        return organizations_pb2.RemoveMemberResponse()

    async def AcceptInvitation(self, request: organizations_pb2.AcceptInvitationRequest, context: Any) -> Any:
        self.backend.accepted.append((request.code, current_principal().user_id))
        return organizations_pb2.AcceptInvitationResponse()


@dataclass
class View:
    """What one watching client holds, and what it was told."""

    held: dict[str, int] = field(default_factory=dict[str, int])
    headers: list[FrameHeader] = field(default_factory=list[FrameHeader])
    changes: list[tuple[int, Message]] = field(default_factory=list[tuple[int, Message]])
    """Every change, with its type."""
    token: str = ""
    places: list[tuple[str, dict[str, int]]] = field(default_factory=list[tuple[str, dict[str, int]]])
    """Each resume token with what was held when it came."""

    def take(self, response: Any) -> None:
        """Apply a response as every client must."""
        header = response.header
        if header.kind == FRAME_KIND_RESET:
            self.held.clear()
        for change in response.changes:
            entity = getattr(change, change.WhichOneof("entity"))
            self._apply(change.type, entity)
            self.changes.append((change.type, entity))
        if header.resume_token:
            self.token = header.resume_token
            self.places.append((header.resume_token, dict(self.held)))
        self.headers.append(header)

    def _apply(self, change_type: int, entity: Any) -> None:
        key = getattr(entity, "id", "") or entity.task_id
        if change_type == CHANGE_TYPE_UPSERTED:
            self.held[key] = entity.sequence if isinstance(entity, HistoryEvent) else entity.revision
        else:
            self.held.pop(key, None)

    @property
    def kinds(self) -> list[int]:
        return [header.kind for header in self.headers]

    @property
    def resets(self) -> list[int]:
        """Why everything began anew, each time."""
        return [header.reset_reason for header in self.headers if header.kind == FRAME_KIND_RESET]


def place_of(token: str) -> ResumePoint:
    """Return what is in a resume token."""
    return ResumePoint.FromString(base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_"))


def opened(client: Client, token: str = "", **fields: Any) -> Any:
    """Open a watch of the organization."""
    request = organizations_pb2.WatchOrganizationRequest(organization_id=ORGANIZATION_ID, resume_token=token, **fields)
    return client.organizations.WatchOrganization(request)


def opened_task(client: Client, token: str = "", **fields: Any) -> Any:
    """Open a watch of a task."""
    given: dict[str, Any] = {"task_id": "task_1", **fields}
    return client.tasks.WatchTask(tasks_pb2.WatchTaskRequest(resume_token=token, **given))


def as_new_as(name: str, revision: int, **max_wait: int) -> Consistency:
    """Return what demands that a task has been seen in this revision."""
    consistency = Consistency(at_least_as_fresh=[consistency_token([(TASK, name, revision)])])
    if max_wait:
        consistency.max_wait.CopyFrom(Duration(**max_wait))
    return consistency


async def until_synced(call: Any, view: View | None = None) -> View:
    """Read a watch until it is complete."""
    view = view or View()
    async with asyncio.timeout(20):
        while True:
            response = await call.read()
            assert response is not grpc.aio.EOF
            view.take(response)
            if response.header.kind == FRAME_KIND_SYNCED:
                return view


async def follow(call: Any, view: View) -> None:
    """Read a watch for ever."""
    while (response := await call.read()) is not grpc.aio.EOF:
        view.take(response)


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
