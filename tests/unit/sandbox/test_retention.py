"""What is left of a deleted task: nothing, and nothing of another is touched."""

from branchline.v1.sandboxes_pb2 import SANDBOX_STATUS_DESTROYED, SANDBOX_STATUS_RUNNING, Sandbox
from branchline.v1.sessions_pb2 import TranscriptEntry
from branchline_internal.sandbox.v1.sandbox_pb2 import StartTurnRequest
from sqlalchemy import select

from services.runtime.database import Database, Reader, Statement, Tx
from services.sandbox import retention
from services.sandbox.sessions import Asked, SessionStore
from services.sandbox.store import SandboxStore
from services.sandbox.tables import agent_sessions, drafts, permissions, prompts, sandboxes
from services.sandbox.transcript import Draft
from tests.unit.sandbox.test_sessions import progress

_ALL = [Statement(select(table)) for table in (sandboxes, agent_sessions, prompts, drafts, permissions)]


def counts(tx: Reader) -> list[int]:
    return [len(tx.rows(statement)) for statement in _ALL]


def work(tx: Tx, sandboxes: SandboxStore, sessions: SessionStore, name: str) -> None:
    """Make a task whose agent works, with an open entry and an open question."""
    status = SANDBOX_STATUS_RUNNING
    sandboxes.add(tx, Sandbox(id=f"sbx_{name}", task_id=f"task_{name}", provider="local", status=status), "org_1")
    sessions.begin(tx, f"ses_{name}", f"sbx_{name}", f"task_{name}", "mock", "")
    sessions.start_turn(tx, StartTurnRequest(session_id=f"ses_{name}", turn=1, text="go"), 10.0)
    record = sessions.get(tx, f"ses_{name}")
    entry = TranscriptEntry(id=f"ent_{name}", session_id=record.session_id, streaming=True, revision=1)
    sessions.progress(tx, record, progress(drafts=[Draft(entry, 1)], asked=[Asked(entry.id, "1")]))


async def test_a_deleted_task_leaves_no_row(
    database: Database, sandboxes: SandboxStore, sessions: SessionStore
) -> None:
    for name in ("1", "2"):
        await database.write(work, sandboxes, sessions, name)
    assert await database.read(counts) == [2, 2, 2, 2, 2]
    assert await database.read(retention.left, "task_1") == ["sbx_1"]
    await database.write(sandboxes.move, "sbx_1", SANDBOX_STATUS_DESTROYED)
    assert await database.read(retention.left, "task_1") == []

    for _ in range(2):
        await database.write(retention.forget, "task_1")

    assert await database.read(counts) == [1, 1, 1, 1, 1]
    assert (await database.read(sessions.get, "ses_2")).task_id == "task_2"
