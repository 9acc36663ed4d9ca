"""What is left of a deleted task: nothing, and nothing of another is touched."""

from branchline.v1.agents_pb2 import Agent
from branchline.v1.common_pb2 import Prompt
from branchline.v1.sandboxes_pb2 import SANDBOX_STATE_DESTROYED, SANDBOX_STATE_RUNNING, Sandbox
from branchline.v1.transcripts_pb2 import TranscriptEntry
from branchline_internal.sandbox.v1.sandbox_pb2 import StartTurnRequest
from sqlalchemy import select

from services.runtime.database import Database, Reader, Statement, Tx
from services.sandbox import retention
from services.sandbox.offers import Offer
from services.sandbox.records import Place
from services.sandbox.reports import Reports
from services.sandbox.sessions import SessionStore
from services.sandbox.store import SandboxStore
from services.sandbox.tables import agent_reports, agent_sessions, drafts, input_requests, offers, prompts, sandboxes
from services.sandbox.transcript import Draft
from tests.unit.sandbox.test_sessions import asked, progress

_ALL = [
    Statement(select(table))
    for table in (sandboxes, agent_sessions, prompts, drafts, input_requests, offers, agent_reports)
]


def counts(tx: Reader) -> list[int]:
    return [len(tx.rows(statement)) for statement in _ALL]


def work(tx: Tx, sandboxes: SandboxStore, sessions: SessionStore, reports: Reports, name: str) -> None:
    """Make a task whose agent works, with an open entry and an open question."""
    state = SANDBOX_STATE_RUNNING
    sandboxes.add(tx, Sandbox(id=f"sbx_{name}", task_id=f"task_{name}", provider="local", state=state), "org_1", "")
    record = sessions.begin(tx, Place(f"ses_{name}", f"sbx_{name}", f"task_{name}", "org_1", "mock"))
    sessions.agent_opened(tx, record, "acp", "1/1/1.0", Offer(Agent(id="mock")))
    reports.learn(tx, f"sbx_{name}", f"task_{name}", [Agent(id="mock")])
    request = StartTurnRequest(session_id=f"ses_{name}", turn=1, prompt=Prompt(text="go"))
    sessions.start_turn(tx, request, 10.0)
    record = sessions.get(tx, f"ses_{name}")
    entry = TranscriptEntry(id=f"ent_{name}", session_id=record.session_id, revision=1)
    question = asked(f"inp_{name}", record.session_id)
    sessions.progress(tx, record, progress(drafts=[Draft(entry, 1)], asked=[question]))


async def test_a_deleted_task_leaves_no_row(
    database: Database, sandboxes: SandboxStore, sessions: SessionStore, reports: Reports
) -> None:
    for name in ("1", "2"):
        await database.write(work, sandboxes, sessions, reports, name)
    assert await database.read(counts) == [2] * len(_ALL)
    assert await database.read(retention.left, "task_1") == ["sbx_1"]
    await database.write(sandboxes.move, "sbx_1", SANDBOX_STATE_DESTROYED)
    assert await database.read(retention.left, "task_1") == []

    for _ in range(2):
        await database.write(retention.forget, "task_1")

    assert await database.read(counts) == [1] * len(_ALL)
    assert (await database.read(sessions.get, "ses_2")).task_id == "task_2"
