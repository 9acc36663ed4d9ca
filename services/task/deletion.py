"""How the rows of a task go: many small transactions, then the last one, which says that it is gone."""

from dataclasses import dataclass

from branchline_internal.sandbox.v1.sandbox_pb2 import ForgetTaskRequest
from sqlalchemy import bindparam, delete, select

from services.runtime.database import Database, Statement, Tx, is_in
from services.runtime.spine.outbox import Mark
from services.task.destinations import TO_SANDBOX
from services.task.store import TaskStore
from services.task.tables import (
    agent_reports,
    input_requests,
    queued_messages,
    task_sandboxes,
    task_workbench_sessions,
    tasks,
    transcript_entries,
)

_PART = 500

_SESSIONS = select(task_workbench_sessions.c.session_id).where(task_workbench_sessions.c.task_id == bindparam("of"))
_ENTRIES = Statement(select(transcript_entries.c.id).where(transcript_entries.c.session_id.in_(_SESSIONS)).limit(_PART))
_DELETE_ENTRIES = Statement(delete(transcript_entries).where(is_in(transcript_entries.c.id, "ids")))
_DELETE_REST = [
    Statement(delete(table).where(table.c.task_id == bindparam("of")))
    for table in (task_workbench_sessions, task_sandboxes, queued_messages, input_requests, agent_reports)
]
_DELETE_TASK = Statement(delete(tasks).where(tasks.c.id == bindparam("of")))


@dataclass(frozen=True, slots=True)
class Deletion:
    """Removes what is left of a task."""

    store: TaskStore

    async def run(self, database: Database, task_id: str, attempt: int) -> None:
        """Remove a task's rows; it can be repeated."""
        while not await database.write(self.remove_part, task_id, attempt):
            pass

    def remove_part(self, tx: Tx, task_id: str, attempt: int) -> bool:
        """Remove some transcript entries or, when there are none, the rest; return whether nothing is left."""
        with self.store.open_all(tx, [task_id]) as tasks_left:
            task = tasks_left.get(task_id)
            if task is None or task.row.attempt != attempt:
                return True
            ids = [row.id for row in tx.rows(_ENTRIES, {"of": task_id})]
            if ids:
                tx.change(_DELETE_ENTRIES, {"ids": ids})
                return False
            for statement in _DELETE_REST:
                tx.change(statement, {"of": task_id})
            tx.change(_DELETE_TASK, {"of": task_id})
            task.task.revision += 1
        revision, forget = task.task.revision, ForgetTaskRequest(task_id=task_id)
        self.store.outbox.mark(
            tx, [Mark(task_id, revision, task.task, deleted=True), Mark(task_id, revision, forget, TO_SANDBOX)]
        )
        return True
