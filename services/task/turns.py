"""The rules of turn-taking: one session of a task works at a time; messages begin turns or wait for one."""

from dataclasses import dataclass

from branchline.resource.v1 import session_pb2, task_pb2
from branchline.resource.v1.session_pb2 import Session, TranscriptEntry
from branchline.sandbox.v1.sandbox_pb2 import AgentSession, StartTurnRequest
from branchline.task.v1.task_pb2 import RefreshHeadCommit

from services.runtime.database import Transaction
from services.runtime.errors import FailedPrecondition
from services.runtime.service import Chassis
from services.runtime.spine.outbox import Mark
from services.task.status import ENDING, WORKING, status_name
from services.task.store import TaskRecord, TaskStore

TO_SANDBOX = "sandbox"
QUEUED = "queued"


@dataclass(frozen=True, slots=True)
class Turns:
    """Begins and ends the turns of sessions."""

    chassis: Chassis
    store: TaskStore

    async def send(self, tx: Transaction, record: TaskRecord, session: Session, entry: TranscriptEntry) -> None:
        """Give the agent a message now. The caller has made sure that no session works."""
        now = self.chassis.clock.timestamp()
        session.turn += 1
        session.status = session_pb2.SESSION_STATUS_RUNNING
        session.status_reason = ""
        session.status_time.CopyFrom(now)
        entry.turn = session.turn
        entry.state = ""
        entry.revision += 1
        await self.store.put_entry(tx, entry)
        await self.store.change_status(tx, record, task_pb2.TASK_STATUS_RUNNING, session_id=session.id)
        await self.store.save_session(tx, record, session)
        await self.store.save(tx, record)
        request = StartTurnRequest(
            session_id=session.id, turn=session.turn, text=entry.text, attachments=entry.attachments
        )
        await self.chassis.outbox.mark(tx, [Mark(session.id, session.turn, request, TO_SANDBOX)])

    async def queue(self, tx: Transaction, entry: TranscriptEntry) -> None:
        """Let a message wait until the agent is free."""
        entry.state = QUEUED
        entry.revision += 1
        await self.store.put_entry(tx, entry, queued=True)

    def refuse(self, record: TaskRecord, session: Session, *, may_queue: bool) -> bool:
        """Say whether a message must wait; raise FailedPrecondition if it can be neither sent nor queued."""
        status = record.task.status
        if status in ENDING:
            raise FailedPrecondition("TASK_STATUS", f"the task is {status_name(status)}", status=status_name(status))
        if session.status == session_pb2.SESSION_STATUS_CLOSED:
            raise FailedPrecondition("SESSION_CLOSED", "the session is closed; reopen it first")
        if record.provisioned and status not in WORKING:
            return False
        if may_queue:
            return True
        if not record.provisioned:
            words = f"the task is {status_name(status)} and not provisioned; queue the message, or retry the task"
            raise FailedPrecondition("TASK_NOT_READY", words, status=status_name(status))
        raise FailedPrecondition("SESSION_WORKING", "an agent of this task works; queue the message or wait")

    async def apply(self, tx: Transaction, record: TaskRecord, session: Session, state: AgentSession) -> None:
        """Follow what the status sync reports of a session's agent."""
        if state.turn < session.turn or session.status == session_pb2.SESSION_STATUS_CLOSED:
            return
        status = state.status
        if status == session.status or (not session.turn and status != session_pb2.SESSION_STATUS_IDLE):
            return
        worked = session.status in (session_pb2.SESSION_STATUS_RUNNING, session_pb2.SESSION_STATUS_WAITING)
        session.status = status
        session.status_reason = state.status_reason
        session.status_time.CopyFrom(self.chassis.clock.timestamp())
        await self.store.save_session(tx, record, session)
        if worked and record.task.status not in ENDING:
            await self._follow(tx, record, session, status)
        await self.store.save(tx, record)
        if worked and status == session_pb2.SESSION_STATUS_IDLE and record.task.status not in ENDING:
            await self.send_next(tx, record)

    async def _follow(
        self,
        tx: Transaction,
        record: TaskRecord,
        session: Session,
        status: session_pb2.SessionStatus.ValueType,
    ) -> None:
        task, name = record.task, session.name
        match status:
            case session_pb2.SESSION_STATUS_WAITING:
                await self.store.change_status(
                    tx, record, task_pb2.TASK_STATUS_WAITING, "the agent asks for permission", session.id
                )
                await self.store.record_event(
                    tx, task, "agent.asked", f"{name}: the agent asks for permission", session.id, by_agent=True
                )
            case session_pb2.SESSION_STATUS_RUNNING:
                await self.store.change_status(tx, record, task_pb2.TASK_STATUS_RUNNING, session_id=session.id)
            case session_pb2.SESSION_STATUS_IDLE:
                await self.store.change_status(tx, record, task_pb2.TASK_STATUS_IDLE, session_id=session.id)
                await self.store.record_event(
                    tx, task, "agent.finished", f"{name}: the agent finished", session.id, by_agent=True
                )
                await self._refresh(tx, task.id)
            case session_pb2.SESSION_STATUS_ERROR:
                reason = session.status_reason
                await self.store.change_status(tx, record, task_pb2.TASK_STATUS_ERROR, reason, session.id)
                await self.store.record_event(tx, task, "agent.failed", f"{name}: {reason}", session.id, by_agent=True)
                await self._refresh(tx, task.id)
            case _:
                pass

    async def _refresh(self, tx: Transaction, task_id: str) -> None:
        await self.chassis.outbox.mark(tx, [Mark(task_id, 1, RefreshHeadCommit(task_id=task_id), TO_SANDBOX)])

    async def send_next(self, tx: Transaction, record: TaskRecord) -> None:
        """Send the message that has waited longest, if there is one."""
        entry = await self.store.next_queued(tx, record.task.id)
        if entry is None:
            return
        session = await self.store.session(tx, record.task.id, entry.session_id)
        await self.send(tx, record, session, entry)
