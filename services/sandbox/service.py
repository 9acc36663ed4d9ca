"""Builds the sandbox service."""

from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points
from ipaddress import IPv4Network
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from branchline.v1 import files_pb2, processes_pb2
from branchline_internal.sandbox.v1 import sandbox_pb2
from branchline_internal.task.v1 import task_pb2_grpc

from services.runtime.config import ServiceConfig
from services.runtime.database import Reader
from services.runtime.lanes import Lanes
from services.runtime.service import Chassis, Service
from services.sandbox.agents import Agents
from services.sandbox.blobs import Blobs
from services.sandbox.door.config import DoorConfig
from services.sandbox.door.tokens import Minter
from services.sandbox.files import FileServicer
from services.sandbox.follower import Ground
from services.sandbox.limits import Limits
from services.sandbox.machines import Machines
from services.sandbox.process_store import ProcessStore
from services.sandbox.processes import Processes
from services.sandbox.providers.base import SandboxProvider
from services.sandbox.providers.docker.config import DockerProviderConfig
from services.sandbox.providers.local import LocalProvider, LocalProviderConfig
from services.sandbox.public_processes import ProcessServicer
from services.sandbox.reports import Reports
from services.sandbox.servicer import SandboxServicer
from services.sandbox.sessions import SessionStore
from services.sandbox.status_sync import StatusSync
from services.sandbox.store import SandboxStore

if TYPE_CHECKING:
    from services.sandbox.door.door import Door
    from services.sandbox.http import Http

_ORPHANS_SECONDS = 3600.0

PROVIDERS = "branchline.sandbox_providers"
"""Entry point group of further providers: callables that take a data folder and return a SandboxProvider."""


class SandboxConfig(ServiceConfig, frozen=True):
    """Configuration of the sandbox service."""

    local: LocalProviderConfig | None = None
    """The `local` provider; None for an installation without it."""

    docker: DockerProviderConfig | None = None
    """The `docker` provider; None for an installation without it."""

    door: DoorConfig = DoorConfig()
    """The listener for sandboxes of providers that close all other ways out."""

    orphans: Literal["keep", "remove"] = "keep"
    """What becomes of sandboxes that a provider has and the service does not know. They are stopped in any case."""

    limits: Limits = Limits()
    stop_machines: bool = False
    """Whether machines are stopped with the service. They outlive it otherwise, and agents go on working."""

    sweep_seconds: float = 60.0
    """How often it is looked for what is stuck in a passing state."""


def build(config: SandboxConfig) -> Service:
    """Build the service."""
    chassis = Chassis("sandbox", config, Path(__file__).parent, callers=("gateway", "task"))
    http = cache(_open_http)

    async def close_http() -> None:
        if http.cache_info().currsize:
            await http().close()

    store = SandboxStore(chassis.outbox, chassis.clock)
    sessions = SessionStore(chassis.outbox, chassis.clock.timestamp)
    providers = _providers(config, http)
    machines = Machines(chassis.database, store, chassis.clock, http, providers, config.orphans == "remove")
    reports = Reports(chassis.database, chassis.outbox, chassis.clock, list(machines.providers))
    agents = Agents(chassis.database, sessions, machines, reports, config.limits.end_seconds)
    blobs = Blobs(chassis.stub(task_pb2_grpc.TaskServiceStub, "task"))
    ground = Ground(chassis.database, chassis.clock, sessions, machines, agents, blobs, Lanes(), config.limits)
    sync = StatusSync(ground)
    chassis.serve(SandboxServicer(store, ground, sync, reports), sandbox_pb2.DESCRIPTOR, "SandboxService")
    chassis.serve(FileServicer(chassis.database, store, machines, Lanes()), files_pb2.DESCRIPTOR, "FileService")
    processes = Processes(chassis.database, ProcessStore(chassis.outbox, chassis.clock), machines, chassis.clock)
    servicer = ProcessServicer(chassis.database, chassis.commands, store, processes.store, processes)
    chassis.serve(servicer, processes_pb2.DESCRIPTOR, "ProcessService")
    chassis.take_commands()
    chassis.push_to("task")
    service = chassis.service
    service.before_start += [machines.start, machines.reconcile]
    service.loops += [sync.run, processes.run, machines.watch]
    service.every(config.sweep_seconds, "see to unfinished sessions", sync.sweep)
    service.every(config.sweep_seconds, "see to processes", processes.sweep)
    service.every(config.sweep_seconds, "see to sandboxes in a passing state", machines.sweep)
    service.every(_ORPHANS_SECONDS, "end orphans", machines.end_orphans)
    docker = providers.get("docker")
    if config.docker is not None and docker is not None:
        door = _door(config, chassis, store, docker)
        service.before_start.append(door.start)
        service.after_stop.append(door.stop)
    service.after_stop += [close_http, machines.close]
    if config.stop_machines:
        service.after_stop.append(machines.stop_all)
    return service


def _open_http() -> "Http":
    # Loaded with the first machine: httpx is 9 MB that a service without machines does without.
    from services.sandbox.http import Http  # noqa: PLC0415

    return Http()


def _providers(config: SandboxConfig, http: "Callable[[], Http]") -> dict[str, SandboxProvider]:
    """Return the providers that the configuration speaks of, and those that others have installed."""
    providers: dict[str, SandboxProvider] = {}
    if config.local is not None:
        providers["local"] = LocalProvider(config.data_dir / "local", config.local, http)
    if config.docker is not None:
        # Loaded where it is wanted: the client of the Engine is 6 MB.
        from services.sandbox.providers.docker.provider import DockerProvider  # noqa: PLC0415

        minter = Minter(config.signing_key.value.encode())
        folder = config.data_dir / "docker"
        providers["docker"] = DockerProvider(folder, config.docker, minter, config.door.port, http)
    for entry in entry_points(group=PROVIDERS):
        provider: SandboxProvider = entry.load()(config.data_dir / entry.name)
        providers[provider.name] = provider
    return providers


def _door(config: SandboxConfig, chassis: Chassis, store: SandboxStore, docker: SandboxProvider) -> "Door":
    from services.sandbox.door.door import Door, Guest  # noqa: PLC0415
    from services.sandbox.providers.docker.provider import DockerProvider  # noqa: PLC0415

    assert isinstance(docker, DockerProvider)
    assert config.docker is not None

    def read(tx: Reader, sandbox_id: str) -> Guest:
        sandbox = store.present(tx, sandbox_id)
        return Guest(sandbox.id, sandbox.task_id, store.remote_url(tx, sandbox.id))

    async def guest(sandbox_id: str) -> Guest:
        return await chassis.database.read(read, sandbox_id)

    minter, admitted = Minter(config.signing_key.value.encode()), IPv4Network(config.docker.subnets)
    return Door(config.door, minter, admitted, docker.is_at, guest)
