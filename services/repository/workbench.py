"""The index of tasks: who holds which branch, and the workbench of each task as its owner pushed it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from branchline.v1.sandboxes_pb2 import Sandbox
from branchline.v1.sessions_pb2 import Session, TranscriptEntry
from branchline.v1.tasks_pb2 import Task
from branchline.v1.vocabulary_pb2 import ENTITY_KIND_SANDBOX, ENTITY_KIND_SESSION, ENTITY_KIND_TASK
from sqlalchemy import Column, bindparam, select, update

from services.repository.tables import (
    SANDBOXES,
    SESSIONS,
    TASKS,
    TRANSCRIPT,
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
from services.runtime.statuses import HOLDS_BRANCH

BURIED_AT_ONCE = 500
Part = Session | Sandbox | TranscriptEntry
_KINDS = {Session: SESSIONS.kind, Sandbox: SANDBOXES.kind, TranscriptEntry: TRANSCRIPT.kind}

_tasks = Held(task_details, Task, ENTITY_KIND_TASK)
_BURIED = Statement(select(task_details.c.id).where(is_in(task_details.c.id, "ids"), task_details.c.deleted.is_(True)))
_sessions_of = Held(session_index, Session, ENTITY_KIND_SESSION).by("scope")
_sandboxes_of = Held(sandbox_index, Sandbox, ENTITY_KIND_SANDBOX).by("scope")
_SESSION_THERE = Statement(
    select(session_index.c.id).where(
        session_index.c.scope == bindparam("of"),
        session_index.c.id == bindparam("session"),
        session_index.c.deleted.is_(False),
    )
)
_TRANSCRIPT = Statement(
    select(transcript_entries.c.position, transcript_entries.c.payload)
    .where(
        transcript_entries.c.session_id == bindparam("of"),
        transcript_entries.c.position > bindparam("after"),
        transcript_entries.c.deleted.is_(False),
    )
    .order_by(transcript_entries.c.position)
    .limit(bindparam("most"))
)
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


def _parts_of(spec: IndexTable, *columns: Column[Any]) -> Statement:
    c = spec.table.c
    where = (is_in(c.scope, "ids"), c.deleted.is_(False))
    return Statement(select(c.scope, c.id, c.revision, *columns).where(*where).limit(bindparam("most")))


_PARTS = (
    (SESSIONS.kind, _parts_of(SESSIONS), Session()),
    (SANDBOXES.kind, _parts_of(SANDBOXES), Sandbox()),
    (
        TRANSCRIPT.kind,
        _parts_of(TRANSCRIPT, transcript_entries.c.session_id, transcript_entries.c.position),
        TranscriptEntry(),
    ),
)


class Place(NamedTuple):
    """What the index knows of a task's branch."""

    repository_id: str
    branch: str
    live: bool
    gone: bool
    active_time: float
    """When it was noted last that something happened in the repository."""


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

    def sessions(self, tx: Reader, task_id: str) -> list[Session]:
        """Return a task's sessions, oldest first."""
        return _sessions_of(tx, scope=task_id)

    def sandboxes(self, tx: Reader, task_id: str) -> list[Sandbox]:
        """Return a task's sandboxes, oldest first."""
        return _sandboxes_of(tx, scope=task_id)

    def transcript(
        self, tx: Reader, task_id: str, session_id: str, after_position: int, most: int
    ) -> Page[TranscriptEntry]:
        """Return a page of a transcript, oldest first; raise NotFound."""
        if tx.value(_SESSION_THERE, {"of": task_id, "session": session_id}) is None:
            raise NotFound(ENTITY_KIND_SESSION, session_id)
        rows = tx.each(_TRANSCRIPT, {"of": session_id, "after": after_position, "most": most + 1})
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

    def put(
        self, tx: Tx, tasks: Sequence[Pushed[Task]], parts: Sequence[Pushed[Part]]
    ) -> tuple[list[Task], list[Task]]:
        """Index states of tasks and of their parts; return the tasks that are newer than what was held, then the gone.

        A task that its owner calls gone is, whatever else the owner remembers of it: what is held is buried.
        """
        lost = {one.id: one.revision for one in tasks if one.deleted}
        gone = _tasks.find_many(tx, list(lost)) if lost else []
        for task in gone:
            task.revision = max(task.revision + 1, lost[task.id])
            task.ClearField("text")  # a tombstone needs no words
        entries = [_task_entry(one.state, payload=one.payload) for one in tasks if one.id not in lost]
        entries += [_task_entry(task, deleted=True) for task in gone]
        entries += [_part_entry(one) for one in parts if one.state.task_id not in lost]
        fresh = [(one.state, one.deleted) for one in self.index.put_many(tx, entries)]
        newer = [(state, deleted) for state, deleted in fresh if isinstance(state, Task)]
        return [task for task, deleted in newer if not deleted], [task for task, deleted in newer if deleted]

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
        for kind, statement, empty in _PARTS:
            rows: list[Any] = tx.rows(statement, {"ids": task_ids, "most": BURIED_AT_ONCE})
            entries = [
                Entry(
                    kind,
                    row.scope,
                    row.id,
                    row.revision + 1,
                    empty,
                    task_id=row.scope,
                    deleted=True,
                    columns={"session_id": row.session_id, "position": row.position} if kind == TRANSCRIPT.kind else {},
                )
                for row in rows
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
        columns={"session_id": part.session_id, "position": part.position} if isinstance(part, TranscriptEntry) else {},
        payload=one.payload,
    )


def stays(task: Task, place: Place) -> bool:
    """Say whether a task that holds its branch goes on holding one."""
    return place.live and task.status in HOLDS_BRANCH
