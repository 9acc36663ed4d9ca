"""Runs one service: migrations, gRPC server with health and reflection, background loops, graceful drain."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer  # pyright: ignore[reportMissingTypeStubs]
from grpc_reflection.v1alpha import reflection

from services.runtime.client import MESSAGE_LIMIT_BYTES, open_channel
from services.runtime.clock import Clock
from services.runtime.config import ServiceConfig
from services.runtime.database import Database
from services.runtime.interceptors import (
    DrainInterceptor,
    ErrorInterceptor,
    LoggingInterceptor,
    PrincipalInterceptor,
    ValidationInterceptor,
)
from services.runtime.migrations import migrate
from services.runtime.principal import Signer
from services.runtime.spine.outbox import Outbox
from services.runtime.spine.requests import Requests
from services.runtime.spine.tables import SpineTables

log = structlog.get_logger()

SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MESSAGE_LIMIT_BYTES),
    ("grpc.max_send_message_length", MESSAGE_LIMIT_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
)

Loop = Callable[[], Awaitable[None]]


@dataclass(slots=True)
class Service:
    """One service, built and not yet running."""

    name: str
    listen: str
    interceptors: Sequence[grpc.aio.ServerInterceptor]
    drain_seconds: float = 5.0
    service_names: list[str] = field(default_factory=list[str])
    registrations: list[Callable[[grpc.aio.Server], None]] = field(
        default_factory=list[Callable[[grpc.aio.Server], None]]
    )
    loops: list[Loop] = field(default_factory=list[Loop])
    before_start: list[Loop] = field(default_factory=list[Loop])
    after_stop: list[Loop] = field(default_factory=list[Loop])
    _drain: DrainInterceptor = field(default_factory=DrainInterceptor)

    def serves(self, service_name: str, register: Callable[[grpc.aio.Server], None]) -> None:
        """Add a gRPC service by its full name."""
        self.service_names.append(service_name)
        self.registrations.append(register)

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None, None]:
        """Run the service for the length of the block. A loop that fails takes the service down."""
        for prepare in self.before_start:
            await prepare()
        server, checks = self._server()
        for name in ("", *self.service_names):
            await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
        await server.start()
        log.info("service started", service=self.name, listen=self.listen)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(_run(loop)) for loop in self.loops]
                try:
                    yield
                finally:
                    await checks.enter_graceful_shutdown()
                    self._drain.drain()
                    await server.stop(self.drain_seconds)
                    for task in tasks:
                        task.cancel()
        finally:
            for clean in self.after_stop:
                await clean()
            log.info("service stopped", service=self.name)

    def _server(self) -> "tuple[grpc.aio.Server, HealthServicer]":
        server = grpc.aio.server(interceptors=[*self.interceptors, self._drain], options=SERVER_OPTIONS)
        for register in self.registrations:
            register(server)
        checks = HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(checks, server)
        names = [*self.service_names, health.SERVICE_NAME, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(names, server)
        server.add_insecure_port(self.listen)
        return server, checks


async def _run(loop: Loop) -> None:
    await loop()


@dataclass(frozen=True, slots=True)
class Chassis:
    """What a service is built from: its parts, made from its configuration."""

    service: Service
    database: Database
    outbox: Outbox
    requests: Requests
    signer: Signer
    clock: Clock

    def channel(self, address: str) -> grpc.aio.Channel:
        """Open a channel that is closed with the service."""
        channel = open_channel(address, self.signer)
        self.service.after_stop.append(channel.close)
        return channel


def chassis(name: str, config: ServiceConfig, spine: SpineTables, room: Path, clock: Clock | None = None) -> Chassis:
    """Make the parts that every service has. `room` is its folder, which holds the migrations."""
    clock = clock or Clock()
    signer = Signer(config.signing_key.get_secret_value(), name)
    database = Database(config.data_dir / f"{name}.sqlite")
    service = Service(name, config.listen, internal_interceptors(name, signer), config.drain_seconds)

    async def bring_up_to_date() -> None:
        await asyncio.to_thread(migrate, room / "migrations", database.path)

    service.before_start.append(bring_up_to_date)
    service.after_stop.append(database.close)
    return Chassis(service, database, Outbox(database, spine, clock), Requests(spine, clock), signer, clock)


def internal_interceptors(name: str, signer: Signer) -> list[grpc.aio.ServerInterceptor]:
    """Return the interceptors of a service that only other services call."""
    return [ErrorInterceptor(), LoggingInterceptor(name), PrincipalInterceptor(signer), ValidationInterceptor()]
