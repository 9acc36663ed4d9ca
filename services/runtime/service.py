"""Runs one service: gRPC server with health and reflection, background loops, graceful drain."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import grpc
from branchline.v1.errors_pb2 import ERROR_REASON_PRINCIPAL_INVALID
from branchline_internal.admin.v1 import admin_pb2
from branchline_internal.spine.v1 import push_pb2, push_pb2_grpc
from google.protobuf.descriptor import FileDescriptor, ServiceDescriptor
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from services.runtime.admin import AdminServicer
from services.runtime.client import MESSAGE_LIMIT_BYTES, REMEDY, Neighbours, SigningChannel
from services.runtime.clock import Clock
from services.runtime.config import ServiceConfig, certified_name, database_url
from services.runtime.database import Database, DatabaseError, DatabaseUnavailable, open_database
from services.runtime.errors import Unauthenticated
from services.runtime.logging import get_logger
from services.runtime.loops import Every, being_cancelled
from services.runtime.migrations import bring_up_to_date
from services.runtime.principal import METADATA_KEY, OPERATOR, bind_principal
from services.runtime.retry import Backoff
from services.runtime.serving import Admit, Call, Handler, Serving, implemented
from services.runtime.spine.commands import Commands
from services.runtime.spine.courier import DEADLINE_SECONDS, BatchCourier, Courier, Deliver, DeliverAll
from services.runtime.spine.index import Index
from services.runtime.spine.ingest import Ingest, PushServicer
from services.runtime.spine.outbox import Outbox
from services.runtime.spine.push import PushClient
from services.runtime.tls import Certificate, require_safe

log = get_logger(__name__)

SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MESSAGE_LIMIT_BYTES),
    ("grpc.max_send_message_length", MESSAGE_LIMIT_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # from 1000 calls that wait to be taken it would drop some, whoever makes them, and those look cancelled
    ("grpc.server.max_pending_requests", 50_000),
    ("grpc.server.max_pending_requests_hard_limit", 100_000),
)

PUBLIC_PACKAGE = "branchline.v1"
SPINE_PACKAGE = "branchline.internal.spine.v1"

OUTBOX_PART = "branchline.outbox"
"""Under which name health checks are told whether anything is parked."""

_PARKED_LOOK_SECONDS = 60.0
_HOUR_SECONDS = 3600.0
_DATABASE_LOOK_SECONDS = 2.0
_DATABASE_ANSWER_SECONDS = 5.0

Step = Callable[[], Awaitable[object]]
S = TypeVar("S")


class Service:
    """One service, built and not yet running."""

    def __init__(self, name: str, listen: str, admit: Admit, drain_seconds: float = 5.0) -> None:
        self.name = name
        self.listen = listen
        self.serving = Serving(name, admit)
        self.address = listen
        """Where it is reached once it runs; differs from `listen` if that left the port open."""
        self.server_options: tuple[tuple[str, int], ...] = SERVER_OPTIONS
        self.reflects = False
        """Whether clients may ask what it serves."""
        self.before_start: list[Step] = []
        """Taken in order; one that finds the database away is taken again."""
        self.loops: list[Step] = []
        self.after_stop: list[Step] = []
        self._handlers: dict[str, dict[str, Handler]] = {}
        self._drain_seconds = drain_seconds
        self._checks: HealthServicer | None = None
        self._certificate: Certificate | None = None

    @property
    def secured(self) -> bool:
        """Whether it is reached by TLS alone. A unix socket is as private as its folder."""
        return self._certificate is not None and not self.listen.startswith("unix:")

    def protect(self, certificate: Certificate | None, remedy: str, *, insecure: bool) -> None:
        """Show callers a certificate.

        Without one raise ValueError, which names the remedy, if it is reached from off this host and not `insecure`.
        """
        if certificate is None:
            require_safe(self.listen, self.name, remedy, insecure=insecure)
        self._certificate = certificate
        self.look_after(certificate)

    def look_after(self, certificate: Certificate | None) -> None:
        """Warn before a certificate ends."""
        if certificate is not None:
            self.every(_HOUR_SECONDS, "look at the certificate", certificate.tell_expiry)

    def serve(self, servicer: object, file: FileDescriptor, name: str) -> None:
        """Serve what a servicer implements of a gRPC service, such as `serve(servicer, tasks_pb2.DESCRIPTOR, ...)`.

        What the gateway has validated at the door is not validated again, and of a push each entry is tried by itself.
        """
        service: ServiceDescriptor = file.services_by_name[name]
        validated = not service.full_name.startswith((PUBLIC_PACKAGE, SPINE_PACKAGE))
        for method in service.methods:
            found = implemented(servicer, method.name)
            if found is not None:
                self.add_handler(
                    service.full_name, method.name, self.serving.handler(method, found, validated=validated)
                )

    def add_handler(self, service: str, method: str, handler: Handler) -> None:
        """Serve one method."""
        self._handlers.setdefault(service, {})[method] = handler

    def every(self, seconds: float, name: str, work: Step) -> None:
        """Do something at start and then every so often, whatever becomes of it."""
        self.loops.append(Every(seconds, name, work).run)

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None, None]:
        """Run the service for the length of the block. A loop that ends takes the service down.

        It listens from the beginning, and refuses calls and says that it is not serving until it is prepared.
        """
        try:
            server, checks = self._server()
            self._checks = checks
            await self.tell_all(well=False)
            await server.start()
            try:
                for prepare in self.before_start:
                    await once_reachable(prepare, f"the database of {self.name}")
            except BaseException:
                await server.stop(None)
                raise
            self.serving.unready = ""
            await self.tell_all(well=True)
            log.info("service started", service=self.name, address=self.address)
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._run(loop)) for loop in self.loops]
                try:
                    yield
                finally:
                    await checks.enter_graceful_shutdown()
                    self.serving.drain()
                    await server.stop(self._drain_seconds)
                    for task in tasks:
                        task.cancel()
        finally:
            await self._clean_up()
            log.info("service stopped", service=self.name)

    async def tell_all(self, *, well: bool) -> None:
        """Say of the service as a whole, and of all that it serves, whether it is well."""
        for name in ("", *self._handlers):
            await self.tell_health(name, well=well)

    async def tell_health(self, part: str, *, well: bool) -> None:
        """Say of a part of the service whether it is well; health checks ask for it by its name."""
        status = health_pb2.HealthCheckResponse.SERVING if well else health_pb2.HealthCheckResponse.NOT_SERVING
        if self._checks is not None:
            await self._checks.set(part, status)

    async def _clean_up(self) -> None:
        """Take the last step first, and all of them whatever becomes of one."""
        async with AsyncExitStack() as steps:
            for clean in self.after_stop:
                steps.push_async_callback(clean)

    async def _run(self, loop: Step) -> None:
        """Run a loop. Whatever ends it while the service is not stopping is fatal."""
        try:
            await loop()
        except asyncio.CancelledError:
            if being_cancelled():
                raise
        except Exception as error:
            if being_cancelled():
                raise asyncio.CancelledError from error
            raise
        raise RuntimeError(f"a loop of {self.name} ended: {getattr(loop, '__qualname__', loop)}")

    def _server(self) -> "tuple[grpc.aio.Server, HealthServicer]":
        server = grpc.aio.server(options=self.server_options)
        for name, handlers in self._handlers.items():
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
        checks = HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(checks, server)
        if self.reflects:
            from services.runtime.reflection import add_reflection  # noqa: PLC0415 - in no other service's memory

            add_reflection(server, [*self._handlers, health.SERVICE_NAME])
        if self.listen.startswith("unix:"):
            Path(self.listen.removeprefix("unix:")).unlink(missing_ok=True)
        if self._certificate is not None and self.secured:
            port = server.add_secure_port(self.listen, self._certificate.server_credentials())
        else:
            port = server.add_insecure_port(self.listen)
        if not self.listen.startswith("unix:"):
            self.address = f"{self.listen.rpartition(':')[0]}:{port}"
        return server, checks


async def once_reachable(step: Step, what: str) -> None:
    """Take a step as soon as a database's server is there, however long that takes; say so meanwhile."""
    backoff = Backoff(first_seconds=0.2, most_seconds=5.0)
    while True:
        try:
            await step()
            return
        except DatabaseUnavailable as error:
            seconds = backoff.next_seconds()
            log.warning("not reached yet, tried again", what=what, reason=str(error), in_seconds=round(seconds, 1))
        await asyncio.sleep(seconds)


class Chassis:
    """What a service is built from: its parts, made from its configuration."""

    def __init__(self, name: str, config: ServiceConfig, room: Path, callers: Collection[str]) -> None:
        """`room` is the service's folder, which holds the migrations; `callers` are the services that may call."""
        self.name = name
        self.config = config
        self.clock = Clock()
        self.neighbours = Neighbours(name, config.addresses, config.signing_key, config.tls)
        self._callers = {certified_name(caller): caller for caller in (*callers, OPERATOR)}
        url = self.database_url = database_url(config.database_url, config.data_dir, name)
        self.database: Database = open_database(url)
        self._database_well = True
        self.outbox = Outbox(self.database, self.clock)
        self.commands = Commands(self.database, self.clock, config.signing_key.value)
        self.service = Service(name, config.addresses[name], self._admit, config.drain_seconds)
        self.service.protect(self.neighbours.certificate, REMEDY, insecure=config.tls.insecure)
        self._channels: dict[str, SigningChannel] = {}

        async def open_database_up_to_date() -> None:
            await bring_up_to_date({room / "migrations": url})
            await self.database.start()

        self.service.before_start += [open_database_up_to_date, self.outbox.start]
        self.service.after_stop.append(self.database.close)
        self.serve(AdminServicer(self.outbox), admin_pb2.DESCRIPTOR, "AdminService")
        self.service.every(_PARKED_LOOK_SECONDS, "look for parked rows", self.tell_parked)
        if self.database.shared:
            self.service.every(_DATABASE_LOOK_SECONDS, "look after the database", self.tell_database)

    async def _admit(self, call: Call) -> None:
        """Let in only calls from next to us in the tree that carry a principal signed for us by one of our own.

        An operator is who shows an operator's certificate. What a service passes on is that service's, whatever the
        key signs that all share.
        """
        known = self._known(call) if self.service.secured else {OPERATOR}
        principal = self.neighbours.signer.verify(call.metadata(METADATA_KEY))
        if principal.service == OPERATOR and OPERATOR not in known:
            principal = replace(principal, service=min(known))
        bind_principal(principal)

    def _known(self, call: Call) -> set[str]:
        """Return whose certificate the caller shows; raise Unauthenticated unless it is a service that may call."""
        names = call.certified_names()
        known = {self._callers[name] for name in names if name in self._callers}
        if not known:
            words = f"{' '.join(names) or 'a caller without a name'} may not call {self.name}"
            raise Unauthenticated(ERROR_REASON_PRINCIPAL_INVALID, words)
        return known

    def serve(self, servicer: object, file: FileDescriptor, name: str) -> None:
        """Serve what a servicer implements of a gRPC service."""
        self.service.serve(servicer, file, name)

    def stub(self, stub: Callable[[Any], S], name: str) -> S:
        """Return a stub of another service, by that service's name."""
        return stub(self.channel(name))

    def channel(self, name: str) -> SigningChannel:
        """Return the channel to another service. It is closed with this one."""
        if name not in self._channels:
            self._channels[name] = self.neighbours.open(name)
            self.service.after_stop.append(self._channels[name].close)
        return self._channels[name]

    def push_to(self, coordinator: str) -> None:
        """Push the outbox up to the service's coordinator."""
        stub: Any = self.stub(push_pb2_grpc.PushServiceStub, coordinator)
        self.service.loops.append(PushClient(self.outbox, stub, self.name).run)

    def coordinate(self, index: Index | None, ingest: Ingest) -> None:
        """Take what children push, and keep the index."""
        self.serve(PushServicer(ingest), push_pb2.DESCRIPTOR, "PushService")
        if index is not None:
            self.service.before_start.append(index.start)
            self.service.every(_HOUR_SECONDS, "compaction", index.compact)

    def take_commands(self) -> None:
        """Remember the answers of commands, for as long as they are promised."""
        self.service.every(_HOUR_SECONDS, "forget old requests", self.commands.forget_old)

    def courier(self, destination: str, deliver: Deliver, deadline_seconds: float = DEADLINE_SECONDS) -> None:
        """Carry what is marked for a destination there, in lanes."""
        self.outbox.line(destination)
        self.service.loops.append(Courier(self.outbox, destination, deliver, deadline_seconds).run)

    def batch_courier(self, destination: str, deliver: DeliverAll) -> None:
        """Carry what is marked for a destination there, many at a time and in order."""
        self.outbox.line(destination)
        self.service.loops.append(BatchCourier(self.outbox, destination, deliver).run)

    async def tell_database(self) -> None:
        """Say in the health check and in the log whether the database's server works.

        While it does not answer, calls are refused at once: they would wait for nothing.
        """
        unready = ""
        try:
            async with asyncio.timeout(_DATABASE_ANSWER_SECONDS):
                await self.database.ask()
        except DatabaseError as error:
            unready = str(error)
        except TimeoutError:
            unready = "its server does not answer"
        self.service.serving.unready = unready
        why = unready or ("it refused the last transaction" if self.database.refusing else "")
        if bool(why) == self._database_well:
            self._database_well = not why
            log.warning("health of the database", service=self.name, well=self._database_well, reason=why)
            await self.service.tell_all(well=self._database_well)

    async def tell_parked(self) -> None:
        """Say in the health check and in the log whether anything is parked."""
        waiting, parked = await self.outbox.counts()
        await self.service.tell_health(OUTBOX_PART, well=not parked)
        if parked:
            log.warning(
                "rows are parked: see `branchline outbox list`", service=self.name, parked=parked, waiting=waiting
            )
