"""The index of tasks: who holds which branch, and the workbench of each task as its owner pushed it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from branchline.v1.common_pb2 import ENTITY_KIND_PROCESS, ENTITY_KIND_SESSION, ENTITY_KIND_TASK
from branchline.v1.processes_pb2 import Process
from branchline.v1.sandboxes_pb2 import Sandbox
from branchline.v1.sessions_pb2 import QueuedMessage, Session
from branchline.v1.tasks_pb2 import Task
from branchline.v1.transcripts_pb2 import InputRequest, TranscriptEntry
from sqlalchemy import Integer, String, Table, bindparam, select, tuple_, update

from services.repository.tables import (
    INPUT_REQUESTS,
    PROCESSES,
    QUEUED,
    SANDBOXES,
    SESSIONS,
    TASKS,
    TRANSCRIPT,
    process_index,
    queued_message_index,
    repositories,
    sandbox_index,
    session_index,
    task_details,
    task_index,
    transcript_entries,
)
from services.runtime.database import Reader, Statement, Tx, insert, is_in
from services.runtime.errors import NotFound
from services.runtime.principal import Principal
from services.runtime.spine.index import Entry, Index, IndexTable
from services.runtime.spine.ingest import Pushed
from services.runtime.spine.pages import Page, page_of
from services.runtime.spine.resources import Held
from services.runtime.states import HOLDS_BRANCH

BURIED_AT_ONCE = 500
Part = Session | Sandbox | QueuedMessage | InputRequest | Process | TranscriptEntry
PARTS = (Session, Sandbox, QueuedMessage, InputRequest, Process, TranscriptEntry)
"""What a task is made of, beside itself."""

_KINDS = {
    Session: SESSIONS.kind,
    Sandbox: SANDBOXES.kind,
    QueuedMessage: QUEUED.kind,
    InputRequest: INPUT_REQUESTS.kind,
    Process: PROCESSES.kind,
    TranscriptEntry: TRANSCRIPT.kind,
}

_tasks = Held(task_details, Task, ENTITY_KIND_TASK)
_BURIED = Statement(select(task_details.c.id).where(is_in(task_details.c.id, "ids"), task_details.c.deleted.is_(True)))
_processes = Held(process_index, Process, ENTITY_KIND_PROCESS)
_SESSION_THERE = Statement(
    select(session_index.c.id).where(
        session_index.c.scope == bindparam("of"),
        session_index.c.id == bindparam("session"),
        session_index.c.deleted.is_(False),
    )
)


def _transcript(*, newest_first: bool) -> Statement:
    c = transcript_entries.c
    behind = c.position < bindparam("after") if newest_first else c.position > bindparam("after")
    return Statement(
        select(c.position, c.payload)
        .where(c.session_id == bindparam("of"), behind, c.deleted.is_(False))
        .order_by(c.position.desc() if newest_first else c.position)
        .limit(bindparam("most"))
    )


TRANSCRIPT_ORDERS = {"position": _transcript(newest_first=False), "position desc": _transcript(newest_first=True)}
"""Orders of a transcript, by what `order_by` calls them."""


def _listed(table: Table, *, newest_first: bool = False) -> Statement:
    """Return the statement for a page of a task's parts, by id: as they were made."""
    c = table.c
    behind = c.id < bindparam("after") if newest_first else c.id > bindparam("after")
    return Statement(
        select(c.id, c.payload)
        .where(c.scope == bindparam("of"), behind, c.deleted.is_(False))
        .order_by(c.id.desc() if newest_first else c.id)
        .limit(bindparam("most"))
    )


_SESSIONS = _listed(session_index)
_SANDBOXES = _listed(sandbox_index)
_PROCESSES = _listed(process_index, newest_first=True)
_QUEUED = Statement(
    select(queued_message_index.c.place, queued_message_index.c.id, queued_message_index.c.payload)
    .where(
        queued_message_index.c.scope == bindparam("of"),
        queued_message_index.c.deleted.is_(False),
        tuple_(queued_message_index.c.place, queued_message_index.c.id)
        > tuple_(bindparam("place", type_=Integer), bindparam("after", type_=String)),
    )
    .order_by(queued_message_index.c.place, queued_message_index.c.id)
    .limit(bindparam("most"))
)
LAST = "\U0010ffff"
"""Comes behind every id."""

_PLACES = Statement(
    select(task_index, repositories.c.activity_time)
    .outerjoin(repositories, repositories.c.id == task_index.c.repository_id)
    .where(is_in(task_index.c.task_id, "ids"))
)
_HOLDERS = Statement(
    select(task_index.c.repository_id, task_index.c.branch, task_index.c.task_id).where(
        is_in(task_index.c.repository_id, "repositories"),
        is_in(task_index.c.branch, "branches"),
        task_index.c.live.is_(True),
    )
)
_ADD_PLACE = Statement(insert(task_index))
_MOVE_PLACE = Statement(
    update(task_index)
    .where(task_index.c.task_id == bindparam("of"))
    .values(branch=bindparam("to"), live=bindparam("holds"))
)
_LEAVE = Statement(update(task_index).where(is_in(task_index.c.task_id, "ids")).values(live=False, gone=True))


def _parts_of(spec: IndexTable) -> Statement:
    c = spec.table.c
    where = (is_in(c.scope, "ids"), c.deleted.is_(False))
    return Statement(select(c.scope, c.id, c.revision, c.payload).where(*where).limit(bindparam("most")))


_PARTS: tuple[tuple[IndexTable, type[Part], Statement], ...] = (
    (SESSIONS, Session, _parts_of(SESSIONS)),
    (SANDBOXES, Sandbox, _parts_of(SANDBOXES)),
    (QUEUED, QueuedMessage, _parts_of(QUEUED)),
    (INPUT_REQUESTS, InputRequest, _parts_of(INPUT_REQUESTS)),
    (PROCESSES, Process, _parts_of(PROCESSES)),
    (TRANSCRIPT, TranscriptEntry, _parts_of(TRANSCRIPT)),
)


class Place(NamedTuple):
    """What the index knows of a task's branch."""

    repository_id: str
    branch: str
    live: bool
    gone: bool
    active_time: float
    """When it was noted last that something happened in the repository."""


class Indexed(NamedTuple):
    """What of a batch was newer than what was held."""

    changed: list[Task]
    gone: list[Task]
    """Tasks that are deleted."""

    asked: list[tuple[InputRequest, bool]]
    """Input requests, and whether they are deleted."""


@dataclass(frozen=True, slots=True)
class Conflict:
    """A task moved to a branch that another live task holds; the index leaves it where it was."""

    task: Task
    kept: str
    holder_task_id: str


@dataclass(frozen=True, slots=True)
class Workbench:
    """The index of tasks."""

    index: Index

    def task(self, tx: Reader, task_id: str, principal: Principal) -> Task:
        """Return a task; raise NotFound if it is not the caller's to see."""
        task = _tasks.get(tx, task_id)
        if not principal.sees(task.organization_id):
            raise NotFound(ENTITY_KIND_TASK, task_id)
        return task

    def sessions(self, tx: Reader, task_id: str, after: str, most: int) -> Page[Session]:
        """Return a page of a task's sessions, oldest first."""
        rows = tx.each(_SESSIONS, {"of": task_id, "after": after, "most": most + 1})
        return page_of(Session, rows, ["id"], most)

    def sandboxes(self, tx: Reader, task_id: str, after: str, most: int) -> Page[Sandbox]:
        """Return a page of a task's sandboxes, oldest first."""
        rows = tx.each(_SANDBOXES, {"of": task_id, "after": after, "most": most + 1})
        return page_of(Sandbox, rows, ["id"], most)

    def processes(self, tx: Reader, task_id: str, before: str, most: int) -> Page[Process]:
        """Return a page of a task's processes, newest first."""
        rows = tx.each(_PROCESSES, {"of": task_id, "after": before or LAST, "most": most + 1})
        return page_of(Process, rows, ["id"], most)

    def process(self, tx: Reader, task_id: str, process_id: str) -> Process:
        """Return a process of a task; raise NotFound."""
        process = _processes.get(tx, process_id)
        if process.task_id != task_id:
            raise NotFound(ENTITY_KIND_PROCESS, process_id)
        return process

    def queued_messages(self, tx: Reader, task_id: str, after: tuple[int, str], most: int) -> Page[QueuedMessage]:
        """Return a page of the messages of a task that wait, in the order in which they will be sent."""
        rows = tx.each(_QUEUED, {"of": task_id, "place": after[0], "after": after[1], "most": most + 1})
        return page_of(QueuedMessage, rows, ["place", "id"], most)

    def transcript(
        self, tx: Reader, task_id: str, session_id: str, order: Statement, after_position: int, most: int
    ) -> Page[TranscriptEntry]:
        """Return a page of a transcript, in one of `TRANSCRIPT_ORDERS`; raise NotFound."""
        if tx.value(_SESSION_THERE, {"of": task_id, "session": session_id}) is None:
            raise NotFound(ENTITY_KIND_SESSION, session_id)
        rows = tx.each(order, {"of": session_id, "after": after_position, "most": most + 1})
        return page_of(TranscriptEntry, rows, ["position"], most)

    def places(self, tx: Reader, task_ids: Iterable[str]) -> dict[str, Place]:
        """Return what the index knows of tasks, by their ids."""
        rows = tx.rows(_PLACES, {"ids": sorted(set(task_ids))})
        return {
            row.task_id: Place(row.repository_id, row.branch, row.live, row.gone, active_time=row.activity_time or 0.0)
            for row in rows
        }

    def buried(self, tx: Reader, task_ids: Sequence[str]) -> set[str]:
        """Return those of the tasks that were here and are gone."""
        return {row.id for row in tx.rows(_BURIED, {"ids": task_ids})} if task_ids else set()

    def add(self, tx: Tx, task: Task, session: Session) -> None:
        """Index a new task with its first session. Its branch must be free."""
        place = {"task_id": task.id, "repository_id": task.repository_id, "branch": task.branch}
        tx.change(_ADD_PLACE, {**place, "live": True, "gone": False, "told_time": 0.0})
        self.index.put(tx, _task_entry(task))
        self.index.put(tx, Entry(SESSIONS.kind, task.id, session.id, session.revision, session, task_id=task.id))

    def put(self, tx: Tx, tasks: Sequence[Pushed[Task]], parts: Sequence[Pushed[Part]]) -> Indexed:
        """Index states of tasks and of their parts; return what was newer than what was held.

        A task that its owner calls gone is, whatever else the owner remembers of it: what is held is buried.
        """
        lost = {one.id: one.revision for one in tasks if one.deleted}
        gone = _tasks.find_many(tx, list(lost)) if lost else []
        for task in gone:
            task.revision = max(task.revision + 1, lost[task.id])
        entries = [_task_entry(one.state, payload=one.payload) for one in tasks if one.id not in lost]
        entries += [_task_entry(task, deleted=True) for task in gone]
        entries += [_part_entry(one) for one in parts if one.state.task_id not in lost]
        fresh = [(one.state, one.deleted) for one in self.index.put_many(tx, entries)]
        newer = [(state, deleted) for state, deleted in fresh if isinstance(state, Task)]
        return Indexed(
            changed=[task for task, deleted in newer if not deleted],
            gone=[task for task, deleted in newer if deleted],
            asked=[(state, deleted) for state, deleted in fresh if isinstance(state, InputRequest)],
        )

    def follow(self, tx: Tx, tasks: Sequence[Task], places: Mapping[str, Place]) -> list[Conflict]:
        """Have the index of branches follow new states of tasks.

        A task that gave its branch up never gets it back. A branch belongs to the task that held it first: one that
        moves to a branch of another is left where it was, and is a conflict.
        """
        moving = [task for task in tasks if stays(task, places[task.id]) and task.branch != places[task.id].branch]
        holders = self._holders(tx, moving, places)
        conflicts: list[Conflict] = []
        rows: list[dict[str, Any]] = []
        for task in sorted(tasks, key=lambda task: stays(task, places[task.id])):  # who leaves makes room first
            place, branch = places[task.id], task.branch
            live = stays(task, place)
            holder = holders.get((place.repository_id, branch), task.id)
            if live and holder != task.id:
                conflicts.append(Conflict(task, place.branch, holder))
                branch = place.branch
            elif place.live and (not live or branch != place.branch):
                holders.pop((place.repository_id, place.branch), None)
                if live:
                    holders[place.repository_id, branch] = task.id
            if (branch, live) != (place.branch, place.live):
                rows.append({"of": task.id, "to": branch, "holds": live})
        tx.change_many(_MOVE_PLACE, rows)
        return conflicts

    def _holders(self, tx: Reader, moving: Sequence[Task], places: Mapping[str, Place]) -> dict[tuple[str, str], str]:
        if not moving:
            return {}
        wanted = {
            "repositories": sorted({places[task.id].repository_id for task in moving}),
            "branches": sorted({task.branch for task in moving}),
        }
        return {(row.repository_id, row.branch): row.task_id for row in tx.rows(_HOLDERS, wanted)}

    def leave(self, tx: Tx, tasks: Sequence[Task]) -> None:
        """Note that tasks are gone: their branches are free, their details wait to be buried."""
        if tasks:
            tx.change(_LEAVE, {"ids": [task.id for task in tasks]})

    def bury(self, tx: Tx, task_ids: Sequence[str]) -> int:
        """Make tombstones of the parts of tasks, at most so many at a time; return how many were made."""
        made = 0
        for spec, resource, statement in _PARTS:
            rows: list[Any] = tx.rows(statement, {"ids": task_ids, "most": BURIED_AT_ONCE})
            held = [(row, resource.FromString(row.payload)) for row in rows]
            entries = [
                Entry(spec.kind, row.scope, row.id, row.revision + 1, part, "", row.scope, True, _columns(part))
                for row, part in held
            ]
            made += len(self.index.put_many(tx, entries))
        return made


def _task_entry(task: Task, *, deleted: bool = False, payload: bytes = b"") -> Entry:
    columns = {"repository_id": task.repository_id, "organization_id": task.organization_id}
    return Entry(TASKS.kind, task.id, task.id, task.revision, task, "", task.id, deleted, columns, payload)


def _part_entry(one: Pushed[Part]) -> Entry:
    part = one.state
    return Entry(
        _KINDS[type(part)],
        part.task_id,
        one.id,
        one.revision,
        part,
        task_id=part.task_id,
        deleted=one.deleted,
        columns=_columns(part),
        payload=one.payload,
    )


def _columns(part: Part) -> Mapping[str, Any]:
    if isinstance(part, TranscriptEntry):
        return {"session_id": part.session_id, "position": part.position}
    return {"place": part.place} if isinstance(part, QueuedMessage) else {}


def stays(task: Task, place: Place) -> bool:
    """Say whether a task that holds its branch goes on holding one."""
    return place.live and task.state in HOLDS_BRANCH
