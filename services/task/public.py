"""The public commands that task owns, as the gateway forwards them."""

import uuid
from dataclasses import dataclass
from typing import Any

import grpc
from branchline.gateway.v1 import sessions_pb2, sessions_pb2_grpc, tasks_pb2, tasks_pb2_grpc
from branchline.resource.v1 import session_pb2, task_pb2
from branchline.resource.v1.session_pb2 import Session, TranscriptEntry
from branchline.sandbox.v1 import sandbox_pb2
from branchline.task.v1.task_pb2 import StartWorkflow

from services.runtime.database import Transaction
from services.runtime.errors import FailedPrecondition
from services.runtime.principal import current_principal
from services.runtime.service import Chassis
from services.runtime.spine.outbox import Mark
from services.runtime.spine.tokens import consistency_token
from services.task.machine import Machine
from services.task.push import TO_WORKFLOW
from services.task.status import Status, status_name
from services.task.store import TaskRecord, TaskStore
from services.task.turns import Turns
from services.task.workflows import END, PROVISION

Context = grpc.aio.ServicerContext[Any, Any]

_WORKING = (session_pb2.SESSION_STATUS_RUNNING, session_pb2.SESSION_STATUS_WAITING)
_SESSION_IDS = uuid.UUID("5b1f3a52-3c39-4e8e-9d0c-5d7f3a1f0a51")


@dataclass(frozen=True, slots=True)
class PublicTaskServicer(tasks_pb2_grpc.TaskServiceServicer):
    """Retry and the two ends of a task."""

    chassis: Chassis
    store: TaskStore

    async def RetryTask(self, request: tasks_pb2.RetryTaskRequest, context: Context) -> tasks_pb2.RetryTaskResponse:
        """Provision a task in error again, in its sandbox if that lives, else in a new one."""
        async with self.chassis.database.transaction() as tx:
            answer = await self.chassis.requests.recall(tx, request, tasks_pb2.RetryTaskResponse)
            if answer is not None:
                return answer
            record = await self.store.get(tx, request.task_id, current_principal())
            if record.task.status != task_pb2.TASK_STATUS_ERROR:
                words = f"only a task in error can be retried; this one is {status_name(record.task.status)}"
                raise FailedPrecondition("TASK_STATUS", words, status=status_name(record.task.status))
            session = (await self.store.sessions(tx, request.task_id))[0]
            session.agent = request.agent or session.agent
            session.model = request.model or session.model
            record.attempt += 1
            await self.store.change_status(tx, record, task_pb2.TASK_STATUS_PENDING, "retried")
            await self.store.save_session(tx, record, session)
            await self.store.save(tx, record)
            start = StartWorkflow(workflow=PROVISION, task_id=record.task.id, attempt=record.attempt)
            await self.chassis.outbox.mark(tx, [Mark(record.task.id, record.attempt, start, TO_WORKFLOW)])
            answer = tasks_pb2.RetryTaskResponse(task=record.task, consistency_token=_task_token(record))
            await self.chassis.requests.remember(tx, request, answer)
        return answer

    async def ArchiveTask(
        self, request: tasks_pb2.ArchiveTaskRequest, context: Context
    ) -> tasks_pb2.ArchiveTaskResponse:
        """Release the sandbox and put the task away."""
        async with self.chassis.database.transaction() as tx:
            answer = await self.chassis.requests.recall(tx, request, tasks_pb2.ArchiveTaskResponse)
            if answer is not None:
                return answer
            record = await self._end(tx, request.task_id, task_pb2.TASK_STATUS_ARCHIVING)
            answer = tasks_pb2.ArchiveTaskResponse(task=record.task, consistency_token=_task_token(record))
            await self.chassis.requests.remember(tx, request, answer)
        return answer

    async def KillTask(self, request: tasks_pb2.KillTaskRequest, context: Context) -> tasks_pb2.KillTaskResponse:
        """Destroy the sandbox and end the task."""
        async with self.chassis.database.transaction() as tx:
            answer = await self.chassis.requests.recall(tx, request, tasks_pb2.KillTaskResponse)
            if answer is not None:
                return answer
            record = await self._end(tx, request.task_id, task_pb2.TASK_STATUS_KILLING)
            answer = tasks_pb2.KillTaskResponse(task=record.task, consistency_token=_task_token(record))
            await self.chassis.requests.remember(tx, request, answer)
        return answer

    async def _end(self, tx: Transaction, task_id: str, status: Status) -> TaskRecord:
        record = await self.store.get(tx, task_id, current_principal())
        ends = {status, *_ENDS[status]}
        if record.task.status in ends:
            return record
        record.attempt += 1
        await self.store.change_status(tx, record, status)
        await self.store.save(tx, record)
        start = StartWorkflow(workflow=END, task_id=task_id, attempt=record.attempt)
        await self.chassis.outbox.mark(tx, [Mark(task_id, record.attempt, start, TO_WORKFLOW)])
        return record


_ENDS: dict[Status, set[Status]] = {
    task_pb2.TASK_STATUS_ARCHIVING: {task_pb2.TASK_STATUS_ARCHIVED},
    task_pb2.TASK_STATUS_KILLING: {task_pb2.TASK_STATUS_KILLED},
}


@dataclass(frozen=True, slots=True)
class PublicSessionServicer(sessions_pb2_grpc.SessionServiceServicer):
    """Sessions and messages."""

    chassis: Chassis
    store: TaskStore
    turns: Turns
    machine: Machine

    async def CreateSession(
        self, request: sessions_pb2.CreateSessionRequest, context: Context
    ) -> sessions_pb2.CreateSessionResponse:
        """Start the agent, then store the session. The id follows from the request, so a repeat finds the agent."""
        principal = current_principal()
        async with self.chassis.database.transaction() as tx:
            answer = await self.chassis.requests.recall(tx, request, sessions_pb2.CreateSessionResponse)
            if answer is not None:
                return answer
            record = await self.store.get(tx, request.task_id, principal)
            known = await self.store.sessions(tx, request.task_id)
        if not record.provisioned:
            words = f"the task is {status_name(record.task.status)} and not provisioned"
            raise FailedPrecondition("TASK_NOT_READY", words, status=status_name(record.task.status))
        unique = f"{principal.caller}/{request.task_id}/{request.request_id}"
        now = self.chassis.clock.timestamp()
        session = Session(
            id=f"ses_{uuid.uuid5(_SESSION_IDS, unique).hex}",
            task_id=request.task_id,
            name=request.name or f"Session {len(known) + 1}",
            agent=request.agent or known[0].agent,
            model=request.model,
            status=session_pb2.SESSION_STATUS_IDLE,
            status_time=now,
            create_time=now,
        )
        await self.machine.open_session(record.task.active_sandbox_id, session)
        async with self.chassis.database.transaction() as tx:
            answer = await self.chassis.requests.recall(tx, request, sessions_pb2.CreateSessionResponse)
            if answer is not None:
                return answer
            record = await self.store.get(tx, request.task_id, principal)
            await self._save(tx, record, session, "session.created", f"{session.name} created with {session.agent}")
            answer = sessions_pb2.CreateSessionResponse(session=session, consistency_token=_token(record, session))
            await self.chassis.requests.remember(tx, request, answer)
        return answer

    async def RenameSession(
        self, request: sessions_pb2.RenameSessionRequest, context: Context
    ) -> sessions_pb2.RenameSessionResponse:
        """Rename a session."""
        async with self.chassis.database.transaction() as tx:
            answer = await self.chassis.requests.recall(tx, request, sessions_pb2.RenameSessionResponse)
            if answer is not None:
                return answer
            record, session = await self._find(tx, request.task_id, request.session_id)
            words = f"{session.name} renamed to {request.name}"
            session.name = request.name
            await self._save(tx, record, session, "session.renamed", words)
            answer = sessions_pb2.RenameSessionResponse(session=session, consistency_token=_token(record, session))
            await self.chassis.requests.remember(tx, request, answer)
        return answer

    async def CloseSession(
        self, request: sessions_pb2.CloseSessionRequest, context: Context
    ) -> sessions_pb2.CloseSessionResponse:
        """Close a session and stop its agent."""
        async with self.chassis.database.transaction() as tx:
            answer = await self.chassis.requests.recall(tx, request, sessions_pb2.CloseSessionResponse)
            if answer is not None:
                return answer
            record, session = await self._find(tx, request.task_id, request.session_id)
            if session.status in _WORKING:
                raise FailedPrecondition("SESSION_WORKING", "the agent works; cancel its turn first")
            if session.status != session_pb2.SESSION_STATUS_CLOSED:
                self._stand(session, session_pb2.SESSION_STATUS_CLOSED)
                await self._save(tx, record, session, "session.closed", f"{session.name} closed")
            answer = sessions_pb2.CloseSessionResponse(session=session, consistency_token=_token(record, session))
            await self.chassis.requests.remember(tx, request, answer)
        await self.machine.sandbox.CloseSession(sandbox_pb2.CloseSessionRequest(session_id=session.id))
        return answer

    async def ReopenSession(
        self, request: sessions_pb2.ReopenSessionRequest, context: Context
    ) -> sessions_pb2.ReopenSessionResponse:
        """Open a closed session again."""
        async with self.chassis.database.transaction() as tx:
            answer = await self.chassis.requests.recall(tx, request, sessions_pb2.ReopenSessionResponse)
            if answer is not None:
                return answer
            record, session = await self._find(tx, request.task_id, request.session_id)
            if session.status == session_pb2.SESSION_STATUS_CLOSED:
                self._stand(session, session_pb2.SESSION_STATUS_IDLE)
                await self._save(tx, record, session, "session.reopened", f"{session.name} reopened")
            answer = sessions_pb2.ReopenSessionResponse(session=session, consistency_token=_token(record, session))
            await self.chassis.requests.remember(tx, request, answer)
        return answer

    async def SendMessage(
        self, request: sessions_pb2.SendMessageRequest, context: Context
    ) -> sessions_pb2.SendMessageResponse:
        """Send a message, or queue it."""
        principal = current_principal()
        async with self.chassis.database.transaction() as tx:
            answer = await self.chassis.requests.recall(tx, request, sessions_pb2.SendMessageResponse)
            if answer is not None:
                return answer
            record, session = await self._find(tx, request.task_id, request.session_id)
            must_wait = self.turns.refuse(record, session, may_queue=request.queue)
            entry = TranscriptEntry(
                id=self.chassis.clock.new_id("ent"),
                session_id=session.id,
                task_id=request.task_id,
                kind=session_pb2.TRANSCRIPT_ENTRY_KIND_USER_MESSAGE,
                text=request.text,
                user_id=principal.user_id,
                attachments=request.attachments,
                create_time=self.chassis.clock.timestamp(),
            )
            words = request.text.strip().partition("\n")[0][:120]
            await self.store.record_event(tx, record.task, "message.sent", words, session.id)
            if must_wait:
                await self.turns.queue(tx, entry)
            else:
                await self.turns.send(tx, record, session, entry)
            token = consistency_token([*_points(record, session), ("transcript_entry", entry.id, entry.revision)])
            answer = sessions_pb2.SendMessageResponse(entry=entry, consistency_token=token)
            await self.chassis.requests.remember(tx, request, answer)
        return answer

    async def CancelTurn(
        self, request: sessions_pb2.CancelTurnRequest, context: Context
    ) -> sessions_pb2.CancelTurnResponse:
        """Ask the agent to stop."""
        async with self.chassis.database.transaction() as tx:
            answer = await self.chassis.requests.recall(tx, request, sessions_pb2.CancelTurnResponse)
            if answer is not None:
                return answer
            record, session = await self._find(tx, request.task_id, request.session_id)
            if session.status not in _WORKING:
                raise FailedPrecondition("SESSION_NOT_WORKING", "the agent does not work")
        await self.machine.sandbox.CancelTurn(sandbox_pb2.CancelTurnRequest(session_id=session.id))
        async with self.chassis.database.transaction() as tx:
            await self.store.record_event(tx, record.task, "turn.cancelled", f"{session.name}: cancelled", session.id)
            answer = sessions_pb2.CancelTurnResponse()
            await self.chassis.requests.remember(tx, request, answer)
        return answer

    async def AnswerPermission(
        self, request: sessions_pb2.AnswerPermissionRequest, context: Context
    ) -> sessions_pb2.AnswerPermissionResponse:
        """Pass an answer to the agent; the first one wins."""
        async with self.chassis.database.transaction() as tx:
            answer = await self.chassis.requests.recall(tx, request, sessions_pb2.AnswerPermissionResponse)
            if answer is not None:
                return answer
            record, session = await self._find(tx, request.task_id, request.session_id)
            entry = await self.store.entry(tx, session.id, request.entry_id)
        await self.machine.sandbox.AnswerPermission(
            sandbox_pb2.AnswerPermissionRequest(
                session_id=session.id, entry_id=request.entry_id, option_id=request.option_id
            )
        )
        entry.state = f"answered: {request.option_id}"
        entry.user_id = current_principal().user_id
        entry.streaming = False
        async with self.chassis.database.transaction() as tx:
            words = f"{entry.text}: {request.option_id}"
            await self.store.record_event(tx, record.task, "permission.answered", words, session.id)
            token = consistency_token([("transcript_entry", entry.id, entry.revision + 1)])
            answer = sessions_pb2.AnswerPermissionResponse(entry=entry, consistency_token=token)
            await self.chassis.requests.remember(tx, request, answer)
        return answer

    async def _find(self, tx: Transaction, task_id: str, session_id: str) -> tuple[TaskRecord, Session]:
        record = await self.store.get(tx, task_id, current_principal())
        return record, await self.store.session(tx, task_id, session_id)

    async def _save(self, tx: Transaction, record: TaskRecord, session: Session, kind: str, summary: str) -> None:
        await self.store.save_session(tx, record, session)
        await self.store.save(tx, record)
        await self.store.record_event(tx, record.task, kind, summary, session.id)

    def _stand(self, session: Session, status: session_pb2.SessionStatus.ValueType) -> None:
        session.status = status
        session.status_reason = ""
        session.status_time.CopyFrom(self.chassis.clock.timestamp())


def _points(record: TaskRecord, session: Session) -> list[tuple[str, str, int]]:
    return [("task", record.task.id, record.task.revision), ("session", session.id, session.revision)]


def _token(record: TaskRecord, session: Session) -> str:
    return consistency_token(_points(record, session))


def _task_token(record: TaskRecord) -> str:
    return consistency_token([("task", record.task.id, record.task.revision)])
