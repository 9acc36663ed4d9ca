"""What one message costs the databases, from the call until the agent has it and all indexes follow."""

import asyncio
import gc
import statistics
from pathlib import Path

from branchline.v1.tasks_pb2 import TASK_ACTIVITY_IDLE

from services.runtime.database import Database
from tests.bench.result import Options, Row, within
from tests.support.stack import Stack, running_stack

_TASKS = 5
_SILENT = "wait 60"
_QUIET_SECONDS = 1.5
_LOOK_SECONDS = 0.25


async def statements(options: Options, folder: Path) -> list[Row]:
    """Send a message to an agent that says nothing. A first turn has opened its session before."""
    counted: list[tuple[int, int]] = []
    async with running_stack(folder) as stack:
        repository_id = await stack.add_repository()
        for _ in range(min(_TASKS, options.rounds)):
            counted.append(await _one_message(stack, repository_id))
    found = [statistics.median(numbers) for numbers in zip(*counted, strict=True)]
    return [
        within("statements for one SendMessage", "", found[0], 40),
        within("commits for one SendMessage", "", found[1], 8),
    ]


async def _one_message(stack: Stack, repository_id: str) -> tuple[int, int]:
    task = await stack.ready_task(repository_id)
    await stack.send(task, "say hello")
    await stack.until(task.id, activity=TASK_ACTIVITY_IDLE, turn=1)
    before = await _quiet()
    await stack.send(task, _SILENT)
    after = await _quiet()
    return after[0] - before[0], after[1] - before[1]


async def _quiet() -> tuple[int, int]:
    """Wait until no database has done anything for a while; return the statements and commits of all."""
    seen, since = _counts(), 0.0
    while since < _QUIET_SECONDS:
        await asyncio.sleep(_LOOK_SECONDS)
        now = _counts()
        since = since + _LOOK_SECONDS if now == seen else 0.0
        seen = now
    return seen


def _counts() -> tuple[int, int]:
    """Return the statements and commits of every database in this process."""
    databases = [one for one in gc.get_objects() if isinstance(one, Database)]
    return sum(one.statements for one in databases), sum(one.commits for one in databases)
