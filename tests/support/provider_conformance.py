"""What every sandbox provider does, whatever its machines are. A provider's tests inherit it, and make the ground."""

import asyncio
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from services.sandbox.agent_server import AgentServer
from services.sandbox.commands import CommandResult, run
from services.sandbox.http import Http
from services.sandbox.providers.base import Condition, Machine, Owner, SandboxProvider

OWNER = Owner("org_1", "task_1")
ONE, OTHER = "sbx_1", "sbx_2"

P = TypeVar("P", bound=SandboxProvider)


@dataclass
class Ground(ABC, Generic[P]):
    """A provider with all that its tests need. Its `mock` agent runs `sleep`, whatever it is asked."""

    http: Http
    provider: P

    @abstractmethod
    def again(self) -> P:
        """Return another provider of the same sandboxes, as after a restart of the service."""

    @abstractmethod
    async def kill(self, sandbox_id: str) -> None:
        """Kill a machine, with no chance to say so."""

    @abstractmethod
    async def freeze(self, sandbox_id: str) -> None:
        """Stop a machine's processes where they are."""

    @abstractmethod
    async def thaw(self, sandbox_id: str) -> None:
        """Let them go on."""

    async def make(self, sandbox_id: str = ONE) -> AgentServer:
        """Return the server of a machine, made if need be."""
        return AgentServer(await self.provider.create(sandbox_id, OWNER), self.http)

    async def said(self, script: str, sandbox_id: str = ONE, seconds: int = 30) -> CommandResult:
        """Run a script in a sandbox."""
        server = await self.make(sandbox_id)
        return await run(server, ["sh", "-c", script], server.machine.home, {}, seconds)

    async def answers(self, machine: Machine) -> bool:
        """Say whether a machine's server answers us."""
        headers = {"Authorization": f"Bearer {machine.token}"}
        return (await self.http.send("GET", f"{machine.url}/v1/acp", 5.0, machine.vouched, headers=headers)).is_success

    async def start_agent(self, connection: str) -> set[str]:
        """Have the server start the agent, which never answers; return the names of all agents once it is there."""
        server = await self.make()
        before = await self.provider.agents(ONE)
        asking = asyncio.ensure_future(server.request(connection, "initialize", {}, 1, "mock", 60))
        try:
            async with asyncio.timeout(20):
                while not (found := await self.provider.agents(ONE)) - before:  # noqa: ASYNC110 - nothing tells
                    await asyncio.sleep(0.1)
            return found
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)


class ProviderConformance:
    """The tests. `ground` is a fixture of those who inherit them."""

    async def test_a_sandbox_that_is_made_twice_is_one_machine(self, ground: Ground[Any]) -> None:
        first = await ground.provider.create(ONE, OWNER)
        assert await ground.answers(first)
        assert await ground.provider.create(ONE, OWNER) == first

    async def test_a_sandbox_that_was_never_made_is_gone_and_may_be_destroyed(self, ground: Ground[Any]) -> None:
        assert (await ground.provider.probe(ONE)).condition is Condition.GONE
        await ground.provider.pause(ONE)
        await ground.provider.destroy(ONE)
        assert await ground.provider.known() == set()

    async def test_files_outlive_a_pause_and_processes_do_not(self, ground: Ground[Any]) -> None:
        await ground.said("echo kept > file; nohup sleep 1000 >/dev/null 2>&1 &")
        await ground.provider.pause(ONE)
        assert (await ground.provider.probe(ONE)).condition is Condition.GONE
        assert await ground.provider.known() == {ONE}
        machine = await ground.provider.resume(ONE, OWNER)
        seen = await run(
            AgentServer(machine, ground.http), ["sh", "-c", "cat file; cat /proc/[0-9]*/cmdline"], machine.home, {}, 20
        )
        assert seen.stdout.startswith("kept\n")
        assert "sleep" not in seen.stdout

    async def test_files_outlive_a_machine_that_was_killed(self, ground: Ground[Any]) -> None:
        await ground.said("echo kept > file")
        await ground.kill(ONE)
        assert (await ground.provider.probe(ONE)).condition is Condition.GONE
        assert (await ground.said("cat file")).stdout == "kept\n"

    async def test_a_machine_that_stands_still_is_not_gone(self, ground: Ground[Any]) -> None:
        machine = await ground.provider.create(ONE, OWNER)
        await ground.freeze(ONE)
        assert (await ground.provider.probe(ONE)).condition is Condition.UNKNOWN
        await ground.thaw(ONE)
        assert (await ground.provider.probe(ONE)).machine == machine

    async def test_a_restarted_service_finds_the_machine(self, ground: Ground[Any]) -> None:
        machine = await ground.provider.create(ONE, OWNER)
        again = ground.again()
        await again.start()
        try:
            found = await again.probe(ONE)
            assert found.machine == machine
            assert await again.known() == {ONE}
            assert await again.create(ONE, OWNER) == machine
        finally:
            await again.close()

    async def test_nothing_is_left_of_a_sandbox_that_is_destroyed_twice(self, ground: Ground[Any]) -> None:
        await ground.said("echo gone > file")
        await ground.provider.destroy(ONE)
        await ground.provider.destroy(ONE)
        assert await ground.provider.known() == set()
        assert (await ground.provider.probe(ONE)).condition is Condition.GONE
        assert (await ground.said("cat file")).end.exit_code != 0

    async def test_each_sandbox_has_a_home_and_a_token_of_its_own(self, ground: Ground[Any]) -> None:
        one, other = await ground.make(ONE), await ground.make(OTHER)
        await run(one, ["sh", "-c", "echo secret > file"], one.machine.home, {}, 20)
        assert await ground.provider.known() == {ONE, OTHER}
        seen = await run(other, ["cat", f"{one.machine.home}/file"], other.machine.home, {}, 20)
        assert "secret" not in seen.stdout
        url, vouched = f"{one.machine.url}/v1/acp", one.machine.vouched
        for headers in ({}, {"Authorization": f"Bearer {other.machine.token}"}):
            assert (await ground.http.send("GET", url, 5.0, vouched, headers=headers)).status_code == 401

    async def test_an_agent_ends_with_all_that_it_started(self, ground: Ground[Any]) -> None:
        first = await ground.start_agent("ses_1-1")
        both = await ground.start_agent("ses_2-1")
        assert len(both) == 2
        (second,) = both - first
        look = ["sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"]
        server = await ground.make()
        assert (await run(server, look, "/", {}, 20)).stdout.count("sleep 4321") == 4
        assert await ground.provider.end_agent(ONE, second)
        assert await ground.provider.agents(ONE) == first
        assert (await run(server, look, "/", {}, 20)).stdout.count("sleep 4321") == 2
        assert await ground.provider.end_agent(ONE, second)

    async def test_a_command_is_no_agent(self, ground: Ground[Any]) -> None:
        server = await ground.make()
        process = await server.start_process(["timeout", "100", "sleep", "50"], "/", {})
        assert await ground.provider.agents(ONE) == set()
        await server.stop_process(process)

    async def test_what_supervises_processes_can_run(self, ground: Ground[Any]) -> None:
        server = await ground.make()
        program = "import json, sys; print(json.dumps(sys.version_info >= (3, 9)))"
        seen = await run(server, [server.machine.python, "-c", program], "/", {}, 20)
        assert json.loads(seen.stdout) is True

    async def test_agents_of_a_machine_that_is_gone_are_gone(self, ground: Ground[Any]) -> None:
        (agent,) = await ground.start_agent("ses_1-1")
        await ground.kill(ONE)
        assert await ground.provider.agents(ONE) == set()
        assert await ground.provider.end_agent(ONE, agent)


AGENT = ["sh", "-c", "sleep 4321 & (setsid sleep 4321 &) ; exec cat"]
"""An agent with a child, and with a grandchild that has left its group; it takes all and says nothing."""
