"""Clients of a Branchline server: `AsyncClient` for `async` code, `Client` for plain code.

    async with AsyncClient("127.0.0.1:7700", token) as client:
        session = client.session()                       # sees what it has changed itself
        created = await session.tasks.create_task(CreateTaskRequest(repository_id=..., prompt=Prompt(text=...)))
        async with session.watch_task(created.task.id) as view:
            await view.wait_for(lambda view: view.task.activity == TASK_ACTIVITY_IDLE, timeout_seconds=600)

Calls that fail raise `BranchlineError`. A command without a `request_id` gets one, so that it can be repeated safely;
it is repeated while the server cannot be reached, until the call's time is over.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

from google.protobuf.message import Message

from branchline.bridge import Bridge
from branchline.calls import Caller
from branchline.services import (
    AgentService,
    AsyncAgentService,
    AsyncBlobService,
    AsyncFileService,
    AsyncHistoryService,
    AsyncOrganizationService,
    AsyncProcessService,
    AsyncRepositoryService,
    AsyncSecretService,
    AsyncServerService,
    AsyncSessionService,
    AsyncTaskService,
    AsyncUserService,
    BlobService,
    FileService,
    HistoryService,
    OrganizationService,
    ProcessService,
    RepositoryService,
    SecretService,
    ServerService,
    SessionService,
    TaskService,
    UserService,
)
from branchline.tls import endpoint
from branchline.v1.common_pb2 import EntityKind
from branchline.v1.history_pb2 import HistoryChange, HistoryFilter, WatchHistoryRequest
from branchline.v1.organizations_pb2 import OrganizationChange, WatchOrganizationRequest
from branchline.v1.tasks_pb2 import TaskChange, TaskFilter, TranscriptSelection, WatchTaskRequest
from branchline.views import Connect, HistoryView, OrganizationView, TaskView, View

CALL_SECONDS = 30.0
"""How long a call may take where its caller does not say."""


class Page(Protocol):
    """An answer that is one page of a list."""

    @property
    def next_page_token(self) -> str:
        """Token of the next page; empty on the last."""
        ...


Q = TypeVar("Q", bound=Message)
P = TypeVar("P", bound=Page)
T = TypeVar("T")


class AsyncClient:
    """A connection to a server."""

    def __init__(
        self,
        address: str,
        token: str = "",
        *,
        ca: Path | str | None = None,
        insecure: bool | None = None,
        timeout_seconds: float = CALL_SECONDS,
        caller: Caller | None = None,
    ) -> None:
        """`address` is the gateway's, such as "branchline.example:443"; without a token only open methods answer.

        The connection is TLS, unless the gateway is on this host. `ca` is a file with the authorities to believe in the
        place of the system's, and asks for TLS everywhere; `insecure` says for itself: True is plaintext, False TLS.
        Raise ValueError if the file holds no authorities.
        """
        self._owns = caller is None
        self.caller: Caller = caller or Caller(endpoint(address, ca, insecure=insecure), token, timeout_seconds)
        self.agents = AsyncAgentService(self.caller)
        self.blobs = AsyncBlobService(self.caller)
        self.files = AsyncFileService(self.caller)
        self.history = AsyncHistoryService(self.caller)
        self.organizations = AsyncOrganizationService(self.caller)
        self.processes = AsyncProcessService(self.caller)
        self.repositories = AsyncRepositoryService(self.caller)
        self.secrets = AsyncSecretService(self.caller)
        self.server = AsyncServerService(self.caller)
        self.sessions = AsyncSessionService(self.caller)
        self.tasks = AsyncTaskService(self.caller)
        self.users = AsyncUserService(self.caller)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection. A session's is its client's."""
        if self._owns:
            await self.caller.channel.close()

    def session(self) -> "AsyncClient":
        """Return a client over the same connection whose reads see what was changed through it."""
        return AsyncClient("", caller=self.caller.consistently())

    def watch_organization(
        self,
        organization_id: str,
        *,
        kinds: Iterable[EntityKind.ValueType] = (),
        tasks: TaskFilter | None = None,
        resume_token: str = "",
        heartbeat: timedelta | None = None,
    ) -> OrganizationView:
        """Watch an organization, to be used with `async with`."""
        request = WatchOrganizationRequest(organization_id=organization_id, kinds=kinds, tasks=tasks)
        return OrganizationView(_connect(self.organizations.watch_organization, request, heartbeat), resume_token)

    def watch_task(
        self,
        task_id: str,
        *,
        transcripts: TranscriptSelection | None = None,
        resume_token: str = "",
        heartbeat: timedelta | None = None,
    ) -> TaskView:
        """Watch a task, to be used with `async with`."""
        request = WatchTaskRequest(task_id=task_id, transcripts=transcripts)
        return TaskView(_connect(self.tasks.watch_task, request, heartbeat), resume_token)

    def watch_history(
        self,
        organization_id: str,
        *,
        events: HistoryFilter | None = None,
        resume_token: str = "",
        heartbeat: timedelta | None = None,
    ) -> HistoryView:
        """Watch an organization's feed, to be used with `async with`."""
        request = WatchHistoryRequest(organization_id=organization_id, filter=events)
        return HistoryView(_connect(self.history.watch_history, request, heartbeat), resume_token)


class Client:
    """A connection to a server, for plain code: as `AsyncClient`, but each call waits."""

    def __init__(
        self,
        address: str,
        token: str = "",
        *,
        ca: Path | str | None = None,
        insecure: bool | None = None,
        timeout_seconds: float = CALL_SECONDS,
        bridge: Bridge | None = None,
        client: AsyncClient | None = None,
    ) -> None:
        """As `AsyncClient`."""
        self._bridge = bridge or Bridge()
        self._owns = bridge is None
        try:
            self._client = client or self._bridge.run(_opened(address, token, ca, insecure, timeout_seconds))
        except ValueError:
            self._bridge.close()
            raise
        caller = self._client.caller
        self.agents = AgentService(caller, self._bridge)
        self.blobs = BlobService(caller, self._bridge)
        self.files = FileService(caller, self._bridge)
        self.history = HistoryService(caller, self._bridge)
        self.organizations = OrganizationService(caller, self._bridge)
        self.processes = ProcessService(caller, self._bridge)
        self.repositories = RepositoryService(caller, self._bridge)
        self.secrets = SecretService(caller, self._bridge)
        self.server = ServerService(caller, self._bridge)
        self.sessions = SessionService(caller, self._bridge)
        self.tasks = TaskService(caller, self._bridge)
        self.users = UserService(caller, self._bridge)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. A session's is its client's."""
        if self._owns:
            self._bridge.run(self._client.close())
            self._bridge.close()

    def session(self) -> "Client":
        """Return a client over the same connection whose reads see what was changed through it."""
        return Client("", bridge=self._bridge, client=self._client.session())

    def watch_organization(
        self,
        organization_id: str,
        *,
        kinds: Iterable[EntityKind.ValueType] = (),
        tasks: TaskFilter | None = None,
        resume_token: str = "",
        heartbeat: timedelta | None = None,
    ) -> "Watched[OrganizationView, OrganizationChange]":
        """Watch an organization, to be used with `with`."""
        view = self._client.watch_organization(
            organization_id, kinds=kinds, tasks=tasks, resume_token=resume_token, heartbeat=heartbeat
        )
        return Watched(self._bridge, view)

    def watch_task(
        self,
        task_id: str,
        *,
        transcripts: TranscriptSelection | None = None,
        resume_token: str = "",
        heartbeat: timedelta | None = None,
    ) -> "Watched[TaskView, TaskChange]":
        """Watch a task, to be used with `with`."""
        view = self._client.watch_task(task_id, transcripts=transcripts, resume_token=resume_token, heartbeat=heartbeat)
        return Watched(self._bridge, view)

    def watch_history(
        self,
        organization_id: str,
        *,
        events: HistoryFilter | None = None,
        resume_token: str = "",
        heartbeat: timedelta | None = None,
    ) -> "Watched[HistoryView, HistoryChange]":
        """Watch an organization's feed, to be used with `with`."""
        view = self._client.watch_history(
            organization_id, events=events, resume_token=resume_token, heartbeat=heartbeat
        )
        return Watched(self._bridge, view)


V = TypeVar("V", bound=View[Any])
C = TypeVar("C")


class Watched(Generic[V, C]):
    """A view in the hands of plain code. The view itself is followed in a thread of its own and may always be read."""

    def __init__(self, bridge: Bridge, view: V) -> None:
        self._bridge = bridge
        self.view = view
        """What is watched, as it is now."""

    def __enter__(self) -> Self:
        self._bridge.run(self.view.__aenter__())
        return self

    def __exit__(self, *_: object) -> None:
        self._bridge.run(self.view.close())

    def wait_for(self, holds: Callable[[V], bool], timeout_seconds: float | None = None) -> V:
        """Wait until the view is complete and something holds of it. See `View.wait_for`."""
        return self._bridge.run(self.view.wait_for(holds, timeout_seconds))

    def changes(self) -> Iterator[C]:
        """Yield what is held, then what changes. See `View.changes`."""
        return self._bridge.iterate(self.view.changes())


async def _opened(
    address: str, token: str, ca: Path | str | None, insecure: bool | None, seconds: float
) -> AsyncClient:
    """Open a client within the loop that will use it."""
    return AsyncClient(address, token, ca=ca, insecure=insecure, timeout_seconds=seconds)


def _connect(call: Callable[[Any], Any], request: Any, heartbeat: timedelta | None) -> Connect:
    if heartbeat is not None:
        request.heartbeat_interval.FromTimedelta(heartbeat)

    def connect(resume_token: str) -> Any:
        begun = type(request)()
        begun.CopyFrom(request)
        begun.resume_token = resume_token
        return call(begun)

    return connect


async def pages(call: Callable[[Q], Awaitable[P]], request: Q, items: Callable[[P], Sequence[T]]) -> AsyncIterator[T]:
    """Yield the items of all pages, such as `pages(client.tasks.list_tasks, request, lambda page: page.tasks)`."""
    wanted = type(request)()
    wanted.CopyFrom(request)
    while True:
        page = await call(wanted)
        for item in items(page):
            yield item
        if not page.next_page_token:
            return
        setattr(wanted, "page_token", page.next_page_token)  # noqa: B010 - every request of a list has one


def all_pages(call: Callable[[Q], P], request: Q, items: Callable[[P], Sequence[T]]) -> Iterator[T]:
    """Yield the items of all pages, for plain code."""
    wanted = type(request)()
    wanted.CopyFrom(request)
    while True:
        page = call(wanted)
        yield from items(page)
        if not page.next_page_token:
            return
        setattr(wanted, "page_token", page.next_page_token)  # noqa: B010 - every request of a list has one
