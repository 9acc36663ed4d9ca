"""What people see in the terminal."""

from collections.abc import Iterable, Mapping

from branchline.client import Client
from branchline.v1 import sessions_pb2, watches_pb2
from branchline.v1.history_pb2 import HistoryEvent
from branchline.v1.repositories_pb2 import Repository
from branchline.v1.sessions_pb2 import TranscriptEntry, TranscriptEntryKind
from branchline.v1.tasks_pb2 import GetTaskResponse, ProvisioningStage, Task, TaskStatus, TaskSummary
from branchline.v1.vocabulary_pb2 import ENTITY_KIND_TASK, ENTITY_KIND_TRANSCRIPT_ENTRY, EventKind
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

_COLOURS = {"running": "green", "error": "red", "waiting": "yellow", "idle": "cyan", "provisioning": "blue"}
_MARKS = {
    sessions_pb2.TRANSCRIPT_ENTRY_KIND_USER_MESSAGE: "[bold blue]you[/bold blue]   ",
    sessions_pb2.TRANSCRIPT_ENTRY_KIND_AGENT_MESSAGE: "[green]agent[/green] ",
    sessions_pb2.TRANSCRIPT_ENTRY_KIND_REASONING: "[dim]think[/dim] ",
    sessions_pb2.TRANSCRIPT_ENTRY_KIND_TOOL_CALL: "[magenta]tool[/magenta]  ",
    sessions_pb2.TRANSCRIPT_ENTRY_KIND_PLAN: "[cyan]plan[/cyan]  ",
    sessions_pb2.TRANSCRIPT_ENTRY_KIND_PERMISSION: "[yellow]asks[/yellow]  ",
    sessions_pb2.TRANSCRIPT_ENTRY_KIND_STATUS: "[dim]state[/dim] ",
    sessions_pb2.TRANSCRIPT_ENTRY_KIND_ERROR: "[red]error[/red] ",
}


def status_words(task: Task | TaskSummary) -> str:
    """Return a task's status with its stage, in colour."""
    name = TaskStatus.Name(task.status).removeprefix("TASK_STATUS_").lower()
    stage = ProvisioningStage.Name(task.stage).removeprefix("PROVISIONING_STAGE_").lower() if task.stage else ""
    colour = _COLOURS.get(name, "white")
    return f"[{colour}]{name}[/{colour}]" + (f" ({stage})" if stage else "")


def task_table(tasks: Iterable[TaskSummary]) -> Table:
    """Return the sidebar as a table."""
    table = Table("task", "status", "branch", "commit", "title", box=None)
    for task in tasks:
        table.add_row(task.id, status_words(task), task.branch, task.head_commit[:12], escape(task.title))
    return table


def repository_table(repositories: Iterable[Repository]) -> Table:
    """Return the catalogue as a table."""
    table = Table("repository", "name", "live tasks", "url", box=None)
    for one in repositories:
        table.add_row(one.id, one.full_name, str(one.live_task_count), one.remote_url)
    return table


def task_details(answer: GetTaskResponse) -> Table:
    """Return a workbench as a table."""
    task = answer.task
    table = Table(box=None, show_header=False)
    table.add_row("task", task.id)
    table.add_row("title", escape(task.title))
    table.add_row("branch", task.branch)
    table.add_row("status", status_words(task) + (f": {escape(task.status_reason)}" if task.status_reason else ""))
    table.add_row("commit", task.head_commit)
    for session in answer.sessions:
        status = sessions_pb2.SessionStatus.Name(session.status).removeprefix("SESSION_STATUS_").lower()
        table.add_row("session", f"{session.id} {escape(session.name)} ({session.agent}): {status}")
    for sandbox in answer.sandboxes:
        table.add_row("sandbox", f"{sandbox.id} {sandbox.provider}, isolation {sandbox.isolation}")
    return table


def print_entry(console: Console, entry: TranscriptEntry) -> None:
    """Print a transcript entry that is complete."""
    mark = _MARKS.get(entry.kind, TranscriptEntryKind.Name(entry.kind))
    state = f" [dim]({escape(entry.state)})[/dim]" if entry.state else ""
    console.print(f"  {mark}{escape(entry.text.rstrip())}{state}")
    if entry.output:
        for line in entry.output.rstrip().splitlines()[-8:]:
            console.print(f"        [dim]{escape(line)}[/dim]")


def event_words(event: HistoryEvent) -> str:
    """Return what happened in short words, such as "task created"."""
    return EventKind.Name(event.kind).removeprefix("EVENT_KIND_").replace("_", " ").lower()


def print_event(console: Console, event: HistoryEvent) -> None:
    """Print a line of history."""
    time = event.event_time.ToDatetime().strftime("%H:%M:%S")
    console.print(f"  [dim]{event.sequence:>4} {time}[/dim] {event_words(event):<22} {escape(event.summary)}")


class TranscriptPrinter:
    """Prints transcript entries as they stream: text as it arrives, everything else when it is complete."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: dict[str, int] = {}
        self._open = ""

    def show(self, entry: TranscriptEntry) -> None:
        """Take a new state of an entry."""
        if entry.kind == sessions_pb2.TRANSCRIPT_ENTRY_KIND_AGENT_MESSAGE:
            self._stream(entry)
            return
        asks = entry.kind == sessions_pb2.TRANSCRIPT_ENTRY_KIND_PERMISSION
        if (not entry.streaming or asks) and self._shown.get(entry.id) != entry.revision:
            self._break()
            self._shown[entry.id] = entry.revision
            print_entry(self._console, entry)

    def _stream(self, entry: TranscriptEntry) -> None:
        shown = self._shown.get(entry.id, 0)
        if shown >= len(entry.text):
            return
        if self._open != entry.id:
            self._break()
            self._console.print(f"  {_MARKS[entry.kind]}", end="")
            self._open = entry.id
        self._console.print(escape(entry.text[shown:].replace("\n", "\n        ")), end="", highlight=False)
        self._shown[entry.id] = len(entry.text)
        if not entry.streaming:
            self._break()

    def _break(self) -> None:
        if self._open:
            self._console.print()
            self._open = ""


async def follow_task(console: Console, client: Client, task_id: str, *, until_idle: bool) -> Task:
    """Print a task's status changes and transcript as the gateway's watch brings them."""
    printer = TranscriptPrinter(console)
    task, worked, shown = Task(), False, ""
    async for frame in client.watch_task(task_id):
        for change in frame.changes:
            if change.kind == ENTITY_KIND_TRANSCRIPT_ENTRY:
                printer.show(TranscriptEntry.FromString(change.resource.value))
            if change.kind == ENTITY_KIND_TASK:
                task = Task.FromString(change.resource.value)
                worked = worked or bool(task.active_sandbox_id)
                words = status_words(task)
                if words != shown:
                    reason = f": {escape(task.status_reason)}" if task.status_reason else ""
                    console.print(f"[bold]▸[/bold] {words}{reason}")
                    shown = words
        settled = TaskStatus.Name(task.status).removeprefix("TASK_STATUS_") in ("IDLE", "ERROR", "KILLED", "ARCHIVED")
        if until_idle and settled and frame.kind != watches_pb2.WATCH_FRAME_KIND_SNAPSHOT:
            return task
    return task


async def follow_sidebar(console: Console, client: Client, organization_id: str) -> None:
    """Show the sidebar and keep it up to date."""
    tasks: dict[str, TaskSummary] = {}
    with Live(console=console, refresh_per_second=10) as live:
        async for frame in client.watch_organization(organization_id):
            if frame.kind == watches_pb2.WATCH_FRAME_KIND_RESET:
                tasks.clear()
            for change in frame.changes:
                if change.kind == ENTITY_KIND_TASK and change.deleted:
                    tasks.pop(change.id, None)
                elif change.kind == ENTITY_KIND_TASK:
                    tasks[change.id] = TaskSummary.FromString(change.resource.value)
            live.update(task_table(sorted(tasks.values(), key=lambda task: -task.update_time.ToNanoseconds())))


def print_welcome(console: Console, addresses: Mapping[str, str], organization_id: str, token: str) -> None:
    """Say where everything is."""
    table = Table(box=None, show_header=False)
    for name, address in addresses.items():
        table.add_row(f"[bold]{name}[/bold]" if name == "gateway" else name, address)
    console.print(table)
    console.print(f"organization  {organization_id}")
    console.print(f"token         {token}", soft_wrap=True)
