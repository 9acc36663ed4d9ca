"""A whole installation in this process, and what tests do with it."""

import asyncio
import subprocess
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import grpc
from branchline.v1 import organizations_pb2, repositories_pb2, roles_pb2, sessions_pb2, tasks_pb2
from branchline.v1.common_pb2 import Attachment, Prompt
from branchline.v1.sessions_pb2 import WHEN_BUSY_QUEUE, SendMessageResponse, Session, WhenBusy
from branchline.v1.tasks_pb2 import TASK_ACTIVITY_IDLE, Task
from branchline.v1.transcripts_pb2 import TranscriptEntry
from branchline_internal.organization.v1 import organization_pb2 as internal_organization_pb2
from branchline_internal.organization.v1.organization_pb2_grpc import OrganizationServiceStub
from google.rpc import error_details_pb2

from cli.calls import operating
from cli.installation import ROOT, Installation, local_installation, scripted_agents
from cli.settings import Addresses, Databases, Settings
from cli.up import bootstrap, everything
from services.runtime.errors import detail_of
from services.runtime.principal import bind_principal
from services.runtime.service import Service
from services.sandbox.providers.ports import free_port
from tests.support.client import Client
from tests.support.databases import installed

DEADLINE_SECONDS = 60.0


GITHUB_PORT = free_port()
"""Where the installation expects GitHub; `test_github` runs a simulator there."""

T = TypeVar("T")


def request_id() -> str:
    return str(uuid.uuid4())


async def eventually(look: Callable[[], Awaitable[T | None]], seconds: float = DEADLINE_SECONDS) -> T:
    """Look until there is something to see."""
    async with asyncio.timeout(seconds):
        while True:
            seen = await look()
            if seen:
                return seen
            await asyncio.sleep(0.02)


def git(*arguments: str, cwd: Path | None = None) -> str:
    return subprocess.run(["git", *arguments], cwd=cwd, check=True, capture_output=True, text=True).stdout.strip()


def make_remote(folder: Path, name: str = "") -> Path:
    """Make a bare repository with one commit on main."""
    remote = folder / f"{name or uuid.uuid4().hex[:8]}.git"
    git("init", "--quiet", "--bare", "--initial-branch=main", str(remote))
    work = folder / f"work-{uuid.uuid4().hex[:8]}"
    git("clone", "--quiet", str(remote), str(work))
    (work / "README.md").write_text("hello\n")
    git("add", "--all", cwd=work)
    git("-c", "user.name=Test", "-c", "user.email=test@localhost", "commit", "--quiet", "-m", "First", cwd=work)
    git("push", "--quiet", "origin", "HEAD:main", cwd=work)
    return remote


@dataclass
class Stack:
    """A running installation with a client of its first user."""

    installation: Installation
    services: dict[str, Service]
    client: Client
    token: str
    organization_id: str
    remotes: Path
    calls: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    """Every call that a service took, as (service, full method name)."""

    @property
    def address(self) -> str:
        """Where the gateway listens."""
        return self.services["gateway"].address

    def database(self, service: str) -> str:
        """Return the URL of a service's database, to look behind its back."""
        return self.installation.databases()[ROOT / "services" / service / "migrations"]

    async def add_repository(self, remote: Path | None = None, url: str = "") -> str:
        remote_url = url or f"file://{remote or make_remote(self.remotes)}"
        answer = await self.client.repositories.CreateRepository(
            repositories_pb2.CreateRepositoryRequest(
                request_id=request_id(), organization_id=self.organization_id, remote_url=remote_url
            )
        )
        return answer.repository.id

    async def create_task(self, repository_id: str, text: str = "say hello", **fields: Any) -> Task:
        request = tasks_pb2.CreateTaskRequest(
            request_id=request_id(), repository_id=repository_id, prompt=Prompt(text=text), **fields
        )
        return (await self.client.tasks.CreateTask(request)).task

    async def ready_task(self, repository_id: str = "", **fields: Any) -> Task:
        """Create a task and wait until it is idle, its prompt unsent."""
        task = await self.create_task(repository_id or await self.add_repository(), hold_prompt=True, **fields)
        return await self.until(task.id, activity=TASK_ACTIVITY_IDLE)

    async def task(self, task_id: str) -> Task:
        return (await self.client.tasks.GetTask(tasks_pb2.GetTaskRequest(task_id=task_id))).task

    async def sessions(self, task_id: str) -> list[Session]:
        """Return a task's sessions, oldest first."""
        request = sessions_pb2.ListSessionsRequest(task_id=task_id, page_size=1000)
        return list((await self.client.sessions.ListSessions(request)).sessions)

    async def session(self, task_id: str, session_id: str = "") -> Session:
        """Return a session of a task: the first if none is named."""
        found = await self.sessions(task_id)
        return next(one for one in found if session_id in ("", one.id))

    async def until(
        self,
        task_id: str,
        *,
        state: tasks_pb2.TaskState.ValueType = tasks_pb2.TASK_STATE_ACTIVE,
        activity: tasks_pb2.TaskActivity.ValueType = tasks_pb2.TASK_ACTIVITY_UNSPECIFIED,
        turn: int = 0,
    ) -> Task:
        """Wait until the task is in a state, with an activity if one is given, its first session so many turns old."""

        async def look() -> Task | None:
            if turn and (await self.session(task_id)).turn < turn:  # it is told no later than the task
                return None
            task = await self.task(task_id)
            active = activity in (tasks_pb2.TASK_ACTIVITY_UNSPECIFIED, task.activity)
            return task if task.state == state and active else None

        try:
            return await eventually(look)
        except TimeoutError as error:
            raise AssertionError(f"the task stands elsewhere: {await self.task(task_id)}") from error

    async def send(
        self,
        task: Task,
        text: str,
        *,
        when_busy: WhenBusy.ValueType = WHEN_BUSY_QUEUE,
        session_id: str = "",
        attachments: Sequence[Attachment] = (),
    ) -> SendMessageResponse:
        """Send a message to a session, to the first if none is named."""
        request = sessions_pb2.SendMessageRequest(
            request_id=request_id(),
            task_id=task.id,
            session_id=session_id or (await self.session(task.id)).id,
            prompt=Prompt(text=text, attachments=attachments),
            when_busy=when_busy,
        )
        return await self.client.sessions.SendMessage(request)

    async def transcript(self, task: Task, session_id: str = "") -> list[TranscriptEntry]:
        request = sessions_pb2.ListTranscriptEntriesRequest(
            task_id=task.id, session_id=session_id or (await self.session(task.id)).id, page_size=1000
        )
        return list((await self.client.sessions.ListTranscriptEntries(request)).entries)

    async def new_member(
        self, role: roles_pb2.Role.ValueType = roles_pb2.ROLE_MEMBER, organization_id: str = ""
    ) -> tuple[Client, str]:
        """Invite somebody who accepts; return a client of theirs and their user id."""
        email = f"{uuid.uuid4().hex}@example.com"
        invited = await self.client.organizations.InviteMember(
            organizations_pb2.InviteMemberRequest(
                request_id=request_id(),
                organization_id=organization_id or self.organization_id,
                email=email,
                role=role,
            )
        )
        async with Client(self.address) as newcomer:
            accepted = await newcomer.organizations.AcceptInvitation(
                organizations_pb2.AcceptInvitationRequest(
                    request_id=request_id(), code=invited.code, display_name="Someone", email=email
                )
            )
        return Client(self.address, accepted.secret), accepted.member.user_id

    async def issue_token(self, email: str) -> str:
        """Make a token for a person, as the operator."""
        async with operating(self.installation, "organization", OrganizationServiceStub) as organization:
            request = internal_organization_pb2.IssueTokenRequest(email=email, name="a test's")
            return (await organization.IssueToken(request)).api_token

    async def bind_github(self, slug: str, login: str) -> None:
        """Bind a GitHub login to an organization, as the operator."""
        async with operating(self.installation, "organization", OrganizationServiceStub) as organization:
            request = internal_organization_pb2.BindGithubLoginRequest(slug=slug, github_login=login)
            await organization.BindGithubLogin(request)

    async def new_organization(self, slug: str = "") -> str:
        answer = await self.client.organizations.CreateOrganization(
            organizations_pb2.CreateOrganizationRequest(
                request_id=request_id(),
                slug=slug or f"o{uuid.uuid4().hex[:12]}",
                display_name="Other",
                kind=organizations_pb2.ORGANIZATION_KIND_TEAM,
            )
        )
        return answer.organization.id


@asynccontextmanager
async def running_stack(
    folder: Path, databases: Databases | None = None, **settings: Any
) -> AsyncGenerator[Stack, None]:
    """Run an installation with its data in a folder and databases. `settings` are sections, such as `task={...}`."""
    bind_principal(None)  # other tests of this process may have bound one: the operator's calls are the operator's
    remotes = folder / "remotes"
    remotes.mkdir(parents=True, exist_ok=True)
    sections: dict[str, dict[str, Any]] = {
        "gateway": {"calls_per_minute": 10**6},
        "github_data": {"github_url": f"http://127.0.0.1:{GITHUB_PORT}", "github_token": "token"},
        "sandbox": {"local": {"agents": scripted_agents(), "writable_paths": [remotes]}, "stop_machines": True},
    }
    for name, section in settings.items():
        sections[name] = {**sections.get(name, {}), **section}
    given: dict[str, Any] = {"data_dir": folder / "data", "addresses": Addresses(gateway="127.0.0.1:0"), **sections}
    made = Settings(databases=installed() if databases is None else databases, **given)
    installation = local_installation(made)
    calls: list[tuple[str, str]] = []
    async with everything(installation) as services:
        for name, service in services.items():
            service.serving.observers.append(partial(_write_down, calls, name))
        organization_id, token = await bootstrap(installation, "mock")
        async with Client(services["gateway"].address, token) as client:
            yield Stack(installation, services, client, token, organization_id, remotes, calls)


def _write_down(calls: list[tuple[str, str]], service: str, method: str) -> None:
    calls.append((service, method))


@dataclass(frozen=True)
class Failure:
    """A failed call: its code, reason, message and details."""

    code: grpc.StatusCode
    reason: str
    message: str
    metadata: dict[str, str]
    fields: list[str]
    resource: str


async def failure(call: Awaitable[Any]) -> Failure:
    """Return how a call fails; fail if it does not."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return failure_of(error)
    raise AssertionError("the call was expected to fail")


def failure_of(error: grpc.aio.AioRpcError) -> Failure:
    info = detail_of(error, error_details_pb2.ErrorInfo)
    bad = detail_of(error, error_details_pb2.BadRequest)
    resource = detail_of(error, error_details_pb2.ResourceInfo)
    fields = [violation.field for violation in bad.field_violations]
    return Failure(
        error.code(), info.reason, error.details() or "", dict(info.metadata), fields, resource.resource_name
    )
