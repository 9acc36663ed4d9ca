"""Branchline in processes of its own, with any number of tasks that were put into its databases directly."""

import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import psutil
from branchline.v1 import organizations_pb2, repositories_pb2, tasks_pb2
from branchline.v1.common_pb2 import Prompt
from branchline.v1.tasks_pb2 import Task
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cli.settings import Databases
from services.runtime.client import CHANNEL_OPTIONS
from tests.bench.child import Child, child
from tests.bench.seed import seed_organization, seed_repository
from tests.support.client import Client
from tests.support.databases import Server, installed_on
from tests.support.process import Processes, own_processes
from tests.support.stack import eventually, make_remote, request_id

READING = ("organization", "user", "history", "repository", "gateway")
"""What is needed to read and to watch."""

_FEW = 10
_OF_ALL = health_pb2.HealthCheckRequest()
_SERVING = health_pb2.HealthCheckResponse.SERVING
_READY_SECONDS = 120.0


def task_id(number: int) -> str:
    """Return the id of the task with a number."""
    return f"task_{number:032d}"


def a_task(organization_id: str, repository_id: str, number: int) -> Task:
    """Return a task of usual size (about 500 bytes)."""
    task = Task(
        id=task_id(number),
        organization_id=organization_id,
        repository_id=repository_id,
        title=f"Mend the thing number {number * 7919 % 100_003} that nobody wanted",
        prompt=Prompt(text="Please mend the thing. " * 6),
        branch=f"fix/mend-the-thing-number-{number}",
        state=tasks_pb2.TASK_STATE_ACTIVE,
        activity=tasks_pb2.TASK_ACTIVITY_IDLE,
        owner_user_id="usr_" + "0" * 32,
        active_sandbox_id="sbx_" + "0" * 32,
        sandbox_provider="local",
        head_commit="0" * 40,
        revision=1,
    )
    task.create_time.FromSeconds(1_700_000_000 + number)
    task.update_time.FromSeconds(1_700_000_000 + number * 31 % 1_000_003)
    task.sessions.add(id="ses_" + "0" * 32, display_name="Session 1", agent="mock")
    return task


@dataclass(slots=True)
class Installed:
    """An installation that runs, with a client of its first user."""

    processes: Processes
    client: Client
    token: str
    organization_id: str
    repository_id: str
    other_organization_id: str = ""
    """A second organization, of the same person, with few tasks."""
    other_repository_id: str = ""
    server: Server | None = None
    """Where its databases are, if they are no files."""

    @property
    def address(self) -> str:
        """Where the gateway is."""
        return self.processes.address

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What a call of the first user carries."""
        return (("authorization", f"Bearer {self.token}"),)

    def address_of(self, service: str) -> str:
        """Return where a service is."""
        return self.processes.environment[f"BRANCHLINE_ADDRESSES__{service.upper()}"]

    def process_of(self, service: str) -> psutil.Process:
        """Return a service's process."""
        return psutil.Process(self.processes.running[service].pid)

    @asynccontextmanager
    async def child(self, name: str, coordinator: str) -> AsyncGenerator[Child, None]:
        """Run another child of a coordinator, in this process."""
        key = self.processes.environment["BRANCHLINE_SIGNING_KEY"]
        url = f"sqlite:///{self.processes.folder / f'child-{name}.sqlite'}"
        if self.server is not None:
            url = self.server.create(f"child_{name}_{uuid.uuid4().hex[:8]}")
        async with child(url, name, coordinator, self.address_of(coordinator), key) as made:
            yield made


@asynccontextmanager
async def installed(
    folder: Path,
    tasks: int,
    few: int = _FEW,
    services: Sequence[str] = READING,
    settings: Mapping[str, str] = {},
    server: Server | None = None,
) -> AsyncGenerator[Installed, None]:
    """Run services with so many tasks in the first organization and few in another."""
    processes = own_processes(folder, installed_on(server) if server is not None else Databases())
    processes.environment["BRANCHLINE_GATEWAY__CALLS_PER_MINUTE"] = "100000000"
    processes.environment["BRANCHLINE_LOG_LEVEL"] = "warning"
    processes.environment.update(settings)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(processes.stop)
        first = await _furnished(processes, stack, services)
        await processes.stop()
        first.server = server
        await _seed(first, tasks, few)
        await start(processes, services)
        client, _ = await processes.client(stack)
        first.client = client
        yield first


async def start(processes: Processes, services: Sequence[str]) -> None:
    """Start services and wait until all of them serve."""
    for name in services:
        await processes.start(name, "serve", name)
    for name in services:
        await eventually(
            partial(_serves, processes.environment[f"BRANCHLINE_ADDRESSES__{name.upper()}"]), _READY_SECONDS
        )


async def _serves(address: str) -> bool:
    options = (*CHANNEL_OPTIONS, ("grpc.default_authority", "localhost"))
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        return (await stub.Check(_OF_ALL, timeout=_READY_SECONDS, wait_for_ready=True)).status == _SERVING


async def _furnished(processes: Processes, stack: AsyncExitStack, services: Sequence[str]) -> Installed:
    """Start the services for the first time; add two organizations with a repository each."""
    await start(processes, services)
    await processes.start("bootstrap", "bootstrap")
    client, organization_id = await processes.client(stack)
    other = await client.organizations.CreateOrganization(
        organizations_pb2.CreateOrganizationRequest(
            request_id=request_id(),
            slug="other",
            display_name="Other",
            kind=organizations_pb2.ORGANIZATION_KIND_TEAM,
        )
    )
    remotes = processes.folder / "remotes"
    repositories: list[str] = []
    for owner in (organization_id, other.organization.id):
        request = repositories_pb2.CreateRepositoryRequest(
            request_id=request_id(), organization_id=owner, remote_url=f"file://{make_remote(remotes)}"
        )
        repositories.append((await client.repositories.CreateRepository(request)).repository.id)
    token = (processes.folder / "data" / "token").read_text()
    return Installed(processes, client, token, organization_id, repositories[0], other.organization.id, repositories[1])


async def _seed(installation: Installed, tasks: int, few: int) -> None:
    """Put tasks into the databases. The organization takes them as a push; the others do not run meanwhile."""
    places = (
        (installation.organization_id, installation.repository_id, range(tasks)),
        (installation.other_organization_id, installation.other_repository_id, range(tasks, tasks + few)),
    )
    made = [a_task(owner, repository, number) for owner, repository, numbers in places for number in numbers]
    await seed_repository(installation.processes.database("repository"), made)
    await start(installation.processes, ["organization"])
    async with installation.child("repository", "organization") as repository:
        await seed_organization(repository, made)
    await installation.processes.stop()
