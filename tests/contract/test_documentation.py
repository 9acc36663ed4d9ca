"""What the documentation names exists."""

import re
from pathlib import Path
from typing import Any

import pytest
import typer
from branchline.v1.tasks_pb2 import TaskActivity, TaskState

from cli.main import app
from gateway.routes import PACKAGE, PUBLIC

PAGES = [Path("README.md"), Path("CONTRIBUTING.md"), *Path("docs").glob("*.md"), *Path("sdk").glob("*/README.md")]


def subcommands(command: Any, context: Any) -> dict[str, Any]:
    names = command.list_commands(context) if hasattr(command, "list_commands") else ()
    return {name: command.get_command(context, name) for name in names}


BRANCHLINE: Any = typer.main.get_command(app)
CONTEXT: Any = typer.Context(BRANCHLINE)
COMMANDS = {name: list(subcommands(one, CONTEXT)) for name, one in subcommands(BRANCHLINE, CONTEXT).items()}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_public_method_and_service_that_is_named_exists(page: Path) -> None:
    text = page.read_text()
    services = {name.partition("/")[0] for name in PUBLIC}
    named = set(re.findall(rf"\b{re.escape(PACKAGE)}\.([A-Z]\w*/[A-Z]\w*)", text))
    called = {"/".join(pair) for pair in re.findall(r"branchline call (\w+) (\w+)", text)}

    assert not (named | called) - set(PUBLIC)
    assert not set(re.findall(rf"\b{re.escape(PACKAGE)}\.([A-Z]\w*Service)\b", text)) - services


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_file_that_is_linked_to_exists(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())

    assert not [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_command_that_is_named_exists(page: Path) -> None:
    text = page.read_text()
    named = set(re.findall(r"(?<!from )\bbranchline ([a-z]\w*)(?: ([a-z]\w*))?", text))
    groups = "|".join(name for name in COMMANDS if COMMANDS[name])

    assert not [name for name, _ in named if name not in COMMANDS]
    assert not [(name, one) for name, one in named if one and COMMANDS[name] and one not in COMMANDS[name]]
    assert not re.findall(rf"`(?:{groups}) \w+`", text), "these words alone are no command"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_states_are_named_as_the_contract_names_them(page: Path) -> None:
    states = {
        value.name.removeprefix(prefix).lower()
        for enum, prefix in ((TaskState, "TASK_STATE_"), (TaskActivity, "TASK_ACTIVITY_"))
        for value in enum.DESCRIPTOR.values
    }

    assert not {"error", "pending", *states} & set(re.findall(r"`(\w+)`", page.read_text()))
