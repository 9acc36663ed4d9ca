"""What a team does first, through the published port alone: a task in a Docker sandbox that pushes to a git server."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from branchline.v1.tasks_pb2 import TASK_STATE_FAILED, Task

from cli.installation import ROOT
from services.sandbox.providers.ports import free_port
from tests.compose.installation import DOOR, Composed
from tests.compose.work import PUSHED_SECONDS, create_task, finished, organization_of
from tests.support.client import Client
from tests.support.people import get_task, sessions, transcript
from tests.support.stack import eventually, git

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


async def test_the_walk_of_the_readme_pushes_to_a_repository_of_this_machine(
    installation: Composed, client: Client
) -> None:  # OPS-2
    organization_id, remote = await organization_of(client), installation.remote
    adding = {"organization_id": organization_id, "remote_url": f"file://{remote}"}
    repository = grpcurl(installation, "RepositoryService/CreateRepository", adding)["repository"]
    request = {"repository_id": repository["id"], "prompt": {"text": "write NOTE.md: hello\ncommit Add a note\npush"}}
    task = grpcurl(installation, "TaskService/CreateTask", request)["task"]

    async def pushed() -> str:
        shown = await get_task(client, task["id"])
        assert shown.state != TASK_STATE_FAILED, shown.failure
        return shown.head_commit

    commit = await eventually(pushed, PUSHED_SECONDS)
    assert git("ls-remote", str(remote), f"refs/heads/{task['branch']}").split()[0] == commit


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


def test_with_the_door_the_gateway_shows_its_certificate_and_takes_no_plaintext(
    installation: Composed, tmp_path: Path
) -> None:  # OPS-7
    authority = tmp_path / "ca.crt"
    authority.write_text(installation.read("gateway", "/keys/door/ca.crt"))
    listen = f"127.0.0.1:{free_port()}"
    published = installation.beside(DOOR, BRANCHLINE_LISTEN=listen)
    published.address = listen
    gateway = ("up", "--detach", "--wait", "--no-deps", "gateway")
    published.compose(*gateway)
    try:
        method = (listen, "branchline.v1.UserService/GetCurrentUser")
        bearer = ("-H", f"authorization: Bearer {installation.token}")
        ask = str(PROGRAMS / "grpcurl")
        assert "memberships" in run(published, ask, "-cacert", str(authority), *bearer, *method)
        run(published, str(PROGRAMS / "branchline"), "--ca", str(authority), "task", "list")
        plain = subprocess.run([ask, "-plaintext", *bearer, *method], capture_output=True, check=False, timeout=60)
        assert plain.returncode
    finally:
        installation.compose(*gateway)


def test_make_compose_shows_where_the_token_is_and_says_so_when_it_was_taken_away(
    installation: Composed, tmp_path: Path
) -> None:  # OPS-2
    checkout = tmp_path / "checkout"
    machine = shutil.ignore_patterns(".venv", "node_modules", "data", ".env", "__pycache__")
    shutil.copytree(ROOT, checkout, ignore=machine, symlinks=True)
    environment = {**os.environ, **installation.environment, "COMPOSE_PROJECT_NAME": installation.project}

    def up() -> str:
        ran = subprocess.run(
            [checkout / "deploy" / "compose" / "up"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        assert not ran.returncode, ran.stdout + ran.stderr
        return ran.stdout

    token = installation.token
    assert f"gateway  {installation.address}" in up()
    assert (checkout / "data" / "token").read_text() == token
    installation.compose("run", "--rm", "--no-deps", "--entrypoint", "rm", "operator", "/var/lib/branchline/token")
    assert "token issue EMAIL" in up()
