"""What people do with sessions, each within one transaction."""

from collections.abc import Iterable
from dataclasses import dataclass

from branchline.v1 import sessions_pb2
from branchline.v1.common_pb2 import ENTITY_KIND_TRANSCRIPT_ENTRY, BlobReference, Prompt
from branchline.v1.errors_pb2 import (
    ERROR_REASON_QUOTA_EXCEEDED,
    ERROR_REASON_SESSION_CLOSED,
    ERROR_REASON_SESSION_NOT_WORKING,
    ERROR_REASON_SESSION_WORKING,
    ERROR_REASON_STATE_FORBIDS,
)
from branchline.v1.history_pb2 import (
    EVENT_KIND_MESSAGE_SENT,
    EVENT_KIND_SESSION_CLOSED,
    EVENT_KIND_SESSION_CREATED,
    EVENT_KIND_SESSION_REOPENED,
    EVENT_KIND_SESSION_UPDATED,
    EVENT_KIND_TURN_CANCELLED,
)
from branchline.v1.sessions_pb2 import QueuedMessage, Session, SessionState
from branchline_internal.sandbox.v1.sandbox_pb2 import CloseSessionRequest

from services.runtime.actors import current_actor
from services.runtime.agents import check_choice
from services.runtime.clock import Clock
from services.runtime.database import Reader, Tx
from services.runtime.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from services.runtime.principal import current_principal
from services.runtime.prompts import with_blobs
from services.runtime.updates import SESSION_SETTABLE, check_etag, etag_of, update
from services.task import inputs, message_queue
from services.task.destinations import TO_SANDBOX
from services.task.machine import opening
from services.task.open_task import OpenTask
from services.task.standing import SESSION_WORKING, WORKING
from services.task.store import REPORTS, TaskStore
from services.task.turns import Turns, check_alive, is_ready, must_wait, not_ready, working_session

MOST = 64
"""Most sessions of one task: their summaries travel with it."""

_WORDS_CHARACTERS = 120

Blobs = Iterable[BlobReference]
"""What the blobs of a prompt are, as the organization knows them."""


@dataclass(frozen=True, slots=True)
class Sessions:
    """Commands on the sessions of tasks."""

    clock: Clock
    store: TaskStore
    turns: Turns

    def create(self, tx: Tx, request: sessions_pb2.CreateSessionRequest) -> sessions_pb2.CreateSessionResponse:
        """Record a session, and have its agent started."""
        with self.store.open_for(tx, request.task_id, current_principal()) as task:
            check_alive(task)
            if not is_ready(task):
                raise not_ready(task)
            if len(task.sessions) >= MOST:
                sentence = f"a task has at most {MOST} sessions"
                raise ResourceExhausted(ERROR_REASON_QUOTA_EXCEEDED, sentence, limit="sessions")
            session = self._new(task, request)
            self._check_known(tx, task, session)
            task.add_session(session)
            task.send(TO_SANDBOX, session.id, session.turn, opening(task.task.active_sandbox_id, session))
            words = f"{session.display_name} created with {session.agent}"
            task.tell(EVENT_KIND_SESSION_CREATED, words, session.id)
        return sessions_pb2.CreateSessionResponse(session=session, consistency_token=task.token(session))

    def _new(self, task: OpenTask, request: sessions_pb2.CreateSessionRequest) -> Session:
        now = self.clock.timestamp()
        session = Session(
            id=self.clock.new_id("ses"),
            task_id=request.task_id,
            display_name=request.display_name.strip() or f"Session {len(task.sessions) + 1}",
            agent=request.options.agent or task.sessions[0].agent,
            model=request.options.model,
            mode=request.options.mode,
            state=sessions_pb2.SESSION_STATE_PENDING,
            state_time=now,
            create_time=now,
        )
        session.etag = etag_of(session, SESSION_SETTABLE)
        return session

    def _check_known(self, tx: Reader, task: OpenTask, session: Session) -> None:
        """Raise InvalidArgument for an agent, a model or a mode that the sandbox does not know, where it knows some."""
        report = REPORTS.find(tx, task.task.active_sandbox_id)
        check_choice(report.agents if report is not None else (), session, "options.")

    def update(self, tx: Tx, request: sessions_pb2.UpdateSessionRequest) -> sessions_pb2.UpdateSessionResponse:
        """Rename a session."""
        given = request.session
        with self.store.open_for(tx, given.task_id, current_principal()) as task:
            session = task.session(given.id)
            check_etag(session, given)
            name = session.display_name
            if update(session, given, request.update_mask, SESSION_SETTABLE, "session"):
                if not session.display_name.strip():
                    raise InvalidArgument("session.display_name", "must hold more than white space")
                session.etag = etag_of(session, SESSION_SETTABLE)
                task.change_session(session)
                task.tell(EVENT_KIND_SESSION_UPDATED, f"{name} renamed to {session.display_name}", session.id)
        return sessions_pb2.UpdateSessionResponse(session=session, consistency_token=task.token(session))

    def close(self, tx: Tx, request: sessions_pb2.CloseSessionRequest) -> sessions_pb2.CloseSessionResponse:
        """Close a session that does not work, drop what waits for it, and have its agent stopped."""
        with self.store.open_for(tx, request.task_id, current_principal()) as task:
            session = task.session(request.session_id)
            if session.state in SESSION_WORKING:
                words = "the agent works; cancel its turn first"
                raise FailedPrecondition(ERROR_REASON_SESSION_WORKING, words, session_id=session.id)
            if session.state != sessions_pb2.SESSION_STATE_CLOSED:
                task.stand(session, sessions_pb2.SESSION_STATE_CLOSED)
                message_queue.drop(tx, task, session.id)
                task.send(TO_SANDBOX, session.id, session.turn, CloseSessionRequest(session_id=session.id))
                task.tell(EVENT_KIND_SESSION_CLOSED, f"{session.display_name} closed", session.id)
        return sessions_pb2.CloseSessionResponse(session=session, consistency_token=task.token(session))

    def reopen(self, tx: Tx, request: sessions_pb2.ReopenSessionRequest) -> sessions_pb2.ReopenSessionResponse:
        """Open a closed session again; its next message starts the agent."""
        with self.store.open_for(tx, request.task_id, current_principal()) as task:
            session = task.session(request.session_id)
            if session.state == sessions_pb2.SESSION_STATE_CLOSED:
                task.stand(session, sessions_pb2.SESSION_STATE_IDLE)
                task.tell(EVENT_KIND_SESSION_REOPENED, f"{session.display_name} reopened", session.id)
        return sessions_pb2.ReopenSessionResponse(session=session, consistency_token=task.token(session))

    def send(
        self, tx: Tx, request: sessions_pb2.SendMessageRequest, blobs: Blobs = ()
    ) -> sessions_pb2.SendMessageResponse:
        """Send a message, or let it wait; one that interrupts has the running turn cancelled and is sent next."""
        prompt = with_blobs(request.prompt, blobs)
        with self.store.open_for(tx, request.task_id, current_principal()) as task:
            session = task.session(request.session_id)
            waits = must_wait(task, session, request.when_busy)
            task.tell(EVENT_KIND_MESSAGE_SENT, _first_words(prompt.text), session.id)
            if waits:
                interrupts = request.when_busy == sessions_pb2.WHEN_BUSY_INTERRUPT
                said = self._queue(tx, task, session, prompt, interrupts=interrupts)
                if interrupts and task.standing in WORKING:
                    self._cancel(task, working_session(task))
            else:
                said = self.turns.begin(task, session, prompt, current_actor())
        token = task.token(said)
        if isinstance(said, QueuedMessage):
            return sessions_pb2.SendMessageResponse(queued_message=said, consistency_token=token)
        return sessions_pb2.SendMessageResponse(entry=said, consistency_token=token)

    def _queue(self, tx: Tx, task: OpenTask, session: Session, prompt: Prompt, *, interrupts: bool) -> QueuedMessage:
        message = QueuedMessage(
            id=self.clock.new_id("msg"),
            task_id=task.task.id,
            session_id=session.id,
            prompt=prompt,
            author=current_actor(),
            create_time=self.clock.timestamp(),
            interrupts=interrupts,
        )
        message_queue.add(tx, task, message)
        return message

    def retry(self, tx: Tx, request: sessions_pb2.RetryTurnRequest) -> sessions_pb2.RetryTurnResponse:
        """Give the agent the prompt of its last turn again, which failed, as something that the caller says."""
        with self.store.open_for(tx, request.task_id, current_principal()) as task:
            session = task.session(request.session_id)
            check_alive(task)
            _check_failed(session, request.turn)
            must_wait(task, session, sessions_pb2.WHEN_BUSY_REFUSE)
            prompt = self.store.prompt(tx, session.id, session.turn)
            if prompt is None:
                raise NotFound(ENTITY_KIND_TRANSCRIPT_ENTRY, f"{session.id}/{session.turn}")
            task.tell(EVENT_KIND_MESSAGE_SENT, _first_words(prompt.text), session.id)
            entry = self.turns.begin(task, session, prompt, current_actor())
        return sessions_pb2.RetryTurnResponse(session=session, consistency_token=task.token(session, entry))

    def cancel(self, tx: Tx, request: sessions_pb2.CancelTurnRequest) -> sessions_pb2.CancelTurnResponse:
        """Have a turn cancelled. It can be asked for again until the turn has ended."""
        with self.store.open_for(tx, request.task_id, current_principal()) as task:
            session = task.session(request.session_id)
            if session.state not in SESSION_WORKING or session.turn != request.turn:
                words = f"the agent does not work on turn {request.turn}"
                raise FailedPrecondition(ERROR_REASON_SESSION_NOT_WORKING, words, turn=str(session.turn))
            self._cancel(task, session)
        return sessions_pb2.CancelTurnResponse(session=session, consistency_token=task.token(session))

    def _cancel(self, task: OpenTask, session: Session) -> None:
        self.turns.cancel(task, session)
        row = task.rows[session.id]
        if row.cancelled_turn == session.turn:
            return
        row.cancelled_turn, row.touched = session.turn, True
        task.tell(EVENT_KIND_TURN_CANCELLED, f"{session.display_name}: cancelled", session.id)

    def change_queued(
        self, tx: Tx, request: sessions_pb2.UpdateQueuedMessageRequest, blobs: Blobs = ()
    ) -> sessions_pb2.UpdateQueuedMessageResponse:
        """Change what a message that waits says, or where it stands."""
        given = request.queued_message
        with self.store.open_for(tx, given.task_id, current_principal()) as task:
            message = message_queue.change(tx, task, given, request.update_mask, blobs)
        token = task.token(message)
        return sessions_pb2.UpdateQueuedMessageResponse(queued_message=message, consistency_token=token)

    def delete_queued(
        self, tx: Tx, request: sessions_pb2.DeleteQueuedMessageRequest
    ) -> sessions_pb2.DeleteQueuedMessageResponse:
        """Take back a message that waits."""
        with self.store.open_for(tx, request.task_id, current_principal()) as task:
            message = message_queue.withdraw(tx, task, request.queued_message_id)
        return sessions_pb2.DeleteQueuedMessageResponse(consistency_token=task.token(message))

    def answer(
        self, tx: Tx, request: sessions_pb2.AnswerInputRequestRequest
    ) -> sessions_pb2.AnswerInputRequestResponse:
        """Answer what an agent waits for."""
        with self.store.open_for(tx, request.task_id, current_principal()) as task:
            answered = inputs.answer(tx, task, request.input_request_id, request.answer)
        token = task.token(answered)
        return sessions_pb2.AnswerInputRequestResponse(input_request=answered, consistency_token=token)


def _check_failed(session: Session, turn: int) -> None:
    """Raise FailedPrecondition unless the turn is the session's last and failed."""
    if session.state == sessions_pb2.SESSION_STATE_CLOSED:
        raise FailedPrecondition(ERROR_REASON_SESSION_CLOSED, "the session is closed; reopen it first")
    if session.state != sessions_pb2.SESSION_STATE_FAILED or session.turn != turn:
        state = SessionState.Name(session.state).removeprefix("SESSION_STATE_").lower()
        words = f"turn {turn} is not one that failed last; the session is {state}, at turn {session.turn}"
        raise FailedPrecondition(ERROR_REASON_STATE_FORBIDS, words, state=state, allowed_states="failed")


def _first_words(text: str) -> str:
    return text.strip().partition("\n")[0][:_WORDS_CHARACTERS]
