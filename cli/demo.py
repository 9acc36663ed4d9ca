"""The main job, start to end: an agent changes a file of a real repository, commits and pushes, watched live."""

import asyncio
import os
import shutil
import tempfile
from pathlib import Path

from branchline import AsyncClient, HistoryView
from branchline.v1.common_pb2 import Prompt
from branchline.v1.history_pb2 import EVENT_KIND_BRANCH_MOVED
from branchline.v1.repositories_pb2 import CreateRepositoryRequest
from branchline.v1.sessions_pb2 import SendMessageRequest
from branchline.v1.tasks_pb2 import (
    TASK_ACTIVITY_IDLE,
    TASK_STATE_ACTIVE,
    CreateTaskRequest,
    ListTasksRequest,
    Task,
    TaskSummary,
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
        async with AsyncClient(address, token) as connection:
            client = connection.session()
            task = await _work(console, client, organization_id, remote)
            return await _verdict(console, client, organization_id, task, remote)


async def _work(console: Console, client: AsyncClient, organization_id: str, remote: Path) -> Task:
    repository = (
        await client.repositories.create_repository(
            CreateRepositoryRequest(organization_id=organization_id, remote_url=f"file://{remote}")
        )
    ).repository
    console.print(f"repository {repository.display_name} created as {repository.id}")
    request = CreateTaskRequest(
        repository_id=repository.id, prompt=Prompt(text="Leave a note from the demo"), hold_prompt=True
    )
    created = (await client.tasks.create_task(request)).task
    console.print(f"task {created.id} created on branch {created.branch}")
    console.print(Rule("provisioning, as the gateway's watch shows it"))
    async with client.watch_task(created.id) as view:
        following = asyncio.create_task(views.follow(console, view))
        try:
            await view.wait_for(lambda view: views.is_settled(view.task))
            if view.task.state != TASK_STATE_ACTIVE:
                return view.task
            console.print(Rule("the agent works"))
            message = SendMessageRequest(
                task_id=created.id, session_id=view.task.sessions[0].id, prompt=Prompt(text=_MESSAGE)
            )
            await client.sessions.send_message(message)
            await view.wait_for(lambda view: bool(view.task.head_commit) and views.is_settled(view.task))
            await asyncio.sleep(0.1)  # the last words are printed
            return view.task
        finally:
            following.cancel()


async def _verdict(console: Console, client: AsyncClient, organization_id: str, task: Task, remote: Path) -> int:
    def moved(view: HistoryView) -> bool:
        return any(event.kind == EVENT_KIND_BRANCH_MOVED for event in view.events)

    async with client.watch_history(organization_id) as view:
        await view.wait_for(lambda view: moved(view) or views.is_failed(task))
        console.print(Rule("history"))
        for event in view.events:
            views.print_event(console, event)
    console.print(Rule("the sidebar and the remote"))
    listed = await client.tasks.list_tasks(ListTasksRequest(organization_id=organization_id))
    console.print(views.task_table(listed.tasks))
    answer = await _git("ls-remote", str(remote), f"refs/heads/{task.branch}")
    console.print(f"git ls-remote: {answer.strip() or 'no such branch'}")
    row = next((row for row in listed.tasks if row.id == task.id), TaskSummary())
    agree = bool(row.head_commit) and answer.split() == [row.head_commit, f"refs/heads/{row.branch}"]
    console.print("[green]they agree[/green]" if agree else "[red]they do not agree[/red]")
    return 0 if agree and row.activity == TASK_ACTIVITY_IDLE else 1


async def _git(*arguments: str) -> str:
    process = await asyncio.create_subprocess_exec("git", *arguments, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    if process.returncode:
        raise ValueError(f"git {arguments[0]} failed")
    return output.decode()
