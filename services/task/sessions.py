"""What people do with sessions, each within one transaction."""

import uuid
from dataclasses import dataclass

from branchline.v1 import sessions_pb2
from branchline.v1.sessions_pb2 import Session, TranscriptEntry
from branchline.v1.vocabulary_pb2 import (
    ERROR_REASON_QUOTA_EXCEEDED,
    ERROR_REASON_SESSION_NOT_WORKING,
    ERROR_REASON_SESSION_WORKING,
    EVENT_KIND_MESSAGE_SENT,
    EVENT_KIND_SESSION_CLOSED,
    EVENT_KIND_SESSION_CREATED,
    EVENT_KIND_SESSION_RENAMED,
    EVENT_KIND_SESSION_REOPENED,
    EVENT_KIND_TURN_CANCELLED,
)
from branchline_internal.sandbox.v1.sandbox_pb2 import CancelTurnRequest, CloseSessionRequest

from services.runtime.clock import Clock
from services.runtime.database import Database, Tx
from services.runtime.errors import FailedPrecondition, ResourceExhausted
from services.runtime.principal import current_principal
from services.task.destinations import TO_SANDBOX
from services.task.machine import Machine
from services.task.permissions import Permissions
from services.task.status import SESSION_WORKING
from services.task.store import TaskStore
from services.task.turns import Turns, check_attachments, is_ready, must_wait, not_ready

_SESSION_IDS = uuid.UUID("5b1f3a52-3c39-4e8e-9d0c-5d7f3a1f0a51")
_SESSIONS = 200
"""Most sessions of one task: their summaries travel with it."""

_SUMMARY_CHARACTERS = 120


@dataclass(frozen=True, slots=True)
class Sessions:
    """Commands on the sessions of tasks."""

    database: Database
    clock: Clock
    store: TaskStore
    turns: Turns
    permissions: Permissions
    machine: Machine

    async def open_agent(self, request: sessions_pb2.CreateSessionRequest) -> Session:
        """Start the agent of a new session. Its id follows from the request, so a repeat finds the agent."""
        caller = current_principal()
        task = await self.database.read(self.store.read_for, request.task_id, caller)
        if not is_ready(task):
            raise not_ready(task)
        if len(task.sessions) >= _SESSIONS:
            raise ResourceExhausted(ERROR_REASON_QUOTA_EXCEEDED, f"a task has at most {_SESSIONS} sessions")
        unique = f"{caller.caller}/{request.task_id}/{request.request_id}"
        now = self.clock.timestamp()
        session = Session(
            id=f"ses_{uuid.uuid5(_SESSION_IDS, unique).hex}",
            task_id=request.task_id,
            name=request.name or f"Session {len(task.sessions) + 1}",
            agent=request.agent or task.sessions[0].agent,
            model=request.model,
            status=sessions_pb2.SESSION_STATUS_IDLE,
            status_time=now,
            create_time=now,
        )
        await self.machine.open_session(task.task.active_sandbox_id, session)
        return session

    def create(
        self, tx: Tx, request: sessions_pb2.CreateSessionRequest, session: Session
    ) -> sessions_pb2.CreateSessionResponse:
        """Store a session whose agent was started."""
        with self.store.open_for(tx, request.task_id, current_principal()) as task:
            if not is_ready(task):
                raise not_ready(task)
            task.add_session(session)
            task.tell(EVENT_KIND_SESSION_CREATED, f"{session.name} created with {session.agent}", session.id)
        return sessions_pb2.CreateSessionResponse(session=session, consistency_token=task.token(session))

    def rename(self, tx: Tx, request: sessions_pb2.RenameSessionRequest) -> sessions_pb2.RenameSessionResponse:
        """Rename a session."""
        with self.store.open_for(tx, request.task_id, current_principal()) as task:
            session = task.session(request.session_id)
            words = f"{session.name} renamed to {request.name}"
            session.name = request.name
            task.change_session(session)
            task.tell(EVENT_KIND_SESSION_RENAMED, words, session.id)
        return sessions_pb2.RenameSessionResponse(session=session, consistency_token=task.token(session))

    def close(self, tx: Tx, request: sessions_pb2.CloseSessionRequest) -> sessions_pb2.CloseSessionResponse:
        """Close a session that does not work, drop what waits for it, and have its agent stopped."""
        with self.store.open_for(tx, request.task_id, current_principal()) as task:
            session = task.session(request.session_id)
            if session.status in SESSION_WORKING:
                raise FailedPrecondition(ERROR_REASON_SESSION_WORKING, "the agent works; cancel its turn first")
            if session.status != sessions_pb2.SESSION_STATUS_CLOSED:
                task.stand(session, sessions_pb2.SESSION_STATUS_CLOSED)
                self.turns.drop_queued(tx, task, session.id)
                task.send(TO_SANDBOX, session.id, session.turn, CloseSessionRequest(session_id=session.id))
                task.tell(EVENT_KIND_SESSION_CLOSED, f"{session.name} closed", session.id)
        return sessions_pb2.CloseSessionResponse(session=session, consistency_token=task.token(session))

    def reopen(self, tx: Tx, request: sessions_pb2.ReopenSessionRequest) -> sessions_pb2.ReopenSessionResponse:
        """Open a closed session again; its next message starts the agent."""
        with self.store.open_for(tx, request.task_id, current_principal()) as task:
            session = task.session(request.session_id)
            if session.status == sessions_pb2.SESSION_STATUS_CLOSED:
                task.stand(session, sessions_pb2.SESSION_STATUS_IDLE)
                task.tell(EVENT_KIND_SESSION_REOPENED, f"{session.name} reopened", session.id)
        return sessions_pb2.ReopenSessionResponse(session=session, consistency_token=task.token(session))

    def send(self, tx: Tx, request: sessions_pb2.SendMessageRequest) -> sessions_pb2.SendMessageResponse:
        """Send a message, or queue it."""
        check_attachments(request.attachments)
        caller = current_principal()
        with self.store.open_for(tx, request.task_id, caller) as task:
            session = task.session(request.session_id)
            entry = TranscriptEntry(
                id=self.clock.new_id("ent"),
                session_id=session.id,
                task_id=request.task_id,
                kind=sessions_pb2.TRANSCRIPT_ENTRY_KIND_USER_MESSAGE,
                text=request.text,
                user_id=caller.user_id,
                attachments=request.attachments,
                create_time=self.clock.timestamp(),
            )
            words = request.text.strip().partition("\n")[0][:_SUMMARY_CHARACTERS]
            waits = must_wait(task, session, may_queue=request.queue)
            task.tell(EVENT_KIND_MESSAGE_SENT, words, session.id)
            if waits:
                self.turns.queue(task, entry)
            else:
                self.turns.begin(task, session, entry)
        return sessions_pb2.SendMessageResponse(entry=entry, consistency_token=task.token(entry))

    def cancel(self, tx: Tx, request: sessions_pb2.CancelTurnRequest) -> sessions_pb2.CancelTurnResponse:
        """Have a turn cancelled. It can be asked for again until the turn has ended."""
        with self.store.open_for(tx, request.task_id, current_principal()) as task:
            session = task.session(request.session_id)
            if session.status not in SESSION_WORKING:
                raise FailedPrecondition(ERROR_REASON_SESSION_NOT_WORKING, "the agent does not work")
            wish = CancelTurnRequest(session_id=session.id, turn=session.turn)
            task.send(TO_SANDBOX, session.id, session.turn, wish)
            task.tell(EVENT_KIND_TURN_CANCELLED, f"{session.name}: cancelled", session.id)
        return sessions_pb2.CancelTurnResponse()

    def answer(self, tx: Tx, request: sessions_pb2.AnswerPermissionRequest) -> sessions_pb2.AnswerPermissionResponse:
        """Answer a permission request."""
        caller = current_principal()
        with self.store.open_for(tx, request.task_id, caller) as task:
            session = task.session(request.session_id)
            entry = self.permissions.answer(tx, task, session, request.entry_id, request.option_id, caller.caller)
        return sessions_pb2.AnswerPermissionResponse(entry=entry, consistency_token=task.token(entry))
