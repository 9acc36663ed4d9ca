"""What a team does first, through the published port alone: a task in a Docker sandbox that pushes to a git server."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from branchline.v1.tasks_pb2 import Task

from tests.compose.installation import Composed
from tests.compose.work import PUSHED_SECONDS, create_task, finished
from tests.support.client import Client
from tests.support.people import get_task, sessions, transcript
from tests.support.stack import eventually

PROGRAMS = Path(sys.executable).parent

pytestmark = pytest.mark.timeout(900)


def run(installation: Composed, *command: str) -> str:
    """Run a client's program against the published port."""
    environment = {
        **os.environ,
        "BRANCHLINE_ADDRESS": installation.address,
        "BRANCHLINE_TOKEN": installation.token,
    }
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert not ran.returncode, f"{' '.join(command[:3])}: {ran.stdout}{ran.stderr}"
    return ran.stdout


def grpcurl(installation: Composed, method: str, request: dict[str, Any]) -> Any:
    """Call a method as somebody without a library does."""
    bearer = f"authorization: Bearer {installation.token}"
    command = (str(PROGRAMS / "grpcurl"), "-plaintext", "-H", bearer, "-d", json.dumps(request))
    return json.loads(run(installation, *command, installation.address, f"branchline.v1.{method}"))


async def test_stubs_have_an_agent_commit_and_push(
    installation: Composed, client: Client, repository: str
) -> None:  # OPS-2, SBX-3
    task = await create_task(client, repository, "write NOTE.md: hello\ncommit Add a note\npush")
    done = await finished(client, task.id)

    async def with_commit() -> Task | None:
        task = await get_task(client, done.id)
        return task if task.head_commit else None

    row = await eventually(with_commit)
    assert installation.in_git("rev-parse", f"refs/heads/{row.branch}") == row.head_commit
    assert installation.in_git("show", f"{row.branch}:NOTE.md") == "hello"


async def test_grpcurl_and_the_command_line_do_the_same(installation: Composed, repository: str) -> None:
    services = run(installation, str(PROGRAMS / "grpcurl"), "-plaintext", installation.address, "list").split()
    assert "branchline.v1.TaskService" in services
    script = "write BY_HAND.md: hello\ncommit By hand\npush"
    request = {"repository_id": repository, "prompt": {"text": script}}
    task = grpcurl(installation, "TaskService/CreateTask", request)["task"]

    async def pushed() -> str:
        shown = grpcurl(installation, "TaskService/GetTask", {"task_id": task["id"]})["task"]
        return shown.get("headCommit", "")

    commit = await eventually(pushed, PUSHED_SECONDS)
    assert installation.in_git("rev-parse", f"refs/heads/{task['branch']}") == commit

    branchline = str(PROGRAMS / "branchline")
    run(installation, branchline, "task", "send", task["id"], "say How do you do?")

    async def said() -> bool:
        return "How do you do?" in run(installation, branchline, "task", "show", task["id"])

    await eventually(said)
    assert task["id"] in run(installation, branchline, "task", "list")


async def test_a_service_that_is_killed_comes_back_and_the_turn_goes_on(
    installation: Composed, client: Client, repository: str
) -> None:  # OPS-3
    words = [f"word{number}" for number in range(40)]
    script = "\n".join(f"say {word}\nwait 0.2" for word in words)
    task = await create_task(client, repository, script)

    async def began() -> bool:
        held = await sessions(client, task.id)
        entries = await transcript(client, task.id, held[0].id) if held else []
        return any(words[3] in entry.agent_message.text for entry in entries)

    await eventually(began, PUSHED_SECONDS)
    installation.crash("task")
    await finished(client, task.id)
    (session,) = await sessions(client, task.id)
    entries = await transcript(client, task.id, session.id)
    said = "".join(entry.agent_message.text for entry in entries).split()
    assert [word for word in said if word.startswith("word")] == words
    assert [entry.position for entry in entries] == list(range(1, len(entries) + 1))
