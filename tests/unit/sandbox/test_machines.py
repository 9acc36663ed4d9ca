"""The life of sandboxes, with a provider whose machines answer as told."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field

import pytest
import pytest_asyncio
from branchline.v1 import sandboxes_pb2

from services.runtime.clock import Clock
from services.runtime.database import Database
from services.runtime.errors import DomainError, FailedPrecondition, Unavailable
from services.sandbox import machines as module
from services.sandbox.agent_server import AgentServer, Unreachable
from services.sandbox.http import Http
from services.sandbox.machines import Machines
from services.sandbox.providers.base import NOBODY, Condition, Machine, Overuse, Owner, Probe, ProviderError
from services.sandbox.store import SandboxStore

MACHINE = Machine("http://127.0.0.1:1", "token", "/home/one", "none")
CREATING, RUNNING = sandboxes_pb2.SANDBOX_STATE_CREATING, sandboxes_pb2.SANDBOX_STATE_RUNNING
DESTROYING, DESTROYED = sandboxes_pb2.SANDBOX_STATE_DESTROYING, sandboxes_pb2.SANDBOX_STATE_DESTROYED
ERROR = sandboxes_pb2.SANDBOX_STATE_FAILED


@dataclass
class Scripted:
    """A provider that writes down what it is asked."""

    name: str = "local"
    condition: Condition = Condition.GONE
    asked: list[str] = field(default_factory=list[str])
    there: set[str] = field(default_factory=set[str])
    gate: asyncio.Event | None = None
    broken: str = ""
    """The sandbox that it can do nothing with."""

    away: bool = False

    async def start(self) -> None:
        self.asked.append("start")

    async def create(self, sandbox_id: str, owner: Owner = NOBODY) -> Machine:
        self.asked.append("create")
        if self.gate is not None:
            await self.gate.wait()
        self.condition = Condition.ALIVE
        return MACHINE

    async def resume(self, sandbox_id: str, owner: Owner = NOBODY) -> Machine:
        self.asked.append("resume")
        self.condition = Condition.ALIVE
        return MACHINE

    async def pause(self, sandbox_id: str) -> None:
        self.asked.append(f"pause {sandbox_id}")
        self._refuse(sandbox_id)

    async def destroy(self, sandbox_id: str) -> None:
        self.asked.append(f"destroy {sandbox_id}")
        self._refuse(sandbox_id)

    async def probe(self, sandbox_id: str) -> Probe:
        self.asked.append("probe")
        return Probe(self.condition, MACHINE if self.condition is Condition.ALIVE else None)

    def _refuse(self, sandbox_id: str) -> None:
        if sandbox_id == self.broken:
            raise ProviderError("the disk is read only")

    async def known(self) -> set[str]:
        if self.away:
            raise ProviderError("it is away")
        return self.there

    async def agents(self, sandbox_id: str) -> set[str]:
        return set()

    async def end_agent(self, sandbox_id: str, process: str) -> bool:
        return True

    async def watch(self, ended: Callable[[Overuse], Awaitable[None]]) -> None:
        await asyncio.Event().wait()

    async def close(self) -> None:
        self.asked.append("close")


@pytest.fixture
def provider() -> Scripted:
    return Scripted()


@pytest_asyncio.fixture
async def machines(database: Database, sandboxes: SandboxStore, provider: Scripted) -> AsyncGenerator[Machines, None]:
    http = Http()
    yield Machines(database, sandboxes, Clock(), lambda: http, {"local": provider})
    await http.close()


async def until(look: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not look():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def create(machines: Machines) -> sandboxes_pb2.Sandbox:
    return await machines.create("sbx_1", "task_1", "org_1", "local")


async def status(machines: Machines) -> int:
    return (await machines.database.read(machines.store.get, "sbx_1")).state


async def test_a_machine_that_answers_is_used_without_a_look(machines: Machines, provider: Scripted) -> None:  # C10
    await create(machines)
    provider.asked.clear()

    async def call(server: AgentServer) -> str:
        return server.machine.url

    assert await machines.use("sbx_1", call) == MACHINE.url
    assert not provider.asked


async def test_a_call_that_never_arrived_is_made_again_after_a_wake_up(machines: Machines, provider: Scripted) -> None:
    await create(machines)
    provider.condition = Condition.GONE
    tries: list[int] = []

    async def call(server: AgentServer) -> int:
        tries.append(1)
        if len(tries) == 1:
            raise Unreachable(ConnectionRefusedError(), sent=False)
        return len(tries)

    assert await machines.use("sbx_1", call) == 2
    assert provider.asked[-1] == "resume"


async def test_a_call_that_may_have_arrived_is_not_made_again(machines: Machines) -> None:
    await create(machines)
    tries: list[int] = []

    async def call(server: AgentServer) -> None:
        tries.append(1)
        raise Unreachable(ConnectionResetError(), sent=True)

    with pytest.raises(Unreachable):
        await machines.use("sbx_1", call)
    assert len(tries) == 1


async def test_a_machine_of_which_nothing_is_known_is_waited_for_and_never_ended(
    machines: Machines, provider: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:  # F21
    monkeypatch.setattr(module, "_AWAIT_SECONDS", 0.3)
    provider.condition = Condition.UNKNOWN
    with pytest.raises(Unavailable):
        await create(machines)
    assert set(provider.asked) == {"probe"}
    provider.condition = Condition.ALIVE
    assert (await create(machines)).state == RUNNING
    assert set(provider.asked) == {"probe"}


async def test_a_sandbox_destroyed_while_it_is_made_ends_destroyed(
    machines: Machines, provider: Scripted
) -> None:  # F29
    provider.gate = asyncio.Event()
    making = asyncio.ensure_future(create(machines))
    await until(lambda: "create" in provider.asked)
    destroying = asyncio.ensure_future(machines.destroy("sbx_1"))
    async with asyncio.timeout(10):
        while await status(machines) != DESTROYING:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    provider.gate.set()

    with pytest.raises(FailedPrecondition):
        await making
    await destroying
    assert await status(machines) == DESTROYED


async def test_nothing_but_its_end_follows_destruction(machines: Machines) -> None:  # F29
    await create(machines)
    move = machines.store.move
    assert await machines.database.write(move, "sbx_1", DESTROYING)
    for later in (RUNNING, ERROR, CREATING):
        assert not await machines.database.write(move, "sbx_1", later)
    assert await machines.database.write(move, "sbx_1", DESTROYED)
    assert not await machines.database.write(move, "sbx_1", RUNNING)


async def test_what_the_database_does_not_know_is_stopped_and_kept(
    machines: Machines, provider: Scripted
) -> None:  # F29
    await create(machines)
    await machines.destroy("sbx_1")
    provider.asked.clear()
    provider.there = {"sbx_1", "sbx_people"}
    assert await machines.orphans() == {"sbx_people": "local"}
    assert not provider.asked
    await machines.reconcile()
    assert sorted(provider.asked) == ["destroy sbx_1", "pause sbx_people"]


async def test_a_provider_that_is_away_is_not_said_to_have_no_orphans(machines: Machines, provider: Scripted) -> None:
    provider.away = True
    with pytest.raises(Unavailable, match="the provider local cannot say what it has: it is away"):
        await machines.orphans()


async def test_a_sandbox_whose_provider_the_installation_has_no_more_says_so_and_can_be_destroyed(
    machines: Machines, provider: Scripted
) -> None:
    """Such as a `local` one, where the installation has moved to Compose."""
    await create(machines)
    moved = Machines(machines.database, machines.store, Clock(), machines.http, {"docker": Scripted("docker")})
    with pytest.raises(FailedPrecondition, match='there is no provider "local"; there are: docker') as refused:
        await moved.server("sbx_1")
    assert refused.value.reason == "SANDBOX_GONE"
    assert (await moved.look("sbx_1")).condition is Condition.GONE
    with pytest.raises(FailedPrecondition, match="there is no provider"):
        await moved.provider("sbx_1")
    await moved.reconcile()
    assert await status(moved) == sandboxes_pb2.SANDBOX_STATE_PAUSED
    await moved.destroy("sbx_1")
    assert await status(moved) == DESTROYED


async def test_a_machine_that_cannot_be_stopped_does_not_keep_the_service_from_starting_or_ending(
    machines: Machines, provider: Scripted
) -> None:
    for number in (1, 2):
        await machines.create(f"sbx_{number}", "task_1", "org_1", "local")
    provider.broken = "sbx_1"
    await machines.stop_all()
    assert (await machines.database.read(machines.store.get, "sbx_2")).state == sandboxes_pb2.SANDBOX_STATE_PAUSED

    provider.there, provider.broken = {"sbx_people", "sbx_others"}, "sbx_people"
    await machines.reconcile()
    assert {"pause sbx_people", "pause sbx_others"} <= set(provider.asked)


async def test_the_sweep_moves_on_what_nobody_is_at_work_on(machines: Machines, provider: Scripted) -> None:
    await create(machines)
    await machines.database.write(machines.store.move, "sbx_1", DESTROYING)
    await machines.sweep()
    assert await status(machines) == DESTROYED


async def test_one_sandbox_that_hangs_does_not_hold_up_another(machines: Machines, provider: Scripted) -> None:  # F10
    provider.gate = asyncio.Event()
    hanging = asyncio.ensure_future(create(machines))
    await until(lambda: "create" in provider.asked)
    provider.gate = None
    async with asyncio.timeout(2):
        other = await machines.create("sbx_2", "task_2", "org_1", "local")
    assert other.state == RUNNING
    hanging.cancel()


async def test_a_sandbox_that_was_never_made_is_never_made_after_its_destruction(machines: Machines) -> None:
    assert await machines.database.write(machines.store.bury, "sbx_1")
    with pytest.raises(DomainError):
        await create(machines)
