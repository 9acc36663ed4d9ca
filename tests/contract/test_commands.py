"""Commands are done once, on both databases, however often and whenever their request comes. F11."""

import asyncio
from collections.abc import AsyncGenerator

import pytest
import pytest_asyncio
from branchline.v1 import errors_pb2, tasks_pb2
from branchline.v1.tasks_pb2 import Task
from sqlalchemy import func, select

from services.runtime.clock import Clock
from services.runtime.database import Database, Statement, Tx
from services.runtime.errors import DomainError, FailedPrecondition, InvalidArgument
from services.runtime.principal import Principal, bind_principal
from services.runtime.spine import commands as commands_module
from services.runtime.spine.commands import Commands
from services.runtime.spine.outbox import Mark, Outbox
from services.runtime.spine.tables import requests

COUNT = Statement(select(func.count()).select_from(requests))


@pytest.fixture
def outbox(database: Database) -> Outbox:
    return Outbox(database, Clock())


@pytest_asyncio.fixture
async def commands(database: Database) -> AsyncGenerator[Commands, None]:
    yield Commands(database, Clock())


def request(request_id: str = "r1", body: str = "a") -> tasks_pb2.CreateTaskRequest:
    return tasks_pb2.CreateTaskRequest(request_id=request_id, repository_id=body)


class Work:
    """What a command does: something new each time, and a mark."""

    def __init__(self, outbox: Outbox) -> None:
        self.outbox = outbox
        self.called_out = 0

    def inside(self, tx: Tx, title: str) -> Task:
        task = Task(id=Clock().new_id("task"), revision=1, title=title)
        self.outbox.mark(tx, [Mark(task.id, 1, task)])
        return task

    async def outside(self) -> str:
        self.called_out += 1
        await asyncio.sleep(0.01)
        return "from outside"


@pytest.mark.parametrize("way", ["run", "once"])
async def test_the_same_request_at_once_and_later_is_done_once(commands: Commands, outbox: Outbox, way: str) -> None:
    bind_principal(Principal(user_id="u1"))
    work = Work(outbox)

    async def call() -> Task:
        if way == "run":
            return await commands.run(request(), Task, work.inside, "a")
        return await commands.once(request(), Task, work.outside, work.inside)

    answers = [*await asyncio.gather(*(call() for _ in range(10))), await call()]

    assert len({answer.id for answer in answers}) == 1
    assert await outbox.counts() == (1, 0)
    assert work.called_out <= 1
    assert not commands._lanes._locks  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize("way", ["run", "once"])
async def test_an_id_used_for_another_request_is_refused(commands: Commands, outbox: Outbox, way: str) -> None:
    bind_principal(Principal(user_id="u1"))
    work = Work(outbox)
    await commands.run(request(body="a"), Task, work.inside, "a")

    other = request(body="b")
    again = (
        commands.run(other, Task, work.inside, "b")
        if way == "run"
        else commands.once(other, Task, work.outside, work.inside)
    )
    with pytest.raises(InvalidArgument, match="request_id"):
        await again

    assert (await outbox.counts(), work.called_out) == ((1, 0), 0)


async def test_another_caller_may_use_the_same_id(commands: Commands, outbox: Outbox) -> None:
    work, answers = Work(outbox), set[str]()
    for user in ("u1", "u2"):
        bind_principal(Principal(user_id=user))
        answers.add((await commands.run(request(), Task, work.inside, "a")).id)

    assert len(answers) == 2


async def test_a_command_that_was_refused_or_could_not_call_out_may_be_tried_again(
    commands: Commands, outbox: Outbox
) -> None:
    bind_principal(Principal(user_id="u1"))
    work, refusals = Work(outbox), [True]

    def refuse(tx: Tx, title: str) -> Task:
        made = work.inside(tx, title)
        if refusals:
            refusals.pop()
            raise FailedPrecondition(errors_pb2.ERROR_REASON_RESOURCE_NOT_FOUND, "not yet")
        return made

    async def fail() -> str:
        raise ConnectionError

    with pytest.raises(DomainError):
        await commands.run(request(), Task, refuse, "a")
    with pytest.raises(ConnectionError):
        await commands.once(request("r2"), Task, fail, work.inside)
    assert await outbox.counts() == (0, 0)

    await commands.run(request(), Task, refuse, "a")
    await commands.once(request("r2"), Task, work.outside, work.inside)
    assert await outbox.counts() == (2, 0)


async def test_answers_are_forgotten_after_a_week_and_not_before(
    database: Database, commands: Commands, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    bind_principal(Principal(user_id="u1"))
    await commands.run(request(), Task, Work(outbox).inside, "a")
    await commands.forget_old()
    kept = await database.read(lambda tx: tx.value(COUNT))
    monkeypatch.setattr(commands_module, "KEEP_SECONDS", -1.0)
    await commands.forget_old()

    assert (kept, await database.read(lambda tx: tx.value(COUNT))) == (1, 0)
