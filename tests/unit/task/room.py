"""The rules of the task room on a real database, without a server."""

import asyncio
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from branchline.v1 import sessions_pb2, tasks_pb2
from branchline.v1.common_pb2 import FAILURE_REASON_SANDBOX_FAILED, Actor, Prompt
from branchline.v1.history_pb2 import EventKind, HistoryEvent
from branchline.v1.repositories_pb2 import Repository
from branchline.v1.roles_pb2 import ROLE_MEMBER
from branchline.v1.sandboxes_pb2 import Sandbox
from branchline.v1.sessions_pb2 import QueuedMessage, Session
from branchline.v1.tasks_pb2 import Task
from branchline.v1.transcripts_pb2 import InputRequest, TranscriptEntry
from branchline_internal.sandbox.v1.sandbox_pb2 import AgentReport, AgentSession
from branchline_internal.spine.v1.push_pb2 import PushEntry, PushRequest
from branchline_internal.task.v1.task_pb2 import CreateTaskRequest
from google.protobuf.any_pb2 import Any as Packed
from google.protobuf.message import Message
from sqlalchemy import select

from services.runtime.clock import Clock
from services.runtime.database import Database, Statement, open_database
from services.runtime.failures import failed
from services.runtime.principal import Principal
from services.runtime.spine.commands import Commands
from services.runtime.spine.outbox import Outbox
from services.runtime.spine.tables import outbox as outbox_table
from services.runtime.updates import etag_of
from services.task import message_queue
from services.task.ingest import TaskIngest
from services.task.inputs import INPUTS
from services.task.lifecycle import PROVISION, Lifecycle
from services.task.open_task import OpenTask
from services.task.public import PublicTaskServicer
from services.task.sessions import Sessions
from services.task.standing import IDLE, Standing
from services.task.store import ENTRIES, TaskStore
from services.task.turns import Turns
from tests.support.databases import migrated

M = TypeVar("M", bound=Message)

NOWHERE: Any = None
"""Stands for what a test never reaches."""

CALLER = Principal(user_id="usr_ann", organization_id="org_1", role=ROLE_MEMBER)

_MARKS = Statement(select(outbox_table).order_by(outbox_table.c.seq))


def new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def request_id() -> str:
    return str(uuid.uuid4())


def birth(task_id: str, **fields: Any) -> CreateTaskRequest:
    """Return what the coordinator sends for a new task with one session."""
    session = Session(
        id=task_id.replace("task_", "ses_"),
        task_id=task_id,
        display_name="Session 1",
        agent="scripted",
        state=sessions_pb2.SESSION_STATE_PENDING,
        revision=1,
    )
    session.etag = etag_of(session, ("display_name",))
    session.create_time.GetCurrentTime()
    task = Task(
        id=task_id,
        organization_id="org_1",
        repository_id="repo_1",
        title="A task",
        prompt=Prompt(text="do it"),
        branch="feat/a-task",
        state=tasks_pb2.TASK_STATE_QUEUED,
        owner_user_id="usr_ann",
        creator=Actor(user_id="usr_ann"),
        sandbox_provider="local",
        revision=1,
    )
    task.etag = etag_of(task, ("title",))
    task.state_time.GetCurrentTime()
    return CreateTaskRequest(
        task=task,
        session=session,
        repository=Repository(remote_url="file:///none.git", default_branch="main"),
        **fields,
    )


def entry_of(state: Message, entity_id: str, revision: int) -> PushEntry:
    packed = Packed()
    packed.Pack(state)
    return PushEntry(outbox_seq=1, id=entity_id, revision=revision, state=packed)


@dataclass
class Room:
    """The parts of the task service that know no server."""

    database: Database
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.outbox = Outbox(self.database, self.clock)
        self.store = TaskStore(self.outbox, self.clock)
        self.turns = Turns(self.store)
        self.lifecycle = Lifecycle()
        self.commands = Commands(self.database, self.clock)
        self.ingest = TaskIngest(self.store, self.turns).ingest(self.database)
        self.public = PublicTaskServicer(self.commands, self.store, self.lifecycle)
        self.sessions = Sessions(self.clock, self.store, self.turns)

    async def task(self, standing: Standing = IDLE, *, sessions: int = 1) -> OpenTask:
        """Make a task that was provisioned, in a standing that no agent brought about."""
        task_id = new_id("task")
        await self.database.write(self.store.create, birth(task_id), PROVISION)
        for _ in range(sessions - 1):
            await self.change(task_id, lambda task: task.add_session(_another_session(task_id)))
        await self.change(task_id, lambda task: _provision(task, standing))
        return await self.read(task_id)

    async def change(self, task_id: str, change: Callable[[OpenTask], object]) -> None:
        """Open a task and do something with it."""

        def do(tx: Any) -> None:
            with self.store.open(tx, task_id) as task:
                change(task)

        await self.database.write(do)

    async def read(self, task_id: str) -> OpenTask:
        return await self.database.read(self.store.read, task_id)

    async def entry(self, entry_id: str) -> TranscriptEntry:
        return await self.database.read(lambda tx: ENTRIES.get(tx, entry_id))

    async def queued(self, task_id: str) -> list[QueuedMessage]:
        """Return what waits in a task, in order."""
        found = await self.database.read(message_queue.waiting, [task_id])
        return found.get(task_id, [])

    async def input(self, request_id: str) -> InputRequest:
        return await self.database.read(lambda tx: INPUTS.get(tx, request_id))

    async def marks(self, message: type[M], destination: str = "") -> list[M]:
        """Return what waits in the outbox of a type, oldest first."""
        rows = await self.database.read(lambda tx: tx.rows(_MARKS))
        name = f"/{message.DESCRIPTOR.full_name}"
        return [
            message.FromString(row.payload)
            for row in rows
            if row.type_url.endswith(name) and destination in ("", row.destination)
        ]

    async def events(self, task_id: str) -> list[str]:
        """Return the kinds of a task's events, without their prefix."""
        found = [event for event in await self.marks(HistoryEvent) if event.task_id == task_id]
        return [EventKind.Name(event.kind).removeprefix("EVENT_KIND_") for event in found]

    async def push(self, *states: Message) -> dict[int, str]:
        """Apply one batch as if sandboxes had pushed it; return what was refused."""
        entries = [entry_of(state, _id(state), _revision(state)) for state in states]
        async with asyncio.timeout(10):
            return await self.ingest.submit(PushRequest(entries=entries))


def _another_session(task_id: str) -> Session:
    session = Session(id=new_id("ses"), task_id=task_id, display_name="Session", agent="scripted")
    session.state = sessions_pb2.SESSION_STATE_IDLE
    session.create_time.GetCurrentTime()
    return session


def _provision(task: OpenTask, standing: Standing) -> None:
    task.row.provisioned = True
    task.task.active_sandbox_id = new_id("sbx")
    task.arrive()
    task.task.state, task.task.activity = standing
    task.change()
    for session in task.sessions:
        task.stand(session, sessions_pb2.SESSION_STATE_IDLE)


def _id(state: Message) -> str:
    if isinstance(state, AgentSession):
        return state.session_id
    return state.sandbox_id if isinstance(state, AgentReport) else getattr(state, "id")  # noqa: B009


def _revision(state: Message) -> int:
    return getattr(state, "revision")  # noqa: B009


def sandbox_of(task: OpenTask, state: Any, words: str = "", revision: int = 1) -> Sandbox:
    sandbox = Sandbox(id=task.task.active_sandbox_id, task_id=task.task.id, state=state, revision=revision)
    if words:
        sandbox.failure.CopyFrom(failed(FAILURE_REASON_SANDBOX_FAILED, words, "the machine's last words"))
    return sandbox


def new_database(folder: Path) -> Database:
    return open_database(migrated("task", folder))
