"""An installation moves from SQLite to PostgreSQL. It runs in this process, which can hold one at a time."""

import os
import re
from pathlib import Path

from branchline.v1 import tasks_pb2
from branchline.v1.tasks_pb2 import TASK_ACTIVITY_IDLE as IDLE

from cli.installation import GATEWAY, SERVICES
from cli.settings import Databases
from services.runtime.config import Secret
from tests.support.databases import server
from tests.support.process import branchline
from tests.support.stack import running_stack

OWNERS = [name for name in SERVICES if name != GATEWAY]


async def test_a_stopped_installation_moves_to_postgresql(tmp_path: Path) -> None:
    """Its tasks, sessions and workflows are there, watches work, and work goes on; its files are not needed."""
    urls = {name: server().create(f"moved_{name}") for name in OWNERS}
    environment = {**os.environ, **{f"BRANCHLINE_DATABASES__{name.upper()}": url for name, url in urls.items()}}
    command = ("migrate-data", "--data-dir", str(tmp_path / "data"))
    async with running_stack(tmp_path, Databases()) as stack:
        task = await stack.ready_task()
        await stack.send(task, "write a.txt: a\ncommit A\npush")
        await stack.until(task.id, activity=IDLE, turn=1)
        before = await stack.transcript(task)

        code, said = await branchline(environment, *command)
        assert code == 2
        assert "is in use" in said

    assert await branchline(environment, *command, "--data-dir", str(tmp_path / "nothing")) != (0, "")
    code, said = await branchline(environment, *command)
    assert code == 0, said
    assert re.search(r"^task, its workflows: copied [1-9]\d* rows", said, re.MULTILINE), said
    assert all(re.search(rf"^{name}: copied [1-9]\d* rows", said, re.MULTILINE) for name in ("task", "organization"))
    code, again = await branchline(environment, *command)
    assert code == 0, again
    assert "copied [1-9]" not in again

    for file in (tmp_path / "data").rglob("*.sqlite*"):
        file.unlink()
    moved = {name: Secret(url) for name, url in urls.items()}
    async with running_stack(tmp_path, Databases(**moved)) as stack:
        assert await stack.transcript(task) == before
        watching = stack.client.tasks.WatchTask(tasks_pb2.WatchTaskRequest(task_id=task.id))
        await stack.send(task, "write b.txt: b\ncommit B\npush")
        async for frame in watching:
            if any(change.task.activity == IDLE and change.task.head_commit for change in frame.changes):
                break
        await stack.until(task.id, activity=IDLE, turn=2)
    assert not list((tmp_path / "data").rglob("*.sqlite"))

    (tmp_path / "data" / "history").mkdir(exist_ok=True)
    code, said = await branchline({**environment, "BRANCHLINE_DATABASES__HISTORY": ""}, "migrate", *command[1:])
    assert code == 0, said
    code, said = await branchline(environment, *command)
    assert code == 2
    assert "is not empty" in said
