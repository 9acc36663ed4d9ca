"""The examples of the Python SDK, run as their reader would, against the running program. Item 6."""

import asyncio
import re
import sys
from pathlib import Path

import pytest
from branchline.v1 import tasks_pb2

from tests.integration.test_command_line import run
from tests.support.stack import Stack, git, make_remote

PYTHON = Path(__file__).parents[2] / "sdk" / "python"
EXAMPLES = PYTHON / "examples"


async def example(stack: Stack, name: str, *arguments: str, token: str = "") -> tuple[int, str, str]:
    environment = {"BRANCHLINE_ADDRESS": stack.address, "BRANCHLINE_TOKEN": token or stack.token}
    return await run(sys.executable, str(EXAMPLES / f"{name}.py"), *arguments, **environment)


async def test_a_task_is_started_and_spoken_to_twice(stack: Stack) -> None:
    remote = make_remote(stack.remotes)

    first = await example(stack, "start_task", f"file://{remote}", "write NOTE.md: hello\ncommit Add a note\npush")
    again = await example(stack, "start_task", f"file://{remote}", "say hello")  # the repository is known by now

    branch = re.match(r"task_\w+ on (\S+)\n", first[1])
    assert first[0] == 0, first
    assert branch is not None
    assert git("show", f"{branch.group(1)}:NOTE.md", cwd=remote) == "hello"
    assert "\n* " in first[1]
    assert first[1].endswith("> say and more\nand more\nDone.\n")
    assert (again[0], "hello\nDone.\n" in again[1]) == (0, True), again


async def test_what_an_agent_asks_is_answered_from_the_organizations_watch(stack: Stack) -> None:
    task = await stack.ready_task()
    await stack.send(task, "ask May I write?\nwrite a.txt: yes")

    code, out, errors = await example(stack, "answer_agents")
    await stack.until(task.id, activity=tasks_pb2.TASK_ACTIVITY_IDLE, turn=1)

    assert code == 0, errors
    assert "May I write?\n" in out  # and whatever else waits in the organization


async def test_a_commands_output_and_exit_code_are_the_readers(stack: Stack) -> None:
    task = await stack.ready_task()

    code, out, errors = await example(
        stack, "run_process", task.id, "sh", "-c", "echo out; sleep 0.3; echo err >&2; exit 3"
    )

    assert (code, out, errors) == (3, "out\n", "err\n")


async def test_a_file_is_uploaded_and_lies_where_the_agent_finds_it(stack: Stack, tmp_path: Path) -> None:
    task = await stack.ready_task()
    file = tmp_path / "large.txt"
    file.write_bytes(b"line\n" * 500_000)  # three parts

    code, out, errors = await example(
        stack, "attach_file", task.id, str(file), "run find ~ -name '*large.txt' -exec wc -c {} +"
    )
    await stack.until(task.id, activity=tasks_pb2.TASK_ACTIVITY_IDLE, turn=1)

    entries = await stack.transcript(task)
    assert code == 0, errors
    assert out.endswith(": 2500000 bytes of text/plain\nentry\n")
    assert any("2500000" in part.text for entry in entries for part in entry.tool_call.outputs)


async def test_tasks_are_listed_and_followed_without_async(stack: Stack) -> None:
    task = await stack.ready_task()

    listing = asyncio.create_task(example(stack, "list_tasks", "5"))
    code, out, errors = await listing

    assert code == 0, errors
    assert f"{task.id} TASK_STATE_ACTIVE TASK_ACTIVITY_IDLE" in out


async def test_the_programs_in_the_readme_run_as_they_stand(stack: Stack) -> None:
    task = await stack.ready_task()
    programs = re.findall(r"```python\n(.*?)```", (PYTHON / "README.md").read_text(), re.DOTALL)
    environment = {"BRANCHLINE_ADDRESS": stack.address, "BRANCHLINE_TOKEN": stack.token}

    ran = [await run(sys.executable, "-c", program, **environment) for program in programs]

    assert [code for code, _, _ in ran] == [0, 0], ran
    assert re.fullmatch(r"task_\w+ on \S+\nhello\nDone\.\n", ran[0][1])
    assert f"{task.id} TASK_ACTIVITY_IDLE" in ran[1][1]
    assert "NOT_FOUND, RESOURCE_NOT_FOUND: " in ran[1][1]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_every_example_is_run_here_and_told_of_in_the_readme(path: Path) -> None:
    assert f'"{path.stem}"' in Path(__file__).read_text()
    assert f"examples/{path.name}" in (PYTHON / "README.md").read_text()
