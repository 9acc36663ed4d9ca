"""An agent that is being started while services are killed, at every moment: no session is pending for ever."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
from branchline.v1 import sessions_pb2
from branchline.v1.common_pb2 import Prompt
from branchline.v1.tasks_pb2 import TASK_ACTIVITY_IDLE, Task

from tests.faults.test_restart import create_task, until
from tests.support.client import Client
from tests.support.people import insist, sessions
from tests.support.process import SERVICES, Processes, own_processes
from tests.support.stack import eventually

PENDING, IDLE, FAILED = (
    sessions_pb2.SESSION_STATE_PENDING,
    sessions_pb2.SESSION_STATE_IDLE,
    sessions_pb2.SESSION_STATE_FAILED,
)
MOMENTS = (
    ("task", "session opening"),
    ("sandbox", "session begun"),
    ("sandbox", "agent started"),
    ("sandbox", "agent noted"),
    ("sandbox", "session idle"),
    ("task", "session opened"),
    ("task", "session noted"),
)
AT_ONCE = 6


@dataclass
class House:
    """Services in processes of their own, with a task that is ready."""

    folder: Path
    processes: Processes
    client: Client
    organization_id: str
    task: Task

    async def create_session(self, task: Task) -> str:
        request = sessions_pb2.CreateSessionRequest(
            request_id=str(uuid.uuid4()), task_id=task.id, options=sessions_pb2.SessionOptions(agent="mock")
        )
        made = await insist(lambda: self.client.sessions.CreateSession(request, timeout=10))
        assert made is not None
        assert made.session.state == PENDING
        return made.session.id

    async def create_sessions(self, task: Task) -> list[str]:
        """Create sessions one after the other, so that each is at another moment."""
        made: list[str] = []
        for _ in range(AT_ONCE):
            made.append(await self.create_session(task))
            await asyncio.sleep(0.15)
        return made

    async def stand(self, task: Task, session_ids: Sequence[str]) -> list[int]:
        """Return how sessions stand once none is pending."""

        async def look() -> list[int] | None:
            states = [one.state for one in await sessions(self.client, task.id) if one.id in session_ids]
            return None if PENDING in states else list(states)

        try:
            return await eventually(look)
        except TimeoutError as error:
            raise AssertionError(f"pending for ever: {await sessions(self.client, task.id)}") from error

    async def say(self, session_id: str) -> None:
        """Give the agent of a session a turn; it is done."""
        text = sessions_pb2.SendMessageRequest(
            request_id=str(uuid.uuid4()), task_id=self.task.id, session_id=session_id, prompt=Prompt(text="say hello")
        )
        assert await insist(lambda: self.client.sessions.SendMessage(text, timeout=10)) is not None

        async def done() -> bool:
            found = next(one for one in await sessions(self.client, self.task.id) if one.id == session_id)
            return (found.state, found.turn) == (IDLE, 1)

        assert await eventually(done)

    async def kill(self, names: Sequence[str]) -> None:
        """Kill services and start them again."""
        for name in names:
            await self.processes.kill(name)
        for name in names:
            await self.processes.start(name, "serve", name)


@pytest_asyncio.fixture(scope="module")
async def house(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[House, None]:
    folder = tmp_path_factory.mktemp("opening")
    processes = own_processes(folder)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(processes.stop)
        for name in SERVICES:
            await processes.start(name, "serve", name)
        await processes.start("bootstrap", "bootstrap", "--agent", "mock")
        client, organization_id = await processes.client(stack)
        yield House(folder, processes, client, organization_id, await ready_task(client, organization_id, folder))


async def ready_task(client: Client, organization_id: str, folder: Path) -> Task:
    made = await create_task(client, organization_id, folder, "go")
    return await until(client, made.id, TASK_ACTIVITY_IDLE)


@pytest.mark.parametrize(("service", "moment"), MOMENTS)
async def test_a_service_that_is_killed_exactly_then_opens_the_session_once(
    house: House, service: str, moment: str
) -> None:
    before = house.processes.agents()
    await house.processes.kill(service)
    await house.processes.start(service, "serve", service, kill_at=moment)

    session_id = await house.create_session(house.task)
    await house.processes.killed(service)
    await house.processes.start(service, "serve", service)

    assert await house.stand(house.task, [session_id]) == [IDLE]
    await house.say(session_id)
    after = house.processes.agents()
    assert (len(after - before), before - after) == (1, set())


@pytest.mark.parametrize("killed", [("sandbox",), ("task",), ("task", "sandbox")], ids="+".join)
async def test_sessions_at_many_moments_are_all_opened_once_after_a_kill(house: House, killed: Sequence[str]) -> None:
    before = house.processes.agents()
    made = await house.create_sessions(house.task)

    await house.kill(killed)

    assert await house.stand(house.task, made) == [IDLE] * AT_ONCE
    await house.say(made[-1])
    after = house.processes.agents()
    assert (len(after - before), before - after) == (AT_ONCE, set())


@pytest.mark.parametrize("killed", [(), ("sandbox",), ("task",)], ids=["machines", "machines+sandbox", "machines+task"])
async def test_sessions_whose_machine_is_killed_are_opened_or_have_failed(house: House, killed: Sequence[str]) -> None:
    task = await ready_task(house.client, house.organization_id, house.folder)
    made = await house.create_sessions(task)

    house.processes.kill_sandboxes()
    await house.kill(killed)

    assert set(await house.stand(task, made)) <= {IDLE, FAILED}
