"""What people see in the terminal."""

import asyncio
from collections.abc import Iterable, Mapping

from branchline import AsyncClient, TaskView
from branchline.v1.history_pb2 import EventKind, HistoryEvent
from branchline.v1.repositories_pb2 import Repository
from branchline.v1.sandboxes_pb2 import Sandbox
from branchline.v1.sessions_pb2 import Session, SessionState
from branchline.v1.tasks_pb2 import (
    TASK_ACTIVITY_FAILED,
    TASK_ACTIVITY_IDLE,
    TASK_STATE_ACTIVE,
    TASK_STATE_ARCHIVED,
    TASK_STATE_FAILED,
    TASK_STATE_KILLED,
    ProvisioningStage,
    Task,
    TaskActivity,
    TaskState,
    TaskSummary,
)
from branchline.v1.transcripts_pb2 import (
    InputRequest,
    NoticeKind,
    PlanStepState,
    StopReason,
    ToolCall,
    ToolCallState,
    TranscriptEntry,
)
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

_COLOURS = {"running": "green", "failed": "red", "waiting": "yellow", "idle": "cyan", "provisioning": "blue"}
_MARKS = {
    "user_message": "[bold blue]you[/bold blue]   ",
    "agent_message": "[green]agent[/green] ",
    "reasoning": "[dim]think[/dim] ",
    "tool_call": "[magenta]tool[/magenta]  ",
    "plan": "[cyan]plan[/cyan]  ",
    "input_request_id": "[yellow]asks[/yellow]  ",
    "turn_end": "[dim]end[/dim]   ",
    "notice": "[dim]note[/dim]  ",
}
_STEP_MARKS = {PlanStepState.PLAN_STEP_STATE_COMPLETED: "[x]", PlanStepState.PLAN_STEP_STATE_RUNNING: "[~]"}
_OUTPUT_LINES = 8


def state_name(task: Task | TaskSummary) -> str:
    """Return what a task does, or where it is in its life, in a word such as "running"."""
    if task.state == TASK_STATE_ACTIVE:
        return TaskActivity.Name(task.activity).removeprefix("TASK_ACTIVITY_").lower()
    return TaskState.Name(task.state).removeprefix("TASK_STATE_").lower()


def state_words(task: Task | TaskSummary) -> str:
    """Return a task's state with its stage, in colour."""
    name = state_name(task)
    stage = ProvisioningStage.Name(task.stage).removeprefix("PROVISIONING_STAGE_").lower() if task.stage else ""
    colour = _COLOURS.get(name, "white")
    return f"[{colour}]{name}[/{colour}]" + (f" ({stage})" if stage else "")


def is_settled(task: Task) -> bool:
    """Say whether nothing goes on in a task by itself."""
    ended = task.state in (TASK_STATE_FAILED, TASK_STATE_ARCHIVED, TASK_STATE_KILLED)
    return ended or task.activity in (TASK_ACTIVITY_IDLE, TASK_ACTIVITY_FAILED)


def is_failed(task: Task) -> bool:
    """Say whether a task, or its last turn, failed."""
    return task.state == TASK_STATE_FAILED or task.activity == TASK_ACTIVITY_FAILED


def task_table(tasks: Iterable[TaskSummary]) -> Table:
    """Return the sidebar as a table."""
    table = Table("task", "state", "branch", "commit", "title", box=None)
    for task in tasks:
        table.add_row(task.id, state_words(task), task.branch, task.head_commit[:12], escape(task.title))
    return table


def repository_table(repositories: Iterable[Repository]) -> Table:
    """Return the catalogue as a table."""
    table = Table("repository", "name", "live tasks", "url", box=None)
    for one in repositories:
        table.add_row(one.id, one.display_name, str(one.live_task_count), one.remote_url)
    return table


def task_details(task: Task, sessions: Iterable[Session], sandboxes: Iterable[Sandbox]) -> Table:
    """Return a workbench as a table."""
    table = Table(box=None, show_header=False)
    table.add_row("task", task.id)
    table.add_row("title", escape(task.title))
    table.add_row("branch", task.branch)
    table.add_row("state", state_words(task) + failure_words(task))
    table.add_row("commit", task.head_commit)
    for session in sessions:
        state = SessionState.Name(session.state).removeprefix("SESSION_STATE_").lower()
        table.add_row("session", f"{session.id} {escape(session.display_name)} ({session.agent}): {state}")
    for sandbox in sandboxes:
        table.add_row("sandbox", f"{sandbox.id} {sandbox.provider}, isolation {sandbox.isolation}")
    return table


def failure_words(task: Task) -> str:
    """Return why a task failed, behind a colon; nothing if it did not."""
    if not task.HasField("failure"):
        return ""
    return f": {escape(task.failure.message)}" + (
        f"\n{escape(task.failure.output_tail)}" if task.failure.output_tail else ""
    )


def print_entry(console: Console, entry: TranscriptEntry, asked: Mapping[str, InputRequest] | None = None) -> None:
    """Print a transcript entry that is complete."""
    kind = entry.WhichOneof("content") or ""
    console.print(f"  {_MARKS.get(kind, '')}{_words(entry, kind, asked or {})}")
    if kind == "tool_call":
        for line in _output(entry.tool_call).rstrip().splitlines()[-_OUTPUT_LINES:]:
            console.print(f"        [dim]{escape(line)}[/dim]")


def _words(entry: TranscriptEntry, kind: str, asked: Mapping[str, InputRequest]) -> str:
    if kind == "user_message":
        return escape(entry.user_message.text.rstrip())
    if kind in ("agent_message", "reasoning"):
        return escape(getattr(entry, kind).text.rstrip())
    if kind == "tool_call":
        state = ToolCallState.Name(entry.tool_call.state).removeprefix("TOOL_CALL_STATE_").lower()
        return f"{escape(entry.tool_call.title)} [dim]({state})[/dim]"
    if kind == "plan":
        return escape("\n        ".join(f"{_STEP_MARKS.get(one.state, '[ ]')} {one.text}" for one in entry.plan.steps))
    if kind == "turn_end":
        reason = StopReason.Name(entry.turn_end.reason).removeprefix("STOP_REASON_").lower().replace("_", " ")
        failed = entry.turn_end.HasField("failure")
        return f"[red]{escape(entry.turn_end.failure.message)}[/red]" if failed else f"[dim]{reason}[/dim]"
    if kind == "notice":
        words = NoticeKind.Name(entry.notice.kind).removeprefix("NOTICE_KIND_").lower().replace("_", " ")
        return escape(entry.notice.text or words)
    request = asked.get(entry.input_request_id)
    return escape(_asked_words(request)) if request is not None else entry.input_request_id


def _asked_words(request: InputRequest) -> str:
    if request.HasField("question"):
        return f"{request.question.text} [{request.id}]"
    options = ", ".join(f"{one.id}: {one.display_name}" for one in request.permission.options)
    return f"{request.permission.tool_call.title} [{request.id}] ({options})"


def _output(call: ToolCall) -> str:
    return "\n".join(one.text or one.diff.path or one.uri or one.blob.display_name for one in call.outputs)


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

    def show(self, entry: TranscriptEntry, asked: Mapping[str, InputRequest]) -> None:
        """Take a new state of an entry."""
        kind = entry.WhichOneof("content")
        if kind == "agent_message":
            self._stream(entry)
        elif (entry.HasField("end_time") or kind == "input_request_id") and entry.id not in self._shown:
            self._break()
            self._shown[entry.id] = 1
            print_entry(self._console, entry, asked)

    def _stream(self, entry: TranscriptEntry) -> None:
        shown, text = self._shown.get(entry.id, 0), entry.agent_message.text
        if shown >= len(text):
            return
        if self._open != entry.id:
            self._break()
            self._console.print(f"  {_MARKS['agent_message']}", end="")
            self._open = entry.id
        self._console.print(escape(text[shown:].replace("\n", "\n        ")), end="", highlight=False)
        self._shown[entry.id] = len(text)
        if entry.HasField("end_time"):
            self._break()

    def _break(self) -> None:
        if self._open:
            self._console.print()
            self._open = ""


async def follow(console: Console, view: TaskView) -> None:
    """Print a task's changes of state and its transcripts as its view brings them, for ever."""
    printer, shown = TranscriptPrinter(console), ""
    async for change in view.changes():
        if change.HasField("transcript_entry"):
            printer.show(change.transcript_entry, view.input_requests)
        if change.HasField("task"):
            words = state_words(change.task)
            if words != shown:
                console.print(f"[bold]▸[/bold] {words}{failure_words(change.task)}")
                shown = words


async def follow_task(console: Console, client: AsyncClient, task_id: str, *, until_settled: bool) -> Task:
    """Print what happens in a task; with `until_settled` return it once nothing goes on in it."""
    async with client.watch_task(task_id) as view:
        following = asyncio.create_task(follow(console, view))
        try:
            if not until_settled:
                await following
            await view.wait_for(lambda view: is_settled(view.task))
            await asyncio.sleep(0)  # what came with the last frame is printed
            return view.task
        finally:
            following.cancel()


async def follow_sidebar(console: Console, client: AsyncClient, organization_id: str) -> None:
    """Show the sidebar and keep it up to date."""
    async with client.watch_organization(organization_id) as view:
        with Live(console=console, refresh_per_second=10) as live:
            async for _ in view.changes():
                tasks = sorted(view.tasks.values(), key=lambda task: -task.update_time.ToNanoseconds())
                live.update(task_table(tasks))


def print_welcome(console: Console, addresses: Mapping[str, str], organization_id: str, token: str) -> None:
    """Say where everything is."""
    table = Table(box=None, show_header=False)
    for name, address in addresses.items():
        table.add_row(f"[bold]{name}[/bold]" if name == "gateway" else name, address)
    console.print(table)
    console.print(f"organization  {organization_id}")
    console.print(f"token         {token}", soft_wrap=True)
