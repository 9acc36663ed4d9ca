"""`branchline task`."""

import sys
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import typer
from branchline import AsyncClient, pages
from branchline.v1 import sessions_pb2, tasks_pb2
from branchline.v1.common_pb2 import Prompt
from branchline.v1.sessions_pb2 import WHEN_BUSY_QUEUE, WHEN_BUSY_REFUSE, SessionOptions
from branchline.v1.tasks_pb2 import BranchChoice, TaskFilter
from branchline.v1.transcripts_pb2 import InputAnswer

from cli import views
from cli.calls import run_as_client
from cli.terminal import DEFAULT_DATA, DataDir, console

app = typer.Typer(no_args_is_help=True, help="Tasks.")


@app.command()
def create(
    repository_id: str,
    text: Annotated[str, typer.Argument(help='What is to be done; "-" reads standard input.')],
    branch: Annotated[str, typer.Option(help="A new branch; derived when not given.")] = "",
    existing_branch: Annotated[str, typer.Option(help="A branch to go on with.")] = "",
    base: Annotated[str, typer.Option(help="Where a new branch starts; the default branch when not given.")] = "",
    title: str = "",
    agent: str = "",
    model: str = "",
    watch: Annotated[bool, typer.Option(help="Watch it until its agent is done.")] = False,
    data_dir: DataDir = DEFAULT_DATA,
) -> None:
    """Create a task."""
    choice = BranchChoice(base=base)
    if branch:
        choice.new_branch = branch
    elif existing_branch:
        choice.existing_branch = existing_branch

    async def job(client: AsyncClient, _organization_id: str) -> None:
        request = tasks_pb2.CreateTaskRequest(
            repository_id=repository_id,
            prompt=Prompt(text=sys.stdin.read() if text == "-" else text),
            branch=choice,
            title=title,
            session=SessionOptions(agent=agent, model=model),
        )
        task = (await client.tasks.create_task(request)).task
        console.print(f"[bold]{task.id}[/bold] on {task.branch}: {task.title}")
        if watch:
            await views.follow_task(console, client, task.id, until_settled=True)

    run_as_client(data_dir, job)


@app.command("list")
def list_tasks(
    query: str = "",
    watch: Annotated[bool, typer.Option(help="Keep the list up to date until Ctrl-C.")] = False,
    data_dir: DataDir = DEFAULT_DATA,
) -> None:
    """List the tasks."""

    async def job(client: AsyncClient, organization_id: str) -> None:
        if watch:
            await views.follow_sidebar(console, client, organization_id)
            return
        wanted = TaskFilter(query=query)
        request = tasks_pb2.ListTasksRequest(organization_id=organization_id, filter=wanted, page_size=1000)
        found = [task async for task in pages(client.tasks.list_tasks, request, lambda page: page.tasks)]
        console.print(views.task_table(found))

    run_as_client(data_dir, job)


@app.command()
def show(task_id: str, data_dir: DataDir = DEFAULT_DATA) -> None:
    """Show a task, its sessions and their transcripts."""

    async def job(client: AsyncClient, _organization_id: str) -> None:
        task = (await client.tasks.get_task(tasks_pb2.GetTaskRequest(task_id=task_id))).task
        listing = sessions_pb2.ListSessionsRequest(task_id=task_id)
        sessions = [one async for one in pages(client.sessions.list_sessions, listing, lambda page: page.sessions)]
        machines = await client.tasks.list_sandboxes(tasks_pb2.ListSandboxesRequest(task_id=task_id))
        console.print(views.task_details(task, sessions, machines.sandboxes))
        for session in sessions:
            request = sessions_pb2.ListTranscriptEntriesRequest(task_id=task_id, session_id=session.id, page_size=1000)
            async for entry in pages(client.sessions.list_transcript_entries, request, lambda page: page.entries):
                views.print_entry(console, entry)

    run_as_client(data_dir, job)


@app.command()
def watch(task_id: str, data_dir: DataDir = DEFAULT_DATA) -> None:
    """Watch a task and its transcripts until Ctrl-C."""

    async def job(client: AsyncClient, _organization_id: str) -> None:
        await views.follow_task(console, client, task_id, until_settled=False)

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

    async def job(client: AsyncClient, _organization_id: str) -> None:
        request = sessions_pb2.SendMessageRequest(
            task_id=task_id,
            session_id=session or await _first_session(client, task_id),
            prompt=Prompt(text=text),
            when_busy=WHEN_BUSY_QUEUE if queue else WHEN_BUSY_REFUSE,
        )
        sent = await client.sessions.send_message(request)
        waits = sent.HasField("queued_message")
        console.print(f"queued as {sent.queued_message.id}" if waits else f"sent as entry {sent.entry.position}")

    run_as_client(data_dir, job)


@app.command()
def answer(
    task_id: str,
    input_request_id: str,
    option: Annotated[str, typer.Argument(help="Id of the option chosen.")],
    data_dir: DataDir = DEFAULT_DATA,
) -> None:
    """Answer what an agent waits for."""

    async def job(client: AsyncClient, _organization_id: str) -> None:
        request = sessions_pb2.AnswerInputRequestRequest(
            task_id=task_id, input_request_id=input_request_id, answer=InputAnswer(option_id=option)
        )
        await client.sessions.answer_input_request(request)
        console.print(f"{input_request_id} answered")

    run_as_client(data_dir, job)


@app.command()
def cancel(
    task_id: str,
    session: Annotated[str, typer.Option(help="Session id; the first session when not given.")] = "",
    data_dir: DataDir = DEFAULT_DATA,
) -> None:
    """Have an agent stop its turn."""

    async def job(client: AsyncClient, _organization_id: str) -> None:
        session_id = session or await _first_session(client, task_id)
        listing = sessions_pb2.ListSessionsRequest(task_id=task_id)
        found = pages(client.sessions.list_sessions, listing, lambda page: page.sessions)
        turns = {one.id: one.turn async for one in found}
        request = sessions_pb2.CancelTurnRequest(
            task_id=task_id, session_id=session_id, turn=max(1, turns.get(session_id, 1))
        )
        await client.sessions.cancel_turn(request)
        console.print(f"turn {request.turn} of {session_id} is being cancelled")

    run_as_client(data_dir, job)


async def _first_session(client: AsyncClient, task_id: str) -> str:
    task = (await client.tasks.get_task(tasks_pb2.GetTaskRequest(task_id=task_id))).task
    return task.sessions[0].id


def _task_command(name: str, words: str, verb: str, call: Callable[[AsyncClient, str], Awaitable[Any]]) -> None:
    def command(task_id: str, data_dir: DataDir = DEFAULT_DATA) -> None:
        async def job(client: AsyncClient, _organization_id: str) -> None:
            await call(client, task_id)
            console.print(f"{task_id} {verb}")

        run_as_client(data_dir, job)

    command.__doc__ = words
    app.command(name)(command)


_task_command(
    "retry",
    "Provision a task that failed again.",
    "is provisioned again",
    lambda client, task_id: client.tasks.retry_provisioning(tasks_pb2.RetryProvisioningRequest(task_id=task_id)),
)
_task_command(
    "archive",
    "Put a task away: its sandbox is released, its branch stays on the remote.",
    "is being archived",
    lambda client, task_id: client.tasks.archive_task(tasks_pb2.ArchiveTaskRequest(task_id=task_id)),
)
_task_command(
    "kill",
    "End a task, whatever it is doing: its sandbox is destroyed.",
    "is being killed",
    lambda client, task_id: client.tasks.kill_task(tasks_pb2.KillTaskRequest(task_id=task_id)),
)
