"""Sandbox: the machines in which agents work, and the agents themselves. Leaf of the tree, child of task."""

from importlib.metadata import entry_points
from pathlib import Path

from branchline.gateway.v1 import sandboxes_pb2_grpc
from branchline.sandbox.v1 import sandbox_pb2_grpc
from branchline.spine.v1 import push_pb2_grpc

from services.runtime.config import ServiceConfig
from services.runtime.service import Service, chassis
from services.runtime.spine.push import PushClient
from services.sandbox.machines import Machines
from services.sandbox.providers.base import SandboxProvider
from services.sandbox.providers.local import LocalProvider, LocalProviderConfig
from services.sandbox.public import PublicSandboxServicer
from services.sandbox.servicer import SandboxServicer
from services.sandbox.status_sync import StatusSync
from services.sandbox.store import SandboxStore
from services.sandbox.tables import spine

PROVIDERS = "branchline.sandbox_providers"
"""Entry point group of further providers: callables that take a data folder and return a SandboxProvider."""


class SandboxConfig(ServiceConfig):
    """Configuration of the sandbox service."""

    task_address: str
    local: LocalProviderConfig
    stop_machines: bool = False
    """Whether machines are stopped with the service. They outlive it otherwise, and agents go on working."""


def build(config: SandboxConfig) -> Service:
    """Build the service."""
    parts = chassis("sandbox", config, spine, Path(__file__).parent)
    store = SandboxStore(parts)
    machines = Machines(parts, store, _providers(config))
    sync = StatusSync(parts, store, machines)
    internal = SandboxServicer(parts, store, machines, sync)
    public = PublicSandboxServicer(parts, store, machines)
    service = parts.service
    service.serves(
        "branchline.sandbox.v1.SandboxService",
        lambda server: sandbox_pb2_grpc.add_SandboxServiceServicer_to_server(internal, server),
    )
    service.serves(
        "branchline.gateway.v1.SandboxService",
        lambda server: sandboxes_pb2_grpc.add_SandboxServiceServicer_to_server(public, server),
    )
    task = parts.channel(config.task_address)
    push = PushClient(parts.outbox, lambda: push_pb2_grpc.PushServiceStub(task), "sandbox")
    service.before_start.append(machines.reconcile)
    service.loops += [push.run, sync.run]
    service.after_stop.insert(0, machines.stop_all if config.stop_machines else machines.close)
    return service


def _providers(config: SandboxConfig) -> dict[str, SandboxProvider]:
    providers: dict[str, SandboxProvider] = {"local": LocalProvider(config.data_dir / "local", config.local)}
    for entry in entry_points(group=PROVIDERS):
        provider: SandboxProvider = entry.load()(config.data_dir / entry.name)
        providers[provider.name] = provider
    return providers
