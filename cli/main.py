"""The `branchline` command. What runs services is here; everything else is loaded when it is asked for."""

import asyncio
import contextlib
import importlib
import os
import sys
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cli.terminal import DEFAULT_DATA, DataDir, console, run

_GROUPS = ("call", "certs", "github", "history", "member", "org", "outbox", "repo", "sandbox", "setup", "task", "token")


class _Commands(TyperGroup):
    """Loads groups of commands from `cli/commands` one by one, so that a service keeps none of them in memory."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *_GROUPS]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in _GROUPS:
            return super().get_command(ctx, cmd_name)
        command = typer.main.get_command(importlib.import_module(f"cli.commands.{cmd_name}").app)
        command.name = cmd_name
        return command


class Isolation(StrEnum):
    """What keeps agents from the rest of this host."""

    AUTO = "auto"
    BUBBLEWRAP = "bubblewrap"
    NONE = "none"


IsolationOption = Annotated[
    Isolation | None,
    typer.Option(
        help="What keeps agents from the rest of this host: bubblewrap, or none on purpose. "
        "auto, the default, takes bubblewrap and refuses to start where it does not work."
    ),
]

app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Branchline: the multiplayer backend for coding agents.",
)


@app.callback()
def connection(
    ca: Annotated[
        Path | None,
        typer.Option(envvar="BRANCHLINE_CA", help="Authorities to believe of a gateway; a PEM file."),
    ] = None,
    insecure: Annotated[
        bool | None,
        typer.Option(envvar="BRANCHLINE_INSECURE", help="Plaintext, also to a gateway on another host."),
    ] = None,
) -> None:
    """Take what all commands that call the gateway share; they find it in the environment."""
    if ca is not None:
        os.environ["BRANCHLINE_CA"] = str(ca)
    if insecure is not None:
        os.environ["BRANCHLINE_INSECURE"] = str(insecure).lower()


@app.command()
def up(
    data_dir: DataDir = DEFAULT_DATA,
    agent: Annotated[str, typer.Option(help="Agent of tasks that name none.")] = "mock",
    isolation: IsolationOption = None,
) -> None:
    """Run all services in this process, until Ctrl-C. Agents are kept apart by bubblewrap, which must be installed."""
    run(_module("up").up(console, data_dir, agent, isolation))


@app.command()
def serve(
    service: Annotated[str, typer.Argument(help="The service's name, such as task or gateway.")],
    data_dir: DataDir = DEFAULT_DATA,
) -> None:
    """Run one service in this process, until it is told to stop."""
    os.execv(sys.executable, [sys.executable, "-m", "cli.server", service, str(data_dir)])  # noqa: S606


@app.command()
def migrate(data_dir: DataDir = DEFAULT_DATA) -> None:
    """Bring all databases to the newest schema. Services do that when they start, too."""
    run(_module("server").migrate(data_dir))


@app.command("migrate-data")
def migrate_data(data_dir: DataDir = DEFAULT_DATA) -> None:
    """Copy a stopped installation's SQLite files into the databases that the settings under `databases` name."""
    run(_module("migrate_data").migrate_data(console, data_dir))


@app.command()
def databases(
    admin_url: Annotated[
        str,
        typer.Option(
            envvar="BRANCHLINE_ADMIN_URL",
            help="How a role that may make others reaches the server: postgresql://postgres@HOST/postgres, if need be "
            "with ?password_file=PATH.",
        ),
    ],
    data_dir: DataDir = DEFAULT_DATA,
) -> None:
    """Make the roles and databases that the settings under `databases` name, each open to its own role alone.

    What is there stays, but for passwords, which become those of the settings.
    """
    run(_module("databases").make_databases(console, admin_url, data_dir))


@app.command()
def bootstrap(
    data_dir: DataDir = DEFAULT_DATA,
    agent: Annotated[str, typer.Option(help="Agent of tasks that name none.")] = "claude",
) -> None:
    """Create the first user, organization and token of services that run apart."""
    run(_module("up").bootstrap_apart(console, data_dir, agent))


@app.command()
def demo(
    source: Annotated[Path, typer.Option(help="Git repository that the agent works on.")] = Path(),
    data_dir: Annotated[Path | None, typer.Option(help="Data folder; a temporary one when not given.")] = None,
    isolation: IsolationOption = None,
) -> None:
    """Start everything, let a scripted agent change a file, commit and push, and show it live."""
    run(_module("demo").run(console, source.absolute(), data_dir, isolation))


def _module(name: str) -> ModuleType:
    """Load what runs services only for the commands that do."""
    return importlib.import_module(f"cli.{name}")


if __name__ == "__main__":
    with contextlib.suppress(asyncio.CancelledError):
        app()
