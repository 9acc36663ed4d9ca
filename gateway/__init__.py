"""Gateway: the only public door. Reads organization and repository indexes alone, routes commands to their owners."""

from typing import Any

import grpc
from branchline.gateway.v1 import (
    history_pb2,
    organizations_pb2,
    repositories_pb2,
    sandboxes_pb2,
    sessions_pb2,
    tasks_pb2,
    users_pb2,
)
from branchline.organization.v1 import organization_pb2_grpc
from branchline.repository.v1 import repository_pb2_grpc
from google.protobuf.message_factory import GetMessageClass

from gateway.caller import Authenticator, CallerInterceptor
from gateway.config import GatewayConfig
from gateway.fanout import FanOut
from gateway.forward import Forwarder
from gateway.placement import Placement
from gateway.routes import ORGANIZATION, PACKAGE, REPOSITORY, ROUTES, SANDBOX, TASK, USER
from gateway.watches import Watches
from services.runtime.client import open_channel
from services.runtime.interceptors import ErrorInterceptor, LoggingInterceptor, ValidationInterceptor
from services.runtime.principal import Signer
from services.runtime.service import Service

_FILES = (history_pb2, organizations_pb2, repositories_pb2, sandboxes_pb2, sessions_pb2, tasks_pb2, users_pb2)

__all__ = ["GatewayConfig", "build"]


def build(config: GatewayConfig) -> Service:
    """Build the gateway."""
    signer = Signer(config.signing_key.get_secret_value(), "gateway")
    channels = {
        owner: open_channel(address, signer)
        for owner, address in (
            (ORGANIZATION, config.organization_address),
            (REPOSITORY, config.repository_address),
            (TASK, config.task_address),
            (SANDBOX, config.sandbox_address),
            (USER, config.user_address),
        )
    }
    organization = organization_pb2_grpc.OrganizationServiceStub(channels[ORGANIZATION])
    repository = repository_pb2_grpc.RepositoryServiceStub(channels[REPOSITORY])
    authenticator, placement, fan_out = Authenticator(organization), Placement(organization), FanOut()
    forwarder = Forwarder(channels, placement, signer)
    watches = Watches(fan_out, authenticator, placement, organization, repository)
    own = {
        "OrganizationService/WatchOrganization": watches.organization,
        "HistoryService/WatchHistory": watches.history,
        "TaskService/WatchTask": watches.task,
    }
    interceptors = [
        ErrorInterceptor(),
        LoggingInterceptor("gateway"),
        CallerInterceptor(authenticator, config.calls_per_minute),
        ValidationInterceptor(),
    ]
    service = Service("gateway", config.listen, interceptors, config.drain_seconds)
    for file in _FILES:
        for descriptor in file.DESCRIPTOR.services_by_name.values():
            handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
            for method in descriptor.methods:
                name = f"{descriptor.name}/{method.name}"
                if name in own:
                    handlers[method.name] = grpc.unary_stream_rpc_method_handler(
                        own[name],
                        request_deserializer=GetMessageClass(method.input_type).FromString,
                        response_serializer=GetMessageClass(method.output_type).SerializeToString,
                    )
                else:
                    handlers[method.name] = forwarder.handler(name, method, ROUTES[name])
            _serve(service, f"{PACKAGE}.{descriptor.name}", handlers)
    service.loops.append(fan_out.run)
    service.after_stop += [channel.close for channel in channels.values()]
    return service


def _serve(service: Service, name: str, handlers: "dict[str, grpc.RpcMethodHandler[Any, Any]]") -> None:
    generic = grpc.method_handlers_generic_handler(name, handlers)
    service.serves(name, lambda server: server.add_generic_rpc_handlers((generic,)))
