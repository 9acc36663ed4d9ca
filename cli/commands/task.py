"""`branchline task`."""

import sys
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import typer
from branchline.client import Client
from branchline.v1 import sessions_pb2, tasks_pb2

from cli import views
from cli.calls import pages, request_id, run_as_client
from cli.terminal import DEFAULT_DATA, DataDir, console

app = typer.Typer(no_args_is_help=True, help="Tasks.")


@app.command()
def create(
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
            request_id=request_id(),
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

    run_as_client(data_dir, job)


@app.command("list")
def list_tasks(
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
        found = [task async for page in pages(client.tasks.ListTasks, request) for task in page.tasks]
        console.print(views.task_table(found))

    run_as_client(data_dir, job)


@app.command()
def show(task_id: str, data_dir: DataDir = DEFAULT_DATA) -> None:
    """Show a task, its sessions and their transcripts."""

    async def job(client: Client, _organization_id: str) -> None:
        answer = await client.tasks.GetTask(tasks_pb2.GetTaskRequest(task_id=task_id))
        console.print(views.task_details(answer))
        for session in answer.sessions:
            request = sessions_pb2.ListTranscriptRequest(task_id=task_id, session_id=session.id, page_size=1000)
            async for page in pages(client.sessions.ListTranscript, request):
                for entry in page.entries:
                    views.print_entry(console, entry)

    run_as_client(data_dir, job)


@app.command()
def watch(task_id: str, data_dir: DataDir = DEFAULT_DATA) -> None:
    """Watch a task and its transcripts until Ctrl-C."""

    async def job(client: Client, _organization_id: str) -> None:
        await views.follow_task(console, client, task_id, until_idle=False)

    run_as_client(data_dir, job)


@app.command()
def send(
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
            request_id=request_id(), task_id=task_id, session_id=session_id, text=text, queue=queue
        )
        sent = await client.sessions.SendMessage(request)
        console.print(f"sent as entry {sent.entry.position}" + (", queued" if sent.entry.state else ""))

    run_as_client(data_dir, job)


def _task_command(name: str, verb: str, call: Callable[[Client, str], Awaitable[Any]]) -> None:
    def command(task_id: str, data_dir: DataDir = DEFAULT_DATA) -> None:
        async def job(client: Client, _organization_id: str) -> None:
            await call(client, task_id)
            console.print(f"{task_id} {verb}")

        run_as_client(data_dir, job)

    command.__doc__ = f"{name.title()} a task."
    app.command(name)(command)


_task_command(
    "retry",
    "is provisioned again",
    lambda client, task_id: client.tasks.RetryTask(
        tasks_pb2.RetryTaskRequest(request_id=request_id(), task_id=task_id)
    ),
)
_task_command(
    "archive",
    "is being archived",
    lambda client, task_id: client.tasks.ArchiveTask(
        tasks_pb2.ArchiveTaskRequest(request_id=request_id(), task_id=task_id)
    ),
)
_task_command(
    "kill",
    "is being killed",
    lambda client, task_id: client.tasks.KillTask(tasks_pb2.KillTaskRequest(request_id=request_id(), task_id=task_id)),
)
