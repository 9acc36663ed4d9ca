"""Builds the gateway."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from branchline_internal.organization.v1 import organization_pb2_grpc
from branchline_internal.repository.v1 import repository_pb2_grpc
from msgspec import Meta

from gateway.caller import Authenticator, Door
from gateway.fanout import FanOut
from gateway.forward import Forwarder
from gateway.info import server_info
from gateway.placement import Placement
from gateway.routes import ANONYMOUS, ORGANIZATION, REPOSITORY, ROUTES, SANDBOX, TASK, USER
from gateway.watches import Watches
from services.runtime.client import Neighbours
from services.runtime.config import Config, Secret, TlsConfig
from services.runtime.service import Service
from services.runtime.tls import Certificate

CALLS_PER_CONNECTION = 250
"""Calls and watches that one connection carries at once; its others wait at the client, and not here before others'.

The server takes calls in the order in which they come, whoever makes them.
"""

_REMEDY = "set gateway.certificate and gateway.key, or gateway.insecure = true where something before it speaks TLS"


class GatewayConfig(Config, frozen=True, kw_only=True):
    """Where the services are, and what the gateway allows."""

    addresses: Mapping[str, str]
    """Where each service listens, by name; "gateway" is where this one does."""

    signing_key: Secret
    """Key that principals are signed with; the same for all services of an installation."""

    calls_per_minute: Annotated[int, Meta(ge=1)] = 6000
    """Calls that one caller may make in a minute; more are refused with RESOURCE_EXHAUSTED."""

    drain_seconds: float = 5.0
    """Time that running calls get to end when the gateway stops."""

    certificate: Path | None = None
    """Certificate that clients are shown, and what leads from it to an authority that they trust."""

    key: Path | None = None
    """Its key, in a file that nobody else can read."""

    insecure: bool = False
    """Whether clients off this host may speak plaintext; without it, or a certificate, the start is refused."""

    tls: TlsConfig = TlsConfig()
    """What the gateway shows to the services."""


def build(config: GatewayConfig) -> Service:
    """Build the gateway."""
    neighbours = Neighbours("gateway", config.addresses, config.signing_key, config.tls)
    owners = (ORGANIZATION, REPOSITORY, TASK, SANDBOX, USER)
    channels: dict[str, Any] = {owner: neighbours.open(owner) for owner in owners}
    organization = organization_pb2_grpc.OrganizationServiceStub(channels[ORGANIZATION])
    repository = repository_pb2_grpc.RepositoryServiceStub(channels[REPOSITORY])
    authenticator, placement, fan_out = Authenticator(organization), Placement(organization), FanOut()
    forwarder = Forwarder(channels, organization, authenticator, placement)
    watches = Watches(fan_out, authenticator, placement, organization, repository, neighbours.signer)
    own: dict[str, Callable[..., Any]] = {
        "ServerService/GetServerInfo": server_info,
        "OrganizationService/WatchOrganization": watches.of_organization,
        "HistoryService/WatchHistory": watches.of_history,
        "TaskService/WatchTask": watches.of_task,
    }
    door = Door(authenticator, config.calls_per_minute, ANONYMOUS)
    service = Service("gateway", config.addresses["gateway"], door.admit, config.drain_seconds)
    service.server_options += (
        ("grpc.max_concurrent_streams", CALLS_PER_CONNECTION),
        ("grpc.http.overload_protection", 0),  # it refuses streams that the client believes to be within the bound
    )
    service.reflects = True
    for name, route in ROUTES.items():
        handler = (
            service.serving.handler(route.method, own[name])
            if name in own
            else forwarder.handler(service.serving, route)
        )
        service.add_handler(route.method.containing_service.full_name, route.method.name, handler)
    service.loops.append(fan_out.run)
    service.protect(_shown_to_clients(config), _REMEDY, insecure=config.insecure)
    service.look_after(neighbours.certificate)
    service.after_stop += [channel.close for channel in channels.values()]
    return service


def _shown_to_clients(config: GatewayConfig) -> Certificate | None:
    if config.certificate is None and config.key is None:
        return None
    if config.certificate is None or config.key is None:
        raise ValueError("gateway.certificate and gateway.key belong together: set both")
    return Certificate(config.certificate, config.key)
