"""Queries of the task service. Tasks are opened, changed and closed; see `open_task`."""

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from branchline.v1.common_pb2 import (
    ENTITY_KIND_SANDBOX,
    ENTITY_KIND_TASK,
    ENTITY_KIND_TRANSCRIPT_ENTRY,
    Prompt,
)
from branchline.v1.errors_pb2 import ERROR_REASON_BEING_DELETED
from branchline.v1.repositories_pb2 import Repository
from branchline.v1.roles_pb2 import ROLE_MEMBER
from branchline.v1.sandboxes_pb2 import Sandbox
from branchline.v1.sessions_pb2 import QueuedMessage, Session
from branchline.v1.tasks_pb2 import Task
from branchline.v1.transcripts_pb2 import InputRequest, TranscriptEntry
from branchline_internal.sandbox.v1.sandbox_pb2 import AgentReport
from branchline_internal.task.v1.task_pb2 import CreateTaskRequest
from sqlalchemy import bindparam, literal_column, select, update

from services.runtime.clock import Clock
from services.runtime.database import Reader, Statement, Tx, insert_new, is_in, upsert
from services.runtime.errors import FailedPrecondition, NotFound
from services.runtime.principal import Principal
from services.runtime.spine.outbox import Mark, Outbox
from services.runtime.spine.resources import Resources
from services.task import inputs, message_queue
from services.task.git import choice_of
from services.task.open_task import OpenTask, SessionRow, TaskRow
from services.task.tables import agent_reports, task_sandboxes, task_workbench_sessions, tasks, transcript_entries

DELETE = "delete"
"""The workflow after which nothing is left of a task."""

SWEEP_ROWS = 200

_sessions = task_workbench_sessions
_TASKS = select(tasks).where(is_in(tasks.c.id, "ids")).order_by(tasks.c.id)
_SESSIONS = select(_sessions).where(is_in(_sessions.c.task_id, "ids")).order_by(_sessions.c.session_id)
_READ_TASKS, _OPEN_TASKS = Statement(_TASKS), Statement(_TASKS.with_for_update())
_READ_SESSIONS, _OPEN_SESSIONS = Statement(_SESSIONS), Statement(_SESSIONS.with_for_update())
_CREATE = Statement(insert_new(tasks, ["id"]))
_SAVE = Statement(
    update(tasks)
    .where(tasks.c.id == bindparam("this"))
    .values({name: bindparam(name) for name in ("payload", "attempt", "workflow", "workflow_time")})
    .values({name: bindparam(name) for name in ("branch_choice", "provisioned")})
)
_SAVE_SESSION = Statement(upsert(_sessions, ["session_id"], keep=["task_id"]))
_WAITING_FOR_WORKFLOW = Statement(
    select(tasks.c.id)
    .where(tasks.c.workflow != literal_column("''"), tasks.c.workflow_time < bindparam("before"))
    .order_by(tasks.c.workflow_time)
    .limit(SWEEP_ROWS)
)
_WORKING_SINCE = Statement(
    select(_sessions.c.session_id, _sessions.c.task_id)
    .where(_sessions.c.working_since.is_not(None), _sessions.c.working_since < bindparam("before"))
    .order_by(_sessions.c.working_since)
    .limit(SWEEP_ROWS)
)
_SESSION = Statement(select(_sessions.c.payload).where(_sessions.c.session_id == bindparam("this")))
_TASK_OF_SESSION = Statement(select(_sessions.c.task_id).where(_sessions.c.session_id == bindparam("this")))


ENTRIES = Resources(
    transcript_entries,
    TranscriptEntry,
    ENTITY_KIND_TRANSCRIPT_ENTRY,
    lambda entry: {
        "id": entry.id,
        "session_id": entry.session_id,
        "task_id": entry.task_id,
        "position": entry.position,
        "prompt_turn": entry.turn if entry.HasField("user_message") else None,
    },
)
_PROMPT = Statement(
    select(transcript_entries.c.payload).where(
        transcript_entries.c.session_id == bindparam("session"), transcript_entries.c.prompt_turn == bindparam("turn")
    )
)

SANDBOXES = Resources(
    task_sandboxes, Sandbox, ENTITY_KIND_SANDBOX, lambda sandbox: {"id": sandbox.id, "task_id": sandbox.task_id}
)
SANDBOXES_OF_TASK = SANDBOXES.by("task_id")

REPORTS = Resources(
    agent_reports,
    AgentReport,
    ENTITY_KIND_SANDBOX,
    lambda report: {"sandbox_id": report.sandbox_id, "task_id": report.task_id},
    key=("sandbox_id",),
)
"""The agents that each sandbox knows."""


@dataclass(frozen=True, slots=True)
class TaskStore:
    """Tasks with their sessions."""

    outbox: Outbox
    clock: Clock

    def create(self, tx: Tx, request: CreateTaskRequest, workflow: str) -> bool:
        """Store a task as its coordinator bore it, and start a workflow; return False if it is there."""
        row = TaskRow(
            task=request.task,
            repository=request.repository,
            git_name=request.identity.name,
            git_email=request.identity.email,
            hold_prompt=request.hold_prompt,
            branch_choice=choice_of(request.branch),
            branch_base=request.branch.base,
            provisioned=False,
            attempt=0,
            workflow="",
            workflow_time=0.0,
        )
        kept = {
            "organization_id": request.task.organization_id,
            "repository": request.repository.SerializeToString(),
            "git_name": row.git_name,
            "git_email": row.git_email,
            "hold_prompt": row.hold_prompt,
            "branch_base": row.branch_base,
        }
        if not tx.change(_CREATE, {"id": request.task.id, **kept, **_columns(row)}):
            return False
        task = OpenTask(row, {request.session.id: SessionRow(request.session, touched=True)}, self.clock)
        task.start(workflow)
        self._close(tx, [task])
        return True

    @contextmanager
    def open(self, tx: Tx, task_id: str) -> Generator[OpenTask]:
        """Open a task for the block, and close it after. Raise NotFound."""
        with self.open_all(tx, [task_id]) as opened:
            if task_id not in opened:
                raise NotFound(ENTITY_KIND_TASK, task_id)
            yield opened[task_id]

    @contextmanager
    def open_for(self, tx: Tx, task_id: str, caller: Principal) -> Generator[OpenTask]:
        """Open a task for a command of the caller. Raise NotFound, PermissionDenied or FailedPrecondition."""
        with self.open(tx, task_id) as task:
            check_caller(task, caller)
            yield task

    @contextmanager
    def open_all(self, tx: Tx, task_ids: Iterable[str]) -> Generator[dict[str, OpenTask]]:
        """Open those of the tasks that there are, by their ids, and close them after the block."""
        ids = sorted(set(task_ids))
        opened = self._opened(tx.rows(_OPEN_TASKS, {"ids": ids}), tx.rows(_OPEN_SESSIONS, {"ids": ids}))
        yield opened
        self._close(tx, opened.values())

    def find(self, tx: Reader, task_id: str) -> OpenTask | None:
        """Return a task as it is, to look at only, or None."""
        return self._read(tx, [task_id]).get(task_id)

    def read(self, tx: Reader, task_id: str) -> OpenTask:
        """Return a task as it is, to look at only; raise NotFound."""
        task = self.find(tx, task_id)
        if task is None:
            raise NotFound(ENTITY_KIND_TASK, task_id)
        return task

    def session(self, tx: Reader, session_id: str) -> Session | None:
        """Return a session as it is, or None."""
        payload = tx.value(_SESSION, {"this": session_id})
        return Session.FromString(payload) if payload is not None else None

    def task_of_session(self, tx: Reader, session_id: str) -> str:
        """Return the id of a session's task; empty if there is no such session."""
        return tx.value(_TASK_OF_SESSION, {"this": session_id}) or ""

    def prompt(self, tx: Reader, session_id: str, turn: int) -> Prompt | None:
        """Return what a session's turn was begun with, or None."""
        payload = tx.value(_PROMPT, {"session": session_id, "turn": turn})
        return TranscriptEntry.FromString(payload).user_message if payload is not None else None

    def waiting_for_workflow(self, tx: Reader, before: float) -> list[OpenTask]:
        """Return tasks that have waited for their workflow since before a time, to look at only."""
        ids = [row.id for row in tx.rows(_WAITING_FOR_WORKFLOW, {"before": before})]
        return list(self._read(tx, ids).values())

    def working_since(self, tx: Reader, before: float) -> list[tuple[str, str]]:
        """Return (task id, session id) where an agent has worked since before a time."""
        return [(row.task_id, row.session_id) for row in tx.rows(_WORKING_SINCE, {"before": before})]

    def _read(self, tx: Reader, ids: Sequence[str]) -> dict[str, OpenTask]:
        return self._opened(tx.rows(_READ_TASKS, {"ids": ids}), tx.rows(_READ_SESSIONS, {"ids": ids}))

    def _opened(self, task_rows: Sequence[Any], session_rows: Sequence[Any]) -> dict[str, OpenTask]:
        sessions: dict[str, list[SessionRow]] = {}
        for row in session_rows:
            one = SessionRow(Session.FromString(row.payload), row.agent_revision, row.last_position, row.cancelled_turn)
            sessions.setdefault(row.task_id, []).append(one)
        opened: dict[str, OpenTask] = {}
        for row in task_rows:
            found = sorted(sessions.get(row.id, []), key=lambda one: one.session.create_time.ToNanoseconds())
            opened[row.id] = OpenTask(_task_row(row), {one.session.id: one for one in found}, self.clock)
        return opened

    def _close(self, tx: Tx, opened: Iterable[OpenTask]) -> None:
        opened = list(opened)
        inputs.settle(tx, opened)
        marks: list[Mark] = []
        entries: list[TranscriptEntry] = []
        asked: list[InputRequest] = []
        queued: list[QueuedMessage] = []
        unqueued: list[QueuedMessage] = []
        session_rows: list[dict[str, Any]] = []
        task_rows: list[dict[str, Any]] = []
        for task in opened:
            marks += task.seal()
            entries += task.entries
            queued += task.queued
            unqueued += task.unqueued
            asked += task.inputs.values()
            session_rows += [_session_columns(row) for row in task.rows.values() if row.touched]
            if task.row.touched:
                task_rows.append({"this": task.task.id, **_columns(task.row)})
        ENTRIES.put_many(tx, entries)
        message_queue.write(tx, queued, unqueued)
        inputs.write(tx, asked)
        tx.change_many(_SAVE_SESSION, session_rows)
        tx.change_many(_SAVE, task_rows)
        self.outbox.mark(tx, marks)


def check_caller(task: OpenTask, caller: Principal) -> None:
    """Raise unless the caller may command the task, and it can be commanded."""
    if not caller.sees(task.task.organization_id):
        raise NotFound(ENTITY_KIND_TASK, task.task.id)
    caller.require(ROLE_MEMBER)
    if task.row.workflow == DELETE:
        raise FailedPrecondition(ERROR_REASON_BEING_DELETED, "the task is being deleted")


def _task_row(row: Any) -> TaskRow:
    return TaskRow(
        task=Task.FromString(row.payload),
        repository=Repository.FromString(row.repository),
        git_name=row.git_name,
        git_email=row.git_email,
        hold_prompt=bool(row.hold_prompt),
        branch_choice=row.branch_choice,
        branch_base=row.branch_base,
        provisioned=bool(row.provisioned),
        attempt=row.attempt,
        workflow=row.workflow,
        workflow_time=row.workflow_time,
    )


def _columns(row: TaskRow) -> dict[str, Any]:
    return {
        "payload": row.task.SerializeToString(),
        "branch_choice": row.branch_choice,
        "provisioned": row.provisioned,
        "attempt": row.attempt,
        "workflow": row.workflow,
        "workflow_time": row.workflow_time,
    }


def _session_columns(row: SessionRow) -> dict[str, Any]:
    return {
        "session_id": row.session.id,
        "task_id": row.session.task_id,
        "agent_revision": row.agent_revision,
        "last_position": row.last_position,
        "cancelled_turn": row.cancelled_turn,
        "working_since": row.working_since,
        "payload": row.session.SerializeToString(),
    }
