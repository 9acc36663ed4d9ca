"""What goes when a task is deleted: its sessions and all that belongs to them, and its sandboxes' rows."""

from branchline.v1.sandboxes_pb2 import SANDBOX_STATE_DESTROYED
from sqlalchemy import bindparam, delete, select

from services.runtime.database import Reader, Statement, Tx
from services.sandbox.tables import (
    agent_reports,
    agent_sessions,
    drafts,
    input_requests,
    offers,
    processes,
    prompts,
    sandboxes,
)

_SESSIONS = select(agent_sessions.c.session_id).where(agent_sessions.c.task_id == bindparam("task"))
_OF_SESSIONS = (prompts, drafts, input_requests, offers)
_OF_TASKS = (agent_sessions, agent_reports, processes, sandboxes)
_FORGET = [
    *(Statement(delete(table).where(table.c.session_id.in_(_SESSIONS))) for table in _OF_SESSIONS),
    *(Statement(delete(table).where(table.c.task_id == bindparam("task"))) for table in _OF_TASKS),
]
_LEFT = Statement(
    select(sandboxes.c.id).where(sandboxes.c.task_id == bindparam("task"), sandboxes.c.state != SANDBOX_STATE_DESTROYED)
)


def left(tx: Reader, task_id: str) -> list[str]:
    """Return the sandboxes of a task that are not destroyed."""
    return [row.id for row in tx.rows(_LEFT, {"task": task_id})]


def forget(tx: Tx, task_id: str) -> None:
    """Drop every row of a task, whose sandboxes are destroyed. It can be repeated."""
    for statement in _FORGET:
        tx.change(statement, {"task": task_id})
