"""What owners have after whatever befell them, against promises, what indexes hold and what watchers were told."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import pytest
from branchline.v1 import history_pb2, sandboxes_pb2, sessions_pb2, tasks_pb2, transcripts_pb2
from branchline.v1.history_pb2 import EVENT_KIND_AGENT_FAILED, EVENT_KIND_AGENT_FINISHED, HistoryEvent
from branchline.v1.sessions_pb2 import QueuedMessage, Session
from branchline.v1.tasks_pb2 import Task, TaskSummary
from branchline.v1.transcripts_pb2 import InputRequest, TranscriptEntry

from cli.installation import SERVICES
from tests.support.client import Client
from tests.support.databases import look_into
from tests.support.people import Person, Promise, get_task, rests, sessions, transcript
from tests.support.stack import eventually
from tests.support.views import View

SETTLE_SECONDS = 180.0

OWNERS = tuple(name for name in SERVICES if name != "gateway")
WORKING = (sessions_pb2.SESSION_STATE_RUNNING, sessions_pb2.SESSION_STATE_WAITING)
PASSING = (sandboxes_pb2.SANDBOX_STATE_CREATING, sandboxes_pb2.SANDBOX_STATE_DESTROYING)
ACTIVE = tasks_pb2.TASK_STATE_ACTIVE
ENDED = (tasks_pb2.TASK_STATE_ARCHIVED, tasks_pb2.TASK_STATE_KILLED)


class Kept(Protocol):
    """An installation whose databases can be looked into."""

    def database(self, service: str) -> str:
        """Return the URL of a service's database."""
        ...


@dataclass
class Books:
    """The owners' databases, read directly."""

    installation: Kept

    def rows(self, service: str, sql: str) -> list[Any]:
        return look_into(self.installation.database(service), sql)

    def unsettled(self) -> list[str]:
        """Say what has not come to rest."""
        found: list[str] = []
        for name in OWNERS:
            for row in self.rows(name, "SELECT destination, type_url, entity_id, attempts, parked_reason FROM outbox"):
                found.append(f"{name} outbox: {row}")
        tasks = {task.id: task for task in self.tasks()}
        found += [f"task: {task}" for task in tasks.values() if not rests(task)]
        held = {session.id: session for session in self.sessions()}
        for session in held.values():
            if session.state == sessions_pb2.SESSION_STATE_PENDING and tasks[session.task_id].state == ACTIVE:
                found.append(f"session waits for its agent: {session}")
        for message in self.queue():
            idle = tasks[message.task_id].activity == tasks_pb2.TASK_ACTIVITY_IDLE
            if idle and held[message.session_id].state != sessions_pb2.SESSION_STATE_CLOSED:
                found.append(f"message waits for nothing: {message}")
        for request in self.requests():
            if request.state == transcripts_pb2.INPUT_REQUEST_STATE_PENDING:
                found.append(f"nobody waits for an answer: {request}")
        found += [f"counts what is answered: {task}" for task in tasks.values() if task.pending_input_count]
        for row in self.rows("task", "SELECT session_id, working_since FROM task_workbench_sessions"):
            if row[1] is not None:
                found.append(f"session works: {row}")
        for row in self.rows("task", "SELECT id, workflow FROM tasks WHERE workflow <> ''"):
            found.append(f"waits for a workflow: {row}")
        for row in self.rows("sandbox", "SELECT session_id, state, ending, closing FROM agent_sessions"):
            if row[1] in WORKING or row[2] or row[3]:
                found.append(f"agent: {row}")
        for row in self.rows("sandbox", "SELECT id, state FROM sandboxes"):
            if row[1] in PASSING:
                found.append(f"sandbox: {row}")
        return found

    def tasks(self) -> list[Task]:
        return [Task.FromString(_bytes(row[0])) for row in self.rows("task", "SELECT payload FROM tasks")]

    def sessions(self) -> list[Session]:
        rows = self.rows("task", "SELECT payload FROM task_workbench_sessions")
        return [Session.FromString(_bytes(row[0])) for row in rows]

    def queue(self) -> list[QueuedMessage]:
        rows = self.rows("task", "SELECT payload FROM queued_messages ORDER BY task_id, place")
        return [QueuedMessage.FromString(_bytes(row[0])) for row in rows]

    def requests(self) -> list[InputRequest]:
        rows = self.rows("task", "SELECT payload FROM input_requests ORDER BY id")
        return [InputRequest.FromString(_bytes(row[0])) for row in rows]

    def entries(self) -> list[TranscriptEntry]:
        rows = self.rows("task", "SELECT payload FROM transcript_entries ORDER BY session_id, position")
        return [TranscriptEntry.FromString(_bytes(row[0])) for row in rows]

    def events(self) -> list[HistoryEvent]:
        rows = self.rows("history", "SELECT payload FROM events ORDER BY sequence")
        return [HistoryEvent.FromString(_bytes(row[0])) for row in rows]


def _bytes(value: object) -> bytes:
    assert isinstance(value, bytes)
    return value


async def watch_tasks(client: Client, people: list[Person], views: dict[str, View]) -> None:
    while True:
        for task_id in [task_id for person in people for task_id in person.tasks]:
            if task_id not in views:
                selection = tasks_pb2.TranscriptSelection(tail_entries=500)
                views[task_id] = View(task_id, client.watch_task(task_id, transcripts=selection)).open()
        await asyncio.sleep(0.1)


async def settled(books: Books) -> None:
    """Wait until nothing is under way any more."""

    async def look() -> bool:
        return not books.unsettled()

    try:
        await eventually(look, SETTLE_SECONDS)
    except TimeoutError:
        pytest.fail("\n".join(books.unsettled()))


def broken_promises(books: Books, people: list[Person]) -> Iterator[str]:
    """Every message that was taken is there once, and its agent's words in order, none lost or doubled."""
    entries, waiting = books.entries(), {message.id for message in books.queue()}
    for promise in [promise for person in people for promise in person.promises]:
        of_session = [entry for entry in entries if entry.session_id == promise.session_id]
        sent = [entry for entry in of_session if promise.words[0] in entry.user_message.text.split()]
        waits = promise.message_id in waiting
        if promise.message_id.startswith("ent_") and promise.message_id not in {entry.id for entry in sent}:
            yield f"lost: {promise}"
        if not sent and not waits and not promise.droppable:
            yield f"lost while it waited: {promise}"
        if len(sent) + waits > 1:
            yield f"doubled: {promise}"
        for message in sent:
            yield from broken_turn(promise, [entry for entry in of_session if entry.turn == message.turn])


def broken_turn(promise: Promise, said: list[TranscriptEntry]) -> Iterator[str]:
    """The turn of a message has its words; those that nobody disturbed has all of them, unless it failed."""
    text = "".join(entry.agent_message.text for entry in said).split()
    words = [word for word in text if word.startswith("m") and "w" in word]
    if words != promise.words[: len(words)]:
        yield f"words of {promise}: {text}"
    failed = any(entry.turn_end.HasField("failure") for entry in said)
    if promise.undisturbed and not failed and words != promise.words:
        yield f"words lost of {promise}: {text}, {said}"


def wrong_endings(books: Books) -> Iterator[str]:
    """Every turn ended once."""
    ends: dict[str, int] = {}
    for event in books.events():
        if event.kind in (EVENT_KIND_AGENT_FINISHED, EVENT_KIND_AGENT_FAILED):
            ends[event.session_id] = ends.get(event.session_id, 0) + 1
    ended = {task.id for task in books.tasks() if task.state in ENDED}
    for session in books.sessions():
        count = ends.get(session.id, 0)
        if count > session.turn or (count < session.turn and session.task_id not in ended):
            yield f"{session.turn} turns of {session.id} have {count} ends"


def wrong_numbers(books: Books) -> Iterator[str]:
    """Positions and sequences have no gap; nothing of a finished turn streams, and no turn ends twice."""
    by_session: dict[str, list[TranscriptEntry]] = {}
    for entry in books.entries():
        by_session.setdefault(entry.session_id, []).append(entry)
    for session_id, entries in by_session.items():
        if [entry.position for entry in entries] != list(range(1, len(entries) + 1)):
            yield f"positions of {session_id}: {[entry.position for entry in entries]}"
        yield from (f"streams: {entry}" for entry in entries if not entry.HasField("end_time"))
    sequences = [event.sequence for event in books.events()]
    if sequences != list(range(1, len(sequences) + 1)):
        yield f"sequences: {sequences}"


async def disagreements(
    client: Client,
    organization_id: str,
    books: Books,
    views: list[View],
    feeds: list[View],
    task_views: dict[str, View],
) -> list[str]:
    """What watchers hold is what reads answer, and what the owners have."""
    found: list[str] = []
    everything = tasks_pb2.TaskFilter(include_ended=True)
    request = tasks_pb2.ListTasksRequest(organization_id=organization_id, page_size=1000, filter=everything)
    listed = {task.id: task for task in (await client.tasks.ListTasks(request)).tasks}
    owned = {task.id: task for task in books.tasks()}
    if {key: task.revision for key, task in listed.items()} != {key: task.revision for key, task in owned.items()}:
        found.append("the list of tasks is not what their owner has")
    live = {key: task for key, task in listed.items() if task.state not in ENDED}
    for view in views:
        await agree(found, view, lambda view=view: live_tasks(view) == live)
    feed = {event.id: event for event in await events_of(client, organization_id)}
    if feed != {event.id: event for event in books.events()}:
        found.append("the feed is not what history has")
    newest = {event.id for event in sorted(feed.values(), key=lambda event: event.sequence)[-50:]}
    for view in feeds:
        await agree(found, view, lambda view=view: holds_feed(view, feed, newest))
    for task_id, view in task_views.items():
        task, held = await get_task(client, task_id), await sessions(client, task_id)
        entries = [entry for one in held for entry in await transcript(client, task_id, one.id)]
        owner = [entry for entry in books.entries() if entry.task_id == task_id]
        if sorted(entries, key=_id) != sorted(owner, key=_id):
            found.append(f"the transcript of {task_id} is not what its owner has")
        others = {
            "session": held,
            "transcript_entry": entries,
            "queued_message": [one for one in books.queue() if one.task_id == task_id],
            "input_request": [one for one in books.requests() if one.task_id == task_id],
        }
        await agree(found, view, partial(holds_task, view, task, others))
    return found


def _id(entry: TranscriptEntry) -> str:
    return entry.id


async def agree(found: list[str], view: View, agrees: object) -> None:
    """Wait a little for a watcher that is on its way back; note it if it stays wrong."""

    async def look() -> bool:
        assert callable(agrees)
        return bool(agrees())

    try:
        await eventually(look, 15)
    except TimeoutError:
        found.append(f"a watcher of {view.name} holds something else ({view.resets} resets, {len(view.held)} held)")


def live_tasks(view: View) -> dict[str, TaskSummary]:
    return {key: task for key, task in view.of("task").items() if task.state not in ENDED}


def holds_feed(view: View, feed: dict[str, HistoryEvent], newest: set[str]) -> bool:
    held = view.of("history_event")
    return newest <= held.keys() and all(feed.get(key) == event for key, event in held.items())


def holds_task(view: View, task: Task, others: Mapping[str, Sequence[Any]]) -> bool:
    return list(view.of("task").values()) == [task] and all(
        view.of(field) == {one.id: one for one in wanted} for field, wanted in others.items()
    )


async def events_of(client: Client, organization_id: str) -> list[HistoryEvent]:
    events: list[HistoryEvent] = []
    request = history_pb2.ListHistoryEventsRequest(organization_id=organization_id, page_size=1000)
    while True:
        answer = await client.history.ListHistoryEvents(request)
        events += answer.events
        request.page_token = answer.next_page_token
        if not request.page_token:
            return events
