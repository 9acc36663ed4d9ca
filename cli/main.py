"""The `branchline` command."""

import asyncio
import contextlib
import importlib
import os
import sys
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import grpc
import typer
import uvloop
from branchline.client import Client
from branchline.gateway.v1 import (
    history_pb2,
    repositories_pb2,
    sessions_pb2,
    tasks_pb2,
    users_pb2,
)
from branchline.resource.v1.organization_pb2 import ROLE_UNSPECIFIED, ROLE_VIEWER
from google.protobuf.json_format import MessageToJson
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from rich.console import Console

from cli import views
from cli.settings import SettingsError, read_token

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Branchline: the multiplayer backend for coding agents.",
)
repo_app = typer.Typer(no_args_is_help=True, help="Repositories.")
task_app = typer.Typer(no_args_is_help=True, help="Tasks.")
token_app = typer.Typer(no_args_is_help=True, help="API tokens.")
app.add_typer(repo_app, name="repo")
app.add_typer(task_app, name="task")
app.add_typer(token_app, name="token")

_PIPE_WIDTH = 160
_DETAIL_TYPES = error_details_pb2.DESCRIPTOR.pool

console = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)
errors = Console(stderr=True)

DataDir = Annotated[Path, typer.Option("--data-dir", envvar="BRANCHLINE_DATA_DIR", help="Data folder.")]
DEFAULT_DATA = Path("data")


def _run(main: Coroutine[Any, Any, int | None]) -> None:
    """Run a command to its end; errors for people go to standard error."""
    try:
        code = uvloop.run(main)
    except (SettingsError, ValueError) as error:
        errors.print(f"[red]{error}[/red]")
        raise typer.Exit(2) from error
    except grpc.aio.AioRpcError as error:
        errors.print(f"[red]{error.code().name}[/red] {error.details()}")
        status = rpc_status.from_call(error)  # pyright: ignore[reportArgumentType]
        for detail in status.details if status else ():
            errors.print(f"[dim]{MessageToJson(detail, indent=None, descriptor_pool=_DETAIL_TYPES)}[/dim]")
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    raise typer.Exit(code or 0)


async def _as_client(data_dir: Path, job: Callable[[Client, str], Awaitable[int | None]]) -> int | None:
    """Run a job with a client and the caller's first organization."""
    address = os.environ.get("BRANCHLINE_ADDRESS", "127.0.0.1:7700")
    token = os.environ.get("BRANCHLINE_TOKEN") or read_token(data_dir)
    if not token:
        raise SettingsError("set BRANCHLINE_TOKEN, or name the data folder of a running `branchline up`")
    async with Client(address, token) as client:
        me = await client.users.WhoAmI(users_pb2.WhoAmIRequest())
        organization_id = me.memberships[0].organization_id if me.memberships else ""
        return await job(client, organization_id)


@app.command()
def up(
    data_dir: DataDir = DEFAULT_DATA,
    agent: Annotated[str, typer.Option(help="Agent of tasks that name none.")] = "mock",
) -> None:
    """Run all services in this process on loopback, until Ctrl-C."""
    _run(_server().up(console, data_dir, agent))


@app.command()
def serve(
    service: Annotated[str, typer.Argument(help="The service's name, such as task or gateway.")],
    data_dir: DataDir = DEFAULT_DATA,
) -> None:
    """Run one service in this process, until it is told to stop."""
    _run(_server().serve(data_dir, service))


@app.command()
def bootstrap(
    data_dir: DataDir = DEFAULT_DATA,
    agent: Annotated[str, typer.Option(help="Agent of tasks that name none.")] = "claude",
) -> None:
    """Create the first user, organization and token of services that run apart."""
    _run(_server().bootstrap(console, data_dir, agent))


@app.command()
def demo(
    source: Annotated[Path, typer.Option(help="Git repository that the agent works on.")] = Path(),
    data_dir: Annotated[Path | None, typer.Option(help="Data folder; a temporary one when not given.")] = None,
) -> None:
    """Start everything, let an agent change a file, commit and push, and show it live."""
    _run(_server().demo(console, source.absolute(), data_dir))


def _server() -> ModuleType:
    """Load the services only for the commands that run them: the others start at once."""
    return importlib.import_module("cli.server")


@repo_app.command("add")
def repo_add(url: str, data_dir: DataDir = DEFAULT_DATA) -> None:
    """Add a repository by git URL."""

    async def job(client: Client, organization_id: str) -> None:
        request = repositories_pb2.AddRepositoryRequest(
            request_id=uuid.uuid4().hex, organization_id=organization_id, remote_url=url
        )
        answer = await client.repositories.AddRepository(request)
        console.print(f"{answer.repository.full_name} added as [bold]{answer.repository.id}[/bold]")

    _run(_as_client(data_dir, job))


@repo_app.command("list")
def repo_list(data_dir: DataDir = DEFAULT_DATA) -> None:
    """List the repositories."""

    async def job(client: Client, organization_id: str) -> None:
        request = repositories_pb2.ListRepositoriesRequest(organization_id=organization_id, page_size=1000)
        answer = await client.repositories.ListRepositories(request)
        console.print(views.repository_table(answer.repositories))

    _run(_as_client(data_dir, job))


@task_app.command("create")
def task_create(
    repository_id: str,
    text: Annotated[str, typer.Argument(help='What is to be done; "-" reads standard input.')],
    branch: str = "",
    title: str = "",
    agent: str = "",
    model: str = "",
    watch: Annotated[bool, typer.Option(help="Watch it until its agent is done.")] = False,
    data_dir: DataDir = DEFAULT_DATA,
) -> None:
    """Create a task."""

    async def job(client: Client, _organization_id: str) -> None:
        request = tasks_pb2.CreateTaskRequest(
            request_id=uuid.uuid4().hex,
            repository_id=repository_id,
            text=sys.stdin.read() if text == "-" else text,
            branch=branch,
            title=title,
            agent=agent,
            model=model,
        )
        answer = await client.tasks.CreateTask(request)
        console.print(f"[bold]{answer.task.id}[/bold] on {answer.task.branch}: {answer.task.title}")
        if watch:
            await views.follow_task(console, client, answer.task.id, until_idle=True)

    _run(_as_client(data_dir, job))


@task_app.command("list")
def task_list(
    query: str = "",
    watch: Annotated[bool, typer.Option(help="Keep the list up to date until Ctrl-C.")] = False,
    data_dir: DataDir = DEFAULT_DATA,
) -> None:
    """List the tasks."""

    async def job(client: Client, organization_id: str) -> None:
        if watch:
            await views.follow_sidebar(console, client, organization_id)
            return
        request = tasks_pb2.ListTasksRequest(organization_id=organization_id, query=query, page_size=1000)
        answer = await client.tasks.ListTasks(request)
        console.print(views.task_table(answer.tasks))

    _run(_as_client(data_dir, job))


@task_app.command("show")
def task_show(task_id: str, data_dir: DataDir = DEFAULT_DATA) -> None:
    """Show a task, its sessions, and the end of its transcript."""

    async def job(client: Client, _organization_id: str) -> None:
        answer = await client.tasks.GetTask(tasks_pb2.GetTaskRequest(task_id=task_id))
        console.print(views.task_details(answer))
        for session in answer.sessions:
            request = sessions_pb2.ListTranscriptRequest(task_id=task_id, session_id=session.id, page_size=1000)
            transcript = await client.sessions.ListTranscript(request)
            for entry in transcript.entries:
                views.print_entry(console, entry)

    _run(_as_client(data_dir, job))


@task_app.command("watch")
def task_watch(task_id: str, data_dir: DataDir = DEFAULT_DATA) -> None:
    """Watch a task and its transcripts until Ctrl-C."""

    async def job(client: Client, _organization_id: str) -> None:
        await views.follow_task(console, client, task_id, until_idle=False)

    _run(_as_client(data_dir, job))


@task_app.command("send")
def task_send(
    task_id: str,
    text: str,
    session: Annotated[str, typer.Option(help="Session id; the first session when not given.")] = "",
    queue: Annotated[bool, typer.Option(help="Wait in line if the agent works.")] = False,
    data_dir: DataDir = DEFAULT_DATA,
) -> None:
    """Send a message to a task's agent."""

    async def job(client: Client, _organization_id: str) -> None:
        session_id = session
        if not session_id:
            answer = await client.tasks.GetTask(tasks_pb2.GetTaskRequest(task_id=task_id))
            session_id = answer.sessions[0].id
        request = sessions_pb2.SendMessageRequest(
            request_id=uuid.uuid4().hex, task_id=task_id, session_id=session_id, text=text, queue=queue
        )
        sent = await client.sessions.SendMessage(request)
        console.print(f"sent as entry {sent.entry.position}" + (", queued" if sent.entry.state else ""))

    _run(_as_client(data_dir, job))


def _task_command(name: str, verb: str, call: Callable[[Client, str], Awaitable[Any]]) -> None:
    def command(task_id: str, data_dir: DataDir = DEFAULT_DATA) -> None:
        async def job(client: Client, _organization_id: str) -> None:
            await call(client, task_id)
            console.print(f"{task_id} {verb}")

        _run(_as_client(data_dir, job))

    command.__doc__ = f"{name.title()} a task."
    task_app.command(name)(command)


def _request_id() -> str:
    return uuid.uuid4().hex


_task_command(
    "retry",
    "is provisioned again",
    lambda client, task_id: client.tasks.RetryTask(
        tasks_pb2.RetryTaskRequest(request_id=_request_id(), task_id=task_id)
    ),
)
_task_command(
    "archive",
    "is being archived",
    lambda client, task_id: client.tasks.ArchiveTask(
        tasks_pb2.ArchiveTaskRequest(request_id=_request_id(), task_id=task_id)
    ),
)
_task_command(
    "kill",
    "is being killed",
    lambda client, task_id: client.tasks.KillTask(tasks_pb2.KillTaskRequest(request_id=_request_id(), task_id=task_id)),
)


@app.command()
def history(
    task: Annotated[str, typer.Option(help="Only this task.")] = "",
    json: Annotated[bool, typer.Option(help="All events as JSON lines, oldest first.")] = False,
    data_dir: DataDir = DEFAULT_DATA,
) -> None:
    """Show what happened."""

    async def job(client: Client, organization_id: str) -> None:
        request = history_pb2.ListHistoryRequest(
            organization_id=organization_id, task_id=task, oldest_first=json, page_size=1000 if json else 50
        )
        while True:
            answer = await client.history.ListHistory(request)
            for event in answer.events if json else reversed(answer.events):
                if json:
                    sys.stdout.write(MessageToJson(event, indent=None) + "\n")
                else:
                    views.print_event(console, event)
            request.page_token = answer.next_page_token
            if not json or not request.page_token:
                return

    _run(_as_client(data_dir, job))


@token_app.command("create")
def token_create(
    name: str,
    read_only: Annotated[bool, typer.Option(help="A token that only reads and watches.")] = False,
    data_dir: DataDir = DEFAULT_DATA,
) -> None:
    """Create an API token; it is shown this once."""
    limit = ROLE_VIEWER if read_only else ROLE_UNSPECIFIED

    async def job(client: Client, _organization_id: str) -> None:
        answer = await client.users.CreateApiToken(users_pb2.CreateApiTokenRequest(name=name, role_limit=limit))
        console.print(f"{answer.api_token.id}: [bold]{answer.secret}[/bold]")

    _run(_as_client(data_dir, job))


@token_app.command("list")
def token_list(data_dir: DataDir = DEFAULT_DATA) -> None:
    """List your API tokens."""

    async def job(client: Client, _organization_id: str) -> None:
        answer = await client.users.ListApiTokens(users_pb2.ListApiTokensRequest())
        for token in answer.api_tokens:
            console.print(f"{token.id}  {token.name}")

    _run(_as_client(data_dir, job))


@token_app.command("revoke")
def token_revoke(token_id: str, data_dir: DataDir = DEFAULT_DATA) -> None:
    """End an API token."""

    async def job(client: Client, _organization_id: str) -> None:
        await client.users.RevokeApiToken(users_pb2.RevokeApiTokenRequest(token_id=token_id))
        console.print(f"{token_id} revoked")

    _run(_as_client(data_dir, job))


if __name__ == "__main__":
    with contextlib.suppress(asyncio.CancelledError):
        app()
