"""The main job, start to end: an agent changes a file of a real repository, commits and pushes, watched live."""

import asyncio
import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from branchline.client import Client
from branchline.v1 import repositories_pb2, sessions_pb2, tasks_pb2, watches_pb2
from branchline.v1.history_pb2 import HistoryEvent
from branchline.v1.tasks_pb2 import TASK_STATUS_ERROR, TASK_STATUS_IDLE, Task, TaskSummary
from branchline.v1.vocabulary_pb2 import (
    ENTITY_KIND_TASK,
    ENTITY_KIND_TRANSCRIPT_ENTRY,
    EVENT_KIND_BRANCH_MOVED,
)
from rich.console import Console
from rich.rule import Rule

from cli import views
from cli.installation import local_installation, scripted_agents
from cli.isolation import bubblewrap_fault
from cli.settings import Addresses, load_settings
from cli.up import bootstrap, everything
from services.runtime.logging import configure_logging

_TIMEOUT_SECONDS = 180
_MESSAGE = """think The demo wants a file, a check, a commit and a push.
write DEMO.md: Written by an agent, watched live.
run cat DEMO.md && git status --short
commit Add a note from the demo
push
say The note is on the remote."""


async def run(console: Console, source: Path, data_dir: Path | None, isolation: str | None) -> int:
    """Run the demo; return 0 only if the sidebar and the remote agree."""
    configure_logging(level=os.environ.get("BRANCHLINE_LOG_LEVEL", "error"))
    if isolation is None:
        isolation = "auto" if await bubblewrap_fault() is None else "none"
        if isolation == "none":
            console.print(
                "[yellow]bubblewrap does not work here: the scripted agent runs with --isolation none[/yellow]"
            )
    folder = data_dir or Path(tempfile.mkdtemp(prefix="branchline-demo-"))
    try:
        async with asyncio.timeout(_TIMEOUT_SECONDS):
            return await _run(console, source, folder.absolute(), isolation)
    finally:
        if data_dir is None:
            shutil.rmtree(folder, ignore_errors=True)


async def _run(console: Console, source: Path, folder: Path, isolation: str) -> int:
    remote = folder / "remotes" / f"{source.name}.git"
    if not remote.exists():
        await _git("clone", "--quiet", "--bare", str(source), str(remote))
    console.print(Rule("start"))
    local = {"agents": scripted_agents(), "writable_paths": [remote.parent], "isolation": isolation, "user_ids": (0, 0)}
    settings = load_settings(
        data_dir=folder,
        sandbox={"local": local, "stop_machines": True},
        addresses=Addresses(gateway="127.0.0.1:0"),
    )
    installation = local_installation(settings)
    async with everything(installation) as services:
        organization_id, token = await bootstrap(installation, "mock")
        address = services["gateway"].address
        console.print(f"gateway at {address}, data in {folder}")
        async with Client(address, token) as client, _history(client, organization_id) as events:
            task = await _work(console, client, organization_id, remote)
            return await _verdict(console, client, organization_id, task, remote, events)


async def _work(console: Console, client: Client, organization_id: str, remote: Path) -> Task:
    added = await client.repositories.AddRepository(
        repositories_pb2.AddRepositoryRequest(
            request_id=uuid.uuid4().hex, organization_id=organization_id, remote_url=f"file://{remote}"
        )
    )
    console.print(f"repository {added.repository.full_name} added as {added.repository.id}")
    created = await client.tasks.CreateTask(
        tasks_pb2.CreateTaskRequest(
            request_id=uuid.uuid4().hex,
            repository_id=added.repository.id,
            text="Leave a note from the demo",
            hold_prompt=True,
        )
    )
    console.print(f"task {created.task.id} created on branch {created.task.branch}")
    console.print(Rule("provisioning, as the gateway's watch shows it"))
    task = await views.follow_task(console, client, created.task.id, until_idle=True)
    if task.status != TASK_STATUS_IDLE:
        return task
    console.print(Rule("the agent works"))
    watching = asyncio.create_task(_until_pushed(console, client, task.id))
    await client.sessions.SendMessage(
        sessions_pb2.SendMessageRequest(
            request_id=uuid.uuid4().hex, task_id=task.id, session_id=task.sessions[0].id, text=_MESSAGE
        )
    )
    return await watching


async def _until_pushed(console: Console, client: Client, task_id: str) -> Task:
    """Follow the task until the agent is done and the commit is in the task's row."""
    printer, shown, worked = views.TranscriptPrinter(console), "", False
    async for frame in client.watch_task(task_id):
        for change in frame.changes:
            if change.kind == ENTITY_KIND_TRANSCRIPT_ENTRY:
                printer.show(views.TranscriptEntry.FromString(change.resource.value))
            if change.kind != ENTITY_KIND_TASK:
                continue
            task = Task.FromString(change.resource.value)
            worked = worked or task.status not in (TASK_STATUS_IDLE, TASK_STATUS_ERROR)
            if views.status_words(task) != shown:
                shown = views.status_words(task)
                console.print(f"[bold]▸[/bold] {shown}")
            if worked and (task.status == TASK_STATUS_ERROR or (task.status == TASK_STATUS_IDLE and task.head_commit)):
                return task
    raise AssertionError("a watch does not end")


@asynccontextmanager
async def _history(client: Client, organization_id: str) -> AsyncGenerator[list[HistoryEvent], None]:
    """Collect the organization's feed, by watch, for the length of the block."""
    events: list[HistoryEvent] = []

    async def collect() -> None:
        async for frame in client.watch_history(organization_id):
            if frame.kind == watches_pb2.WATCH_FRAME_KIND_RESET:
                events.clear()
            events.extend(HistoryEvent.FromString(change.resource.value) for change in frame.changes)

    collecting = asyncio.create_task(collect())
    try:
        yield events
    finally:
        collecting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await collecting


async def _verdict(
    console: Console, client: Client, organization_id: str, task: Task, remote: Path, events: list[HistoryEvent]
) -> int:
    while not any(event.kind == EVENT_KIND_BRANCH_MOVED for event in events) and task.status != TASK_STATUS_ERROR:  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    console.print(Rule("history"))
    for event in sorted(events, key=lambda event: event.sequence):
        views.print_event(console, event)
    console.print(Rule("the sidebar's row, and the remote"))
    listed = await client.tasks.ListTasks(tasks_pb2.ListTasksRequest(organization_id=organization_id))
    console.print(views.task_table(listed.tasks))
    answer = await _git("ls-remote", str(remote), f"refs/heads/{task.branch}")
    console.print(f"git ls-remote: {answer.strip() or 'no such branch'}")
    row = next((row for row in listed.tasks if row.id == task.id), TaskSummary())
    agree = bool(row.head_commit) and answer.split() == [row.head_commit, f"refs/heads/{row.branch}"]
    console.print("[green]they agree[/green]" if agree else "[red]they do not agree[/red]")
    return 0 if agree and row.status == TASK_STATUS_IDLE else 1


async def _git(*arguments: str) -> str:
    process = await asyncio.create_subprocess_exec("git", *arguments, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    if process.returncode:
        raise ValueError(f"git {arguments[0]} failed")
    return output.decode()
