"""Work goes on while everything is killed and stopped, by chance and again by the same seed; then all must agree."""

import asyncio
import contextlib
import itertools
import os
import random
import signal
import uuid
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from branchline.v1 import repositories_pb2
from branchline.v1.history_pb2 import EventKind
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.books import (
    Books,
    broken_promises,
    disagreements,
    settled,
    watch_tasks,
    wrong_endings,
    wrong_numbers,
)
from tests.support.client import Client
from tests.support.people import Person, insist
from tests.support.process import SERVICES, Processes, own_processes
from tests.support.stack import eventually, make_remote
from tests.support.views import View

KILLS = int(os.environ.get("TEST_KILLS", "15"))
SEED = int(os.environ.get("TEST_KILLS_SEED", "1"))
PEOPLE = 4
WATCHERS = 3


@dataclass
class Faults:
    """What befalls an installation."""

    processes: Processes
    chance: random.Random
    acknowledged: asyncio.Event

    async def befall(self) -> None:
        """Let one thing happen, and let it pass."""
        kills = (self.kill_one, self.kill_at_answer, self.kill_two, self.kill_all)
        others = (self.stop_one, self.stop_machines, self.kill_machines)
        await self.chance.choices((*kills, *others), (6, 6, 4, 2, 3, 2, 1))[0]()
        if self.chance.random() < 0.8:
            await self.serving()

    async def serving(self) -> None:
        """Wait until every service answers."""

        async def look() -> bool:
            return all([await self._answers(name) for name in SERVICES])

        await eventually(look)

    async def _answers(self, name: str) -> bool:
        address = self.processes.environment[f"BRANCHLINE_ADDRESSES__{name.upper()}"]
        async with grpc.aio.insecure_channel(address) as channel:
            checks: Any = health_pb2_grpc.HealthStub(channel)
            try:
                answer = await checks.Check(health_pb2.HealthCheckRequest(), timeout=1)
            except grpc.aio.AioRpcError as error:
                return error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
            return answer.status == health_pb2.HealthCheckResponse.SERVING

    async def kill_one(self) -> None:
        await self.kill(1)

    async def kill_at_answer(self) -> None:
        """Kill right after a command was acknowledged."""
        self.acknowledged.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5):
                await self.acknowledged.wait()
        await self.kill(1)

    async def kill_two(self) -> None:
        await self.kill(2)

    async def kill_all(self) -> None:
        await self.kill(len(SERVICES))

    async def kill(self, count: int) -> None:
        names = self.chance.sample(SERVICES, count)
        print("kill", names)  # noqa: T201
        for name in names:
            await self.processes.kill(name)
        await asyncio.sleep(self.chance.uniform(0, 1.5))
        for name in names:
            await self.processes.start(name, "serve", name)

    async def stop_one(self) -> None:
        process = self.processes.running[self.chance.choice(SERVICES)]
        await self.stop([psutil.Process(process.pid)])

    async def stop_machines(self) -> None:
        await self.stop(self.processes.sandbox_processes("sandbox-agent"))

    async def kill_machines(self) -> None:
        print("kill machines")  # noqa: T201
        self.processes.kill_sandboxes()

    async def stop(self, processes: list[psutil.Process]) -> None:
        print("stop", processes)  # noqa: T201
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(self.chance.uniform(1, 6))
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)


@pytest.mark.timeout(600)
async def test_everything_is_killed_and_all_agree_at_rest(tmp_path: Path) -> None:  # OPS-2, OPS-3, API-4, SES-7
    processes, chance = own_processes(tmp_path), random.Random(SEED)
    books, enough, acknowledged = Books(processes), asyncio.Event(), asyncio.Event()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(processes.stop)
        for name in SERVICES:
            await processes.start(name, "serve", name)
        await processes.start("bootstrap", "bootstrap", "--agent", "mock")
        client, organization_id = await processes.client(stack)
        repository_id = await add_repository(client, organization_id, tmp_path)
        views = [View("organization", client.watch_organization(organization_id)).open() for _ in range(WATCHERS)]
        feeds = [View("history", client.watch_history(organization_id)).open() for _ in range(WATCHERS)]
        numbers = itertools.count(1)
        people = [
            Person(client, organization_id, repository_id, random.Random(f"{SEED}/{number}"), numbers, acknowledged)
            for number in range(PEOPLE)
        ]
        task_views: dict[str, View] = {}
        watching = asyncio.create_task(watch_tasks(client, people, task_views))
        at_work = [asyncio.create_task(person.work(enough)) for person in people]
        faults = Faults(processes, chance, acknowledged)
        for _ in range(KILLS):
            await asyncio.sleep(chance.uniform(0.2, 4))
            await faults.befall()
        enough.set()
        await asyncio.gather(*at_work)
        await settled(books)
        watching.cancel()

        done = {one: sum(event.kind == one for event in books.events()) for one in EventKind.values()}
        print({EventKind.Name(one): count for one, count in done.items() if count})  # noqa: T201
        problems = [f"stuck: {words}" for person in people for words in person.stuck]
        problems += list(broken_promises(books, people))
        problems += list(wrong_endings(books))
        problems += list(wrong_numbers(books))
        problems += await disagreements(client, organization_id, books, views, feeds, task_views)
        for view in (*views, *feeds, *task_views.values()):
            await view.close()
        assert not problems, "\n".join(problems)


async def add_repository(client: Client, organization_id: str, folder: Path) -> str:
    remote = make_remote(folder / "remotes")
    request = repositories_pb2.CreateRepositoryRequest(
        request_id=str(uuid.uuid4()), organization_id=organization_id, remote_url=f"file://{remote}"
    )
    added = await insist(lambda: client.repositories.CreateRepository(request))
    assert added is not None
    return added.repository.id
