"""Branchline as people use it: the demo, the command line, and grpcurl with reflection."""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from branchline.v1 import tasks_pb2

from tests.support.stack import Stack, git, make_remote, request_id

BIN = Path(sys.executable).parent


async def run(*command: str, **environment: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *command,
        env={**os.environ, **environment},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(120):
        out, errors = await process.communicate()
    return process.returncode or 0, out.decode(), errors.decode()


async def grpcurl(stack: Stack, method: str, request: dict[str, Any], *options: str) -> str:
    bearer = f"authorization: Bearer {stack.token}"
    command = [str(BIN / "grpcurl"), "-plaintext", "-H", bearer, *options, "-d", json.dumps(request)]
    _, out, errors = await run(*command, stack.address, f"branchline.v1.{method}")
    return out + errors


async def branchline(stack: Stack, *arguments: str) -> tuple[int, str, str]:
    return await run(
        str(BIN / "branchline"), *arguments, BRANCHLINE_ADDRESS=stack.address, BRANCHLINE_TOKEN=stack.token
    )


async def test_the_demo_ends_with_the_sidebar_and_the_remote_in_agreement(tmp_path: Path) -> None:  # OPS-1
    work = tmp_path / "project"
    git("clone", "--quiet", str(make_remote(tmp_path)), str(work))

    code, out, errors = await run(
        str(BIN / "branchline"), "demo", "--source", str(work), "--data-dir", str(tmp_path / "data")
    )

    assert code == 0, errors
    for words in ("provisioning (sandbox)", "running", "Written by an agent", "agent finished", "they agree"):
        assert words in out
    assert not (tmp_path / "data" / "sandbox" / "local" / "server.json").exists()


async def test_grpcurl_lists_creates_and_watches_without_protos(stack: Stack) -> None:  # API-1
    _, services, _ = await run(str(BIN / "grpcurl"), "-plaintext", stack.address, "list")
    _, health, _ = await run(str(BIN / "grpcurl"), "-plaintext", stack.address, "grpc.health.v1.Health/Check")
    remote = make_remote(stack.remotes)
    added = json.loads(
        await grpcurl(
            stack,
            "RepositoryService/CreateRepository",
            {"request_id": request_id(), "organization_id": stack.organization_id, "remote_url": f"file://{remote}"},
        )
    )
    made = json.loads(
        await grpcurl(
            stack,
            "TaskService/CreateTask",
            {
                "request_id": request_id(),
                "repository_id": added["repository"]["id"],
                "prompt": {"text": "write NOTE.md: hello\ncommit Add a note\npush"},
            },
        )
    )
    await stack.until(made["task"]["id"], activity=tasks_pb2.TASK_ACTIVITY_IDLE, turn=1)
    watched = await grpcurl(stack, "TaskService/WatchTask", {"task_id": made["task"]["id"]}, "-max-time", "3")

    assert "branchline.v1.TaskService" in services.split()
    assert "SERVING" in health
    assert git("show", f"{made['task']['branch']}:NOTE.md", cwd=remote) == "hello"
    for words in ("FRAME_KIND_RESET", "FRAME_KIND_SYNCED", "resumeToken", "transcriptEntry"):
        assert words in watched


async def test_the_command_line_adds_creates_lists_shows_and_sends(stack: Stack) -> None:  # OPS-6
    _, added, _ = await branchline(stack, "repo", "add", f"file://{make_remote(stack.remotes)}")
    repository_id = added.split()[-1]
    code, created, errors = await branchline(
        stack, "task", "create", repository_id, "say good morning", "--branch", "hello", "--watch"
    )
    task_id = created.split()[0]
    await branchline(stack, "task", "send", task_id, "say good night")
    await stack.until(task_id, activity=tasks_pb2.TASK_ACTIVITY_IDLE, turn=2)
    _, listed, _ = await branchline(stack, "task", "list", "--query", "HELLO")
    _, shown, _ = await branchline(stack, "task", "show", task_id)
    _, history, _ = await branchline(stack, "history", "--task", task_id, "--json")

    assert code == 0, errors
    assert "good morning" in created
    assert task_id in listed
    assert "good night" in shown
    assert json.loads(history.splitlines()[0])["kind"] == "EVENT_KIND_TASK_CREATED"


async def test_the_command_line_says_what_is_wrong(stack: Stack) -> None:
    code, _, errors = await branchline(stack, "task", "show", "task_x")

    assert code == 1
    assert 'NOT_FOUND RESOURCE_NOT_FOUND: there is no task "task_x"' in errors


async def test_the_command_line_shows_an_errors_details_and_no_stack(stack: Stack) -> None:
    remote = f"file://{make_remote(stack.remotes)}"
    first, added, _ = await branchline(stack, "repo", "add", remote)

    code, _, errors = await branchline(stack, "repo", "add", remote)

    assert (first, code) == (0, 1)
    assert "ALREADY_EXISTS REPOSITORY_EXISTS" in errors
    assert f"repository_id: {added.split()[-1]}" in errors
    assert "Traceback" not in errors


async def test_an_unknown_setting_is_an_error(tmp_path: Path) -> None:
    code, _, errors = await run(
        str(BIN / "branchline"), "up", "--data-dir", str(tmp_path), BRANCHLINE_SIGNNG_KEY="mistyped"
    )

    assert code == 2
    assert "BRANCHLINE_SIGNNG_KEY is not a setting" in errors


@pytest.mark.parametrize("pause_seconds", [0.0, 0.05, 0.2])
async def test_a_task_that_is_killed_at_its_birth_leaves_no_sandbox(
    stack: Stack, pause_seconds: float
) -> None:  # TSK-7
    task = await stack.create_task(await stack.add_repository())
    await asyncio.sleep(pause_seconds)

    await stack.client.tasks.KillTask(tasks_pb2.KillTaskRequest(request_id=request_id(), task_id=task.id))
    await stack.until(task.id, state=tasks_pb2.TASK_STATE_KILLED)
    await asyncio.sleep(1)  # long enough for a creation on its way to arrive

    listed = await stack.client.tasks.ListSandboxes(tasks_pb2.ListSandboxesRequest(task_id=task.id))
    folder = stack.installation.settings.data_dir / "sandbox" / "local"
    assert all(not (folder / sandbox.id).exists() for sandbox in listed.sandboxes)
    assert (await stack.task(task.id)).state == tasks_pb2.TASK_STATE_KILLED


@pytest.fixture
def path_without_bubblewrap(tmp_path: Path) -> str:
    """A PATH that has everything of this host but bwrap."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for directory in os.environ["PATH"].split(os.pathsep):
        for program in Path(directory).glob("*") if Path(directory).is_dir() else ():
            if program.name != "bwrap" and not (folder / program.name).exists():
                (folder / program.name).symlink_to(program)
    return str(folder)


async def test_up_refuses_to_start_without_isolation_and_says_how_to(
    tmp_path: Path, path_without_bubblewrap: str
) -> None:  # F14
    code, _, errors = await run(
        str(BIN / "branchline"), "up", "--data-dir", str(tmp_path / "data"), PATH=path_without_bubblewrap
    )

    assert code == 2
    assert "apt-get install bubblewrap" in errors
    assert "--isolation none" in errors


async def test_the_demo_runs_its_scripted_agent_without_bubblewrap_and_says_so(
    tmp_path: Path, path_without_bubblewrap: str
) -> None:  # F14
    work = tmp_path / "project"
    git("clone", "--quiet", str(make_remote(tmp_path)), str(work))

    code, out, errors = await run(
        *(str(BIN / "branchline"), "demo", "--source", str(work), "--data-dir", str(tmp_path / "data")),
        PATH=path_without_bubblewrap,
    )

    assert code == 0, errors
    assert "--isolation none" in out
    assert "they agree" in out


async def test_only_the_gateway_has_a_port(stack: Stack) -> None:  # F13
    listening = {
        connection.laddr.port
        for connection in psutil.Process().net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }

    assert listening == {int(stack.address.rpartition(":")[2])}
