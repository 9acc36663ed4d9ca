"""The life of sandboxes: creation, wake-up, destruction, and what a restart must put right.

The row says what must be so before the provider is asked to make it so; every step can be repeated. A service that
was killed in between goes on from the rows.
"""

import asyncio
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import structlog
from branchline.resource.v1 import sandbox_pb2
from branchline.resource.v1.sandbox_pb2 import Sandbox

from services.runtime.errors import FailedPrecondition, InvalidArgument
from services.runtime.service import Chassis
from services.sandbox.agent_server import AgentServer
from services.sandbox.providers.base import Machine, ProviderError, SandboxProvider
from services.sandbox.store import GONE, SandboxStore

log = structlog.get_logger()

_PARALLEL_STOPS = 8

WORKSPACE = "workspace"
"""Directory of the working tree, below the sandbox's home."""


@dataclass(slots=True)
class Machines:
    """All sandboxes of this service."""

    chassis: Chassis
    store: SandboxStore
    providers: Mapping[str, SandboxProvider]
    _locks: defaultdict[str, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))
    _servers: dict[str, AgentServer] = field(default_factory=dict[str, AgentServer])

    async def create(self, sandbox_id: str, task_id: str, organization_id: str, provider: str) -> Sandbox:
        """Create a sandbox, once. Raise InvalidArgument for an unknown provider, FailedPrecondition if it fails."""
        if provider not in self.providers:
            known = ", ".join(sorted(self.providers))
            raise InvalidArgument("sandbox_provider", f'there is no provider "{provider}"; there are: {known}')
        async with self.chassis.database.transaction() as tx:
            now = self.chassis.clock.timestamp()
            sandbox = Sandbox(
                id=sandbox_id,
                task_id=task_id,
                provider=provider,
                status=sandbox_pb2.SANDBOX_STATUS_CREATING,
                status_time=now,
                create_time=now,
            )
            await self.store.add_sandbox(tx, sandbox, organization_id)
        await self.server(sandbox_id)
        async with self.chassis.database.read() as connection:
            return await self.store.sandbox(connection, sandbox_id)

    async def server(self, sandbox_id: str) -> AgentServer:
        """Return the running server of a sandbox; start or wake its machine if need be.

        Raise NotFound, or FailedPrecondition if the sandbox is gone or its machine does not start.
        """
        async with self._locks[sandbox_id]:
            async with self.chassis.database.read() as connection:
                sandbox = await self.store.sandbox(connection, sandbox_id)
            if sandbox.status in GONE:
                raise FailedPrecondition("SANDBOX_GONE", f"the sandbox {sandbox_id} is destroyed")
            provider = self.providers[sandbox.provider]
            machine = await provider.probe(sandbox_id)
            if machine is None:
                machine = await self._start(sandbox, provider)
            if sandbox.status != sandbox_pb2.SANDBOX_STATUS_RUNNING:
                running = sandbox_pb2.SANDBOX_STATUS_RUNNING
                await self.store.change_sandbox(sandbox_id, running, isolation=machine.isolation)
            server = self._servers.get(sandbox_id)
            if server is None or server.machine != machine:
                await self._forget(sandbox_id)
                server = self._servers[sandbox_id] = AgentServer(machine)
            return server

    async def _start(self, sandbox: Sandbox, provider: SandboxProvider) -> Machine:
        new = sandbox.status == sandbox_pb2.SANDBOX_STATUS_CREATING
        try:
            return await (provider.create(sandbox.id) if new else provider.resume(sandbox.id))
        except (ProviderError, OSError) as error:
            reason = f"the machine did not start: {error}"
            await self.store.change_sandbox(sandbox.id, sandbox_pb2.SANDBOX_STATUS_ERROR, reason)
            raise FailedPrecondition("SANDBOX_NOT_STARTED", reason) from error

    async def is_running(self, sandbox_id: str) -> bool:
        """Say whether the sandbox's machine runs and answers."""
        async with self.chassis.database.read() as connection:
            sandbox = await self.store.sandbox(connection, sandbox_id)
        return await self.providers[sandbox.provider].probe(sandbox_id) is not None

    async def destroy(self, sandbox_id: str) -> None:
        """Destroy a sandbox and its files, once."""
        sandbox = await self.store.change_sandbox(sandbox_id, sandbox_pb2.SANDBOX_STATUS_DESTROYING)
        async with self._locks[sandbox_id]:
            await self._forget(sandbox_id)
            await self.providers[sandbox.provider].destroy(sandbox_id)
            await self.store.change_sandbox(sandbox_id, sandbox_pb2.SANDBOX_STATUS_DESTROYED)

    async def reconcile(self) -> None:
        """Put right what a stop in between left: finish destructions, note stopped machines, remove orphans."""
        async with self.chassis.database.read() as connection:
            held = {sandbox.id: sandbox for sandbox in await self.store.all_sandboxes(connection)}
        for provider in self.providers.values():
            for orphan in await provider.list_running() - held.keys():
                log.warning("orphaned sandbox destroyed", sandbox=orphan, provider=provider.name)
                await provider.destroy(orphan)
        for sandbox in held.values():
            if sandbox.status == sandbox_pb2.SANDBOX_STATUS_DESTROYING:
                await self.destroy(sandbox.id)
                continue
            running = sandbox.status == sandbox_pb2.SANDBOX_STATUS_RUNNING
            if running and await self.providers[sandbox.provider].probe(sandbox.id) is None:
                log.warning("machine of a running sandbox is missing", sandbox=sandbox.id)
                reason = "its machine stopped; it starts again when it is needed"
                await self.store.change_sandbox(sandbox.id, sandbox_pb2.SANDBOX_STATUS_PAUSED, reason)

    async def stop_all(self) -> None:
        """Stop every running machine and keep the files."""
        async with self.chassis.database.read() as connection:
            held = await self.store.all_sandboxes(connection)
        running = [sandbox for sandbox in held if sandbox.status == sandbox_pb2.SANDBOX_STATUS_RUNNING]
        limit = asyncio.Semaphore(_PARALLEL_STOPS)

        async def stop(sandbox: Sandbox) -> None:
            async with limit:
                await self.providers[sandbox.provider].pause(sandbox.id)
            await self.store.change_sandbox(sandbox.id, sandbox_pb2.SANDBOX_STATUS_PAUSED, "the backend stopped")

        await asyncio.gather(*(stop(sandbox) for sandbox in running))

    async def close(self) -> None:
        """Close all connections. The machines go on."""
        for sandbox_id in list(self._servers):
            await self._forget(sandbox_id)

    async def _forget(self, sandbox_id: str) -> None:
        server = self._servers.pop(sandbox_id, None)
        if server is not None:
            await server.close()
