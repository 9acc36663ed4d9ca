"""The life of sandboxes: creation, wake-up, destruction, and what a restart must put right.

The row says what must be so before the provider is asked to make it so; every step can be repeated. What concerns one
sandbox waits in its lane. A machine is used as if it were there, and looked at only when that fails.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from branchline.v1 import sandboxes_pb2
from branchline.v1.common_pb2 import FAILURE_REASON_SANDBOX_FAILED
from branchline.v1.errors_pb2 import (
    ERROR_REASON_PROVIDER_UNKNOWN,
    ERROR_REASON_SANDBOX_GONE,
    ERROR_REASON_SANDBOX_NOT_STARTED,
    ERROR_REASON_SANDBOX_UNREACHABLE,
)
from branchline.v1.sandboxes_pb2 import Sandbox

from services.runtime.clock import Clock
from services.runtime.database import Database
from services.runtime.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from services.runtime.failures import failed
from services.runtime.lanes import Lanes
from services.runtime.logging import get_logger
from services.runtime.loops import for_each
from services.sandbox.agent_server import AgentServer, Unreachable
from services.sandbox.providers.base import Condition, Machine, Overuse, Owner, Probe, ProviderError, SandboxProvider
from services.sandbox.store import GONE, SandboxStore

if TYPE_CHECKING:
    from services.sandbox.http import Http

log = get_logger(__name__)

_PARALLEL = 8
_AWAIT_SECONDS = 20.0
_LOOK_SECONDS = 0.25
_INTERRUPTED_SECONDS = 120.0
_DESTROY_SECONDS = 120.0

WORKSPACE = "workspace"
"""Directory of the working tree, below the sandbox's home."""

T = TypeVar("T")


@dataclass(slots=True)
class Machines:
    """All sandboxes of this service."""

    database: Database
    store: SandboxStore
    clock: Clock
    http: "Callable[[], Http]"
    providers: Mapping[str, SandboxProvider]
    remove_orphans: bool = False
    """Whether what the database does not know is removed, files and all, in the place of being kept."""

    _warned: set[str] = field(default_factory=set[str])
    """What is not known to the database, and was warned of."""

    _lanes: Lanes = field(default_factory=Lanes)
    _servers: dict[str, AgentServer] = field(default_factory=dict[str, AgentServer])

    async def close(self) -> None:
        """Let go of the providers; machines go on."""
        for provider in self.providers.values():
            await provider.close()

    async def start(self) -> None:
        """Prepare the providers. Raise ProviderError if one cannot do what is wanted."""
        for provider in self.providers.values():
            await provider.start()

    async def create(
        self, sandbox_id: str, task_id: str, organization_id: str, provider: str, remote_url: str = ""
    ) -> Sandbox:
        """Create a sandbox, once. Raise InvalidArgument for an unknown provider, FailedPrecondition if it fails."""
        if provider not in self.providers:
            words, names = self._no_provider(provider), ", ".join(sorted(self.providers))
            raise InvalidArgument("provider", words, ERROR_REASON_PROVIDER_UNKNOWN, provider=provider, providers=names)
        now = self.clock.timestamp()
        sandbox = Sandbox(
            id=sandbox_id,
            task_id=task_id,
            provider=provider,
            state=sandboxes_pb2.SANDBOX_STATE_CREATING,
            state_time=now,
            create_time=now,
        )
        await self.database.write(self.store.add, sandbox, organization_id, remote_url)
        await self._wake(sandbox_id)
        return await self.database.read(self.store.get, sandbox_id)

    async def use(self, sandbox_id: str, call: Callable[[AgentServer], Awaitable[T]]) -> T:
        """Do something with a sandbox's server. Its machine is started or woken if need be.

        A call that never reached the server is made once more, after that. Raise what the call raises, NotFound, or
        FailedPrecondition if the sandbox is gone or its machine does not start.
        """
        try:
            return await call(await self.server(sandbox_id))
        except Unreachable as error:
            self._servers.pop(sandbox_id, None)
            if error.sent:
                raise
        return await call(await self._wake(sandbox_id))

    async def server(self, sandbox_id: str) -> AgentServer:
        """Return the server of a sandbox as it was last known, or else started. See `use` for what is raised."""
        return self._servers.get(sandbox_id) or await self._wake(sandbox_id)

    def known(self, sandbox_id: str) -> AgentServer | None:
        """Return the server of a sandbox as it was last known, if it was."""
        return self._servers.get(sandbox_id)

    async def look(self, sandbox_id: str) -> Probe:
        """Look whether a sandbox's machine is there. One that is destroyed is gone."""
        return await self._look(await self.database.read(self.store.get, sandbox_id))

    async def _look(self, sandbox: Sandbox) -> Probe:
        if sandbox.state in GONE:
            return Probe(Condition.GONE)
        if sandbox.provider not in self.providers:
            return Probe(Condition.GONE, words=self._no_provider(sandbox.provider))
        return await self.providers[sandbox.provider].probe(sandbox.id)

    async def provider(self, sandbox_id: str) -> SandboxProvider:
        """Return the provider of a sandbox; raise NotFound, or FailedPrecondition if it is not there any more."""
        return self._provider_of(await self.database.read(self.store.get, sandbox_id))

    def _provider_of(self, sandbox: Sandbox) -> SandboxProvider:
        provider = self.providers.get(sandbox.provider)
        if provider is None:
            raise FailedPrecondition(ERROR_REASON_SANDBOX_GONE, self._no_provider(sandbox.provider))
        return provider

    def _no_provider(self, name: str) -> str:
        return f'there is no provider "{name}"; there are: {", ".join(sorted(self.providers))}'

    def server_of(self, machine: Machine) -> AgentServer:
        """Return the server of a machine that is known to run."""
        return AgentServer(machine, self.http())

    async def destroy(self, sandbox_id: str) -> None:
        """Destroy a sandbox and its files, once."""
        await self.database.write(self.store.move, sandbox_id, sandboxes_pb2.SANDBOX_STATE_DESTROYING)
        async with self._lanes.hold(sandbox_id):
            sandbox = await self.database.read(self.store.get, sandbox_id)
            if sandbox.state == sandboxes_pb2.SANDBOX_STATE_DESTROYED:
                return
            self._servers.pop(sandbox_id, None)
            try:
                if sandbox.provider in self.providers:
                    await self.providers[sandbox.provider].destroy(sandbox_id)
                else:  # what it had is out of reach, and nobody can wait for it
                    log.warning(
                        "sandbox of a provider that is not there", sandbox=sandbox_id, provider=sandbox.provider
                    )
            except ProviderError as error:
                raise Unavailable(ERROR_REASON_SANDBOX_UNREACHABLE, f"it is not destroyed yet: {error}") from error
            await self.database.write(self.store.move, sandbox_id, sandboxes_pb2.SANDBOX_STATE_DESTROYED)

    async def reconcile(self) -> None:
        """Put right what a stop in between left."""
        await self.end_orphans()
        there = await self.database.read(self.store.there)
        await for_each(there, "look at a sandbox", self._note_stopped, _PARALLEL)

    async def orphans(self) -> dict[str, str]:
        """Return what providers have and the database does not know, with the provider. All of it stays as it is.

        Raise Unavailable where a provider cannot say what it has.
        """
        found: dict[str, str] = {}
        for provider in self.providers.values():
            try:
                orphans, _ = await self._strays(provider)
            except ProviderError as error:
                words = f"the provider {provider.name} cannot say what it has: {error}"
                raise Unavailable(ERROR_REASON_SANDBOX_UNREACHABLE, words) from error
            found.update(dict.fromkeys(orphans, provider.name))
        return found

    async def end_orphans(self) -> None:
        """Stop what providers have and the database does not know, and remove it only if that is wanted.

        It may be people's work, after a restore. What is known to be destroyed is removed in any case.
        """
        await for_each(self.providers.values(), "end orphans", self._end_orphans)

    async def _end_orphans(self, provider: SandboxProvider) -> None:
        orphans, destroyed = await self._strays(provider)
        for orphan in orphans - self._warned:
            becomes = "removed" if self.remove_orphans else "stopped, its files kept"
            log.warning("sandbox unknown to the database", sandbox=orphan, provider=provider.name, becomes=becomes)
        self._warned |= orphans
        await for_each(destroyed, "remove what is gone", provider.destroy, _PARALLEL)
        end = provider.destroy if self.remove_orphans else provider.pause
        await for_each(orphans, "end what is unknown", end, _PARALLEL)

    async def _strays(self, provider: SandboxProvider) -> tuple[set[str], set[str]]:
        """Return what a provider has that the database does not know, and that it knows to be destroyed."""
        found = await provider.known()  # first: what is made from now on is in the database before the provider has it
        strays = found - {sandbox.id for sandbox in await self.database.read(self.store.there)}
        destroyed = await self.database.read(self.store.destroyed)
        return strays - destroyed, strays & destroyed

    async def watch(self) -> None:
        """Watch for ever what sandboxes use. One that used too much has ended, and says so until it is woken."""
        async with asyncio.TaskGroup() as group:
            for provider in self.providers.values():
                group.create_task(provider.watch(self._ended))

    async def _ended(self, overuse: Overuse) -> None:
        self._servers.pop(overuse.sandbox_id, None)
        try:
            await self._fail(overuse.sandbox_id, overuse.words)
        except NotFound:
            log.info("a sandbox that is not known has ended", sandbox=overuse.sandbox_id)

    async def _note_stopped(self, sandbox: Sandbox) -> None:
        if sandbox.state != sandboxes_pb2.SANDBOX_STATE_RUNNING:
            return
        if (await self._look(sandbox)).condition is Condition.GONE:
            log.warning("machine of a running sandbox is missing", sandbox=sandbox.id)
            await self.database.write(self.store.move, sandbox.id, sandboxes_pb2.SANDBOX_STATE_PAUSED)

    async def sweep(self) -> None:
        """Move on what is in a passing state and nobody is at work on."""
        await for_each(await self.database.read(self.store.there), "move a sandbox on", self._move_on, _PARALLEL)

    async def _move_on(self, sandbox: Sandbox) -> None:
        if self._lanes.busy(sandbox.id):
            return
        if sandbox.state == sandboxes_pb2.SANDBOX_STATE_DESTROYING:
            async with asyncio.timeout(_DESTROY_SECONDS):
                await self.destroy(sandbox.id)
        elif sandbox.state == sandboxes_pb2.SANDBOX_STATE_CREATING:
            since = self.clock.seconds() - sandbox.state_time.seconds
            if since > _INTERRUPTED_SECONDS:
                words = "its creation was interrupted; it is tried again when the sandbox is needed"
                await self._fail(sandbox.id, words)

    async def stop_all(self) -> None:
        """Stop every running machine and keep the files."""
        held = await self.database.read(self.store.there)
        running = [sandbox for sandbox in held if sandbox.state == sandboxes_pb2.SANDBOX_STATE_RUNNING]
        await for_each(running, "stop a machine", self._stop, _PARALLEL)

    async def _stop(self, sandbox: Sandbox) -> None:
        await self._provider_of(sandbox).pause(sandbox.id)
        await self.database.write(self.store.move, sandbox.id, sandboxes_pb2.SANDBOX_STATE_PAUSED)

    async def _fail(self, sandbox_id: str, words: str) -> None:
        failure = failed(FAILURE_REASON_SANDBOX_FAILED, words)
        await self.database.write(self.store.move, sandbox_id, sandboxes_pb2.SANDBOX_STATE_FAILED, failure)

    async def _wake(self, sandbox_id: str) -> AgentServer:
        """Return the server of a machine that runs; start it, or wait until it is known whether it does."""
        async with self._lanes.hold(sandbox_id):
            known = self._servers.get(sandbox_id)
            if known is not None:
                return known
            sandbox = await self.database.read(self.store.present, sandbox_id)
            provider = self._provider_of(sandbox)
            machine = await self._settled(provider, sandbox_id) or await self._start(sandbox, provider)
            workspace = f"{machine.home}/{WORKSPACE}"
            await self.database.write(self.store.started, sandbox_id, machine.isolation, workspace)
            server = self._servers[sandbox_id] = self.server_of(machine)
            return server

    async def _settled(self, provider: SandboxProvider, sandbox_id: str) -> Machine | None:
        """Return the machine if it runs, None if it is gone. What is unknown is waited for, and never ended."""
        deadline = asyncio.get_running_loop().time() + _AWAIT_SECONDS
        while True:
            probe = await provider.probe(sandbox_id)
            if probe.condition is not Condition.UNKNOWN:
                return probe.machine
            if asyncio.get_running_loop().time() > deadline:
                words = f"the sandbox's machine does not answer: {probe.words or 'it is there'}"
                raise Unavailable(ERROR_REASON_SANDBOX_UNREACHABLE, words)
            await asyncio.sleep(_LOOK_SECONDS)

    async def _start(self, sandbox: Sandbox, provider: SandboxProvider) -> Machine:
        try:
            made = await self.database.read(self.store.workspace, sandbox.id)
            owner = Owner(await self.database.read(self.store.organization, sandbox.id), sandbox.task_id)
            return await (provider.resume if made else provider.create)(sandbox.id, owner)
        except (ProviderError, OSError) as error:
            words = f"the machine did not start: {error}"
            await self._fail(sandbox.id, words)
            raise FailedPrecondition(ERROR_REASON_SANDBOX_NOT_STARTED, words) from error
