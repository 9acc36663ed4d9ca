"""The TypeScript package against the running program: its own tests, given an address. Item 6."""

import asyncio
import os
from pathlib import Path

import grpc
import pytest
from branchline.v1 import tasks_pb2, users_pb2
from branchline.v1.roles_pb2 import ROLE_MEMBER

from cli.certificates import DOOR
from tests.integration.test_command_line import run
from tests.support.certificates import certificates, replace
from tests.support.stack import Stack, eventually, request_id
from tests.unit.sdk.server import served

PACKAGE = Path(__file__).parents[2] / "sdk" / "typescript"


@pytest.mark.timeout(300)
async def test_the_typescript_client_calls_lists_and_watches(stack: Stack) -> None:
    task = await stack.create_task(await stack.add_repository())

    code, out, errors = await run(
        "npm", "--prefix", str(PACKAGE), "test", BRANCHLINE_ADDRESS=stack.address, BRANCHLINE_TOKEN=stack.token
    )

    assert task.id
    assert code == 0, out + errors
    assert "# fail 0" in out
    assert "# skipped 0" in out


@pytest.mark.timeout(300)
async def test_the_typescript_client_speaks_tls_and_says_what_is_wrong(tmp_path: Path) -> None:  # issue 12, 5
    certs, other = certificates(tmp_path / "certs"), certificates(tmp_path / "other")
    assert (await run("npm", "--prefix", str(PACKAGE), "run", "build"))[0] == 0

    async def look(address: str, fault: str) -> None:
        code, out, errors = await run(
            *("node", "--test", str(PACKAGE / "dist" / "test" / "tls.test.js")),
            BRANCHLINE_ADDRESS=address,
            BRANCHLINE_CA=str(certs / "ca" / "ca.crt"),
            TEST_OTHER_CA=str(other / "ca" / "ca.crt"),
            TEST_FAULT=fault,
        )
        assert code == 0, out + errors
        assert "# skipped 0" in out

    shown = (("none", ["127.0.0.1"], 30), ("wrong_name", ["gateway.example"], 30), ("expired", ["127.0.0.1"], -0.001))
    for fault, names, days in shown:
        place = replace(certs, DOOR, names, days=days)
        pair = ((place / "tls.key").read_bytes(), (place / "tls.crt").read_bytes())
        async with served(grpc.ssl_server_credentials([pair])) as server:
            await look(server.address, fault)
    async with served() as server:
        await look(server.address, "no_tls")


def test_the_session_in_the_readme_is_the_one_that_compiles() -> None:
    assert (PACKAGE / "examples" / "session.ts").read_text() in (PACKAGE / "README.md").read_text()


@pytest.mark.timeout(300)
async def test_the_session_in_the_readme_prints_what_the_agent_says_once(stack: Stack) -> None:
    await stack.add_repository()
    await stack.new_organization()  # the session takes the first that it sees
    here_alone = users_pb2.TokenScope(role=ROLE_MEMBER, organization_ids=[stack.organization_id])
    made = await stack.client.users.CreateApiToken(
        users_pb2.CreateApiTokenRequest(request_id=request_id(), display_name="a session", scope=here_alone)
    )
    assert (await run("npm", "--prefix", str(PACKAGE), "run", "build"))[0] == 0
    example = await asyncio.create_subprocess_exec(
        "node",
        str(PACKAGE / "dist" / "examples" / "session.js"),
        env={**os.environ, "BRANCHLINE_ADDRESS": stack.address, "BRANCHLINE_TOKEN": made.secret},
        stdout=asyncio.subprocess.PIPE,
    )
    assert example.stdout is not None
    try:
        async with asyncio.timeout(120):
            _, branch = (await example.stdout.readline()).decode().split()
            task_id = await _task_on(stack, branch)
            await stack.until(task_id, activity=tasks_pb2.TASK_ACTIVITY_IDLE, turn=1)
            await stack.client.tasks.ArchiveTask(tasks_pb2.ArchiveTaskRequest(task_id=task_id))
            lines: list[str] = []
            while not lines or not lines[-1].startswith("ARCHIVED "):  # it watches for ever
                lines.append((await example.stdout.readline()).decode())
    finally:
        example.kill()
        await example.wait()

    states = set(tasks_pb2.TaskState.keys())
    said = [line for line in lines if f"TASK_STATE_{line.split(' ')[0]}" not in states]
    assert said == ["hello in README.md\n", "Done.\n", "\n"]


async def _task_on(stack: Stack, branch: str) -> str:
    async def look() -> str:
        request = tasks_pb2.ListTasksRequest(organization_id=stack.organization_id)
        found = (await stack.client.tasks.ListTasks(request)).tasks
        return next((one.id for one in found if one.branch == branch), "")

    return await eventually(look)
