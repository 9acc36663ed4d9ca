"""Watches as views: what is watched, as it is now, kept up to date through breaks and resets.

A view holds the newest state of every entity. It connects again by itself and goes on where it was; where the server
begins anew, what is held stays until the new snapshot is complete, and what differs is told as changes. Readers are
told of entities, not of frames: however slow one is, at most one change of each entity waits for it.

    async with client.watch_task(task_id) as view:
        await view.wait_for(lambda view: view.task.state == TASK_STATE_ACTIVE)
        async for change in view.changes():
            ...
"""

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

import grpc
from google.protobuf.message import Message

from branchline.calls import is_transient
from branchline.errors import BranchlineError
from branchline.v1.agents_pb2 import Agent
from branchline.v1.history_pb2 import HistoryChange, HistoryEvent
from branchline.v1.organizations_pb2 import GithubStatus, Member, Organization, OrganizationChange
from branchline.v1.processes_pb2 import Process
from branchline.v1.repositories_pb2 import Repository
from branchline.v1.sandboxes_pb2 import Sandbox
from branchline.v1.sessions_pb2 import QueuedMessage, Session
from branchline.v1.tasks_pb2 import Task, TaskChange, TaskSummary
from branchline.v1.transcripts_pb2 import InputRequest, TranscriptEntry
from branchline.v1.users_pb2 import UserTaskState
from branchline.v1.watches_pb2 import (
    CHANGE_TYPE_REMOVED,
    CHANGE_TYPE_UPSERTED,
    FRAME_KIND_RESET,
    FRAME_KIND_SYNCED,
    ChangeType,
    FrameHeader,
)

FIRST_SILENCE_SECONDS = 30.0
"""How long the first frame may take; later ones come at least as often as the server's header says."""

_RETRY_SECONDS = (0.1, 5.0)


class Change(Protocol):
    """What happened to one entity: `OrganizationChange`, `TaskChange` or `HistoryChange`."""

    type: ChangeType.ValueType


class Response(Protocol):
    """One frame of a watch."""

    @property
    def header(self) -> FrameHeader:
        """What every frame carries."""
        ...

    @property
    def changes(self) -> Sequence[Any]:
        """The changes."""
        ...


C = TypeVar("C", bound=Message)
M = TypeVar("M", bound=Message)
Connect = Callable[[str], AsyncGenerator[Any, None]]
"""Opens the watch from a resume token."""

Key = tuple[str, str]
"""Which field of a change holds an entity, and its id."""


class View(Generic[C]):
    """What is watched, as it is now."""

    def __init__(self, connect: Connect, change: type[C], resume_token: str = "") -> None:
        self.resume_token = resume_token
        """Good for a later view of the same; what it missed comes as changes."""
        self.synced = False
        """Whether everything is here; false until the first snapshot is complete."""
        self.connected = False
        """Whether the server sends; while it is not, the view shows what it last knew."""
        self._connect = connect
        self._change = change
        self._held: dict[Key, Message] = {}
        self._arriving: dict[Key, Message] | None = None
        self._moved = asyncio.Condition()
        self._unread: list[dict[Key, C]] = []
        self._failure: Exception | None = None
        self._following: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._following = asyncio.create_task(self._follow())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop watching; who still waits gets BranchlineError, CANCELLED."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        await self._fail(self._failure or BranchlineError(grpc.StatusCode.CANCELLED, "the view is closed"))

    async def wait_for(self, holds: Callable[[Self], bool], timeout_seconds: float | None = None) -> Self:
        """Wait until the view is complete and something holds of it.

        Raise TimeoutError after so many seconds, or BranchlineError if the watch has failed for good.
        """
        async with asyncio.timeout(timeout_seconds), self._moved:
            while not (self.synced and holds(self)):
                if self._failure is not None:
                    raise self._failure
                await self._moved.wait()
        return self

    async def changes(self) -> AsyncGenerator[C, None]:
        """Yield what is held, then what changes, for ever; raise BranchlineError if the watch has failed for good.

        Of an entity that changes faster than it is read only the newest state is told, in the place of its last change.
        """
        unread = {key: self._told(CHANGE_TYPE_UPSERTED, key, entity) for key, entity in self._held.items()}
        self._unread.append(unread)
        try:
            while True:
                async with self._moved:
                    while not unread:
                        if self._failure is not None:
                            raise self._failure
                        await self._moved.wait()
                yield unread.pop(next(iter(unread)))
        finally:
            self._unread = [other for other in self._unread if other is not unread]

    def all(self, field: str, kind: type[M]) -> Mapping[str, M]:
        """Return the entities of one field of the change, by id, in the order in which they came."""
        held = self._held.copy()  # at once: plain code reads in another thread than the one that follows
        return {key[1]: entity for key, entity in held.items() if key[0] == field and isinstance(entity, kind)}

    def one(self, field: str, kind: type[M]) -> M:
        """Return the only entity of one field; an empty one before it is known."""
        return next(iter(self.all(field, kind).values()), kind())

    async def _follow(self) -> None:
        """Watch for ever, through breaks; what cannot be mended ends the view."""
        shortest, longest = _RETRY_SECONDS
        pause = shortest
        while True:
            wait = random.uniform(pause / 2, pause)
            try:
                silence = FIRST_SILENCE_SECONDS
                async with aclosing(self._connect(self.resume_token)) as frames:
                    while True:
                        async with asyncio.timeout(silence):
                            frame = await anext(frames)
                        pause = shortest
                        silence = 2 * frame.header.heartbeat_interval.ToTimedelta().total_seconds() or silence
                        await self._take(frame)
            except (StopAsyncIteration, TimeoutError):
                pass
            except Exception as error:  # noqa: BLE001 - nobody awaits this task: who waits for the view is told
                if not isinstance(error, BranchlineError) or not is_transient(error):
                    await self._fail(error)
                    return
                wait = error.retry_delay.total_seconds() if error.retry_delay is not None else wait
            async with self._moved:
                self.connected, self._arriving = False, None
                self._moved.notify_all()
            await asyncio.sleep(wait)
            pause = min(pause * 2, longest)

    async def _take(self, frame: Response) -> None:
        header = frame.header
        self.connected = True
        async with self._moved:
            if header.kind == FRAME_KIND_RESET:
                self._arriving = {}
            for change in frame.changes:
                self._apply(change)
            if header.kind == FRAME_KIND_SYNCED:
                if self._arriving is not None:
                    self._replace(self._arriving)
                    self._arriving = None
                self.synced = True
            self.resume_token = header.resume_token or self.resume_token
            self._moved.notify_all()

    def _apply(self, change: Any) -> None:
        field = change.WhichOneof("entity")
        if field is None:  # a kind that this client does not know
            return
        entity: Message = getattr(change, field)
        key = field, identity(entity)
        if self._arriving is not None:
            self._arriving[key] = entity
        elif change.type == CHANGE_TYPE_UPSERTED:
            self._held[key] = entity
            self._tell(key, change)
        elif self._held.pop(key, None) is not None:
            self._tell(key, change)

    def _replace(self, new: dict[Key, Message]) -> None:
        """Hold a new snapshot in the place of what was held, and tell what differs.

        What is no longer in it was removed from what the watch shows; whether it is gone nobody says.
        """
        old, self._held = self._held, new
        for key, entity in old.items():
            if key not in new:
                self._tell(key, self._told(CHANGE_TYPE_REMOVED, key, entity))
        for key, entity in new.items():
            if old.get(key) != entity:
                self._tell(key, self._told(CHANGE_TYPE_UPSERTED, key, entity))

    def _told(self, kind: ChangeType.ValueType, key: Key, entity: Message) -> C:
        change: Any = self._change()
        change.type = kind
        getattr(change, key[0]).CopyFrom(entity)
        return change

    def _tell(self, key: Key, change: C) -> None:
        for unread in self._unread:
            unread.pop(key, None)  # so that it stands behind what changed before it
            unread[key] = change

    async def _fail(self, error: Exception) -> None:
        async with self._moved:
            self.connected, self._failure = False, error
            self._moved.notify_all()


class OrganizationView(View[OrganizationChange]):
    """An organization with everything in it that the watch selects."""

    def __init__(self, connect: Connect, resume_token: str = "") -> None:
        super().__init__(connect, OrganizationChange, resume_token)

    @property
    def organization(self) -> Organization:
        """The organization itself."""
        return self.one("organization", Organization)

    @property
    def github_status(self) -> GithubStatus:
        """How its cache of GitHub stands."""
        return self.one("github_status", GithubStatus)

    @property
    def members(self) -> Mapping[str, Member]:
        """Its members, by user."""
        return self.all("member", Member)

    @property
    def repositories(self) -> Mapping[str, Repository]:
        """Its repositories, by id."""
        return self.all("repository", Repository)

    @property
    def tasks(self) -> Mapping[str, TaskSummary]:
        """Its tasks in brief, by id."""
        return self.all("task", TaskSummary)

    @property
    def agents(self) -> Mapping[str, Agent]:
        """Its agents, by name."""
        return self.all("agent", Agent)

    @property
    def input_requests(self) -> Mapping[str, InputRequest]:
        """What waits for a person, by id."""
        return self.all("input_request", InputRequest)

    @property
    def task_states(self) -> Mapping[str, UserTaskState]:
        """What the caller has open and unread, by "task" or "task/session"."""
        return self.all("user_task_state", UserTaskState)


class TaskView(View[TaskChange]):
    """A task with everything in it."""

    def __init__(self, connect: Connect, resume_token: str = "") -> None:
        super().__init__(connect, TaskChange, resume_token)

    @property
    def task(self) -> Task:
        """The task itself."""
        return self.one("task", Task)

    @property
    def sessions(self) -> Mapping[str, Session]:
        """Its sessions, by id."""
        return self.all("session", Session)

    @property
    def sandboxes(self) -> Mapping[str, Sandbox]:
        """Its sandboxes, by id."""
        return self.all("sandbox", Sandbox)

    @property
    def processes(self) -> Mapping[str, Process]:
        """Its processes, by id."""
        return self.all("process", Process)

    @property
    def input_requests(self) -> Mapping[str, InputRequest]:
        """What its agents wait for, by id."""
        return self.all("input_request", InputRequest)

    @property
    def queued_messages(self) -> Sequence[QueuedMessage]:
        """The messages that wait, in the order in which they will be sent."""
        return sorted(self.all("queued_message", QueuedMessage).values(), key=lambda message: message.place)

    def transcript(self, session_id: str) -> Sequence[TranscriptEntry]:
        """Return the entries of a session's transcript that are here, in their order."""
        entries = self.all("transcript_entry", TranscriptEntry).values()
        return sorted((one for one in entries if one.session_id == session_id), key=lambda one: one.position)


class HistoryView(View[HistoryChange]):
    """The feed of an organization, as far as it is shown."""

    def __init__(self, connect: Connect, resume_token: str = "") -> None:
        super().__init__(connect, HistoryChange, resume_token)

    @property
    def events(self) -> Sequence[HistoryEvent]:
        """The events, oldest first."""
        return sorted(self.all("history_event", HistoryEvent).values(), key=lambda event: event.sequence)


def identity(entity: Any) -> str:
    """Return what tells an entity from others of its kind."""
    if isinstance(entity, Member):
        return entity.user_id
    if isinstance(entity, GithubStatus):
        return entity.organization_id
    if isinstance(entity, UserTaskState):
        return f"{entity.task_id}/{entity.session_id}" if entity.session_id else entity.task_id
    return str(entity.id)
