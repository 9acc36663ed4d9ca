"""The rules of turn-taking: one session of a task works at a time; messages begin turns or wait for one."""

from collections.abc import Iterable
from dataclasses import dataclass

from branchline.v1 import sessions_pb2, transcripts_pb2
from branchline.v1.common_pb2 import FAILURE_REASON_INTERNAL, Actor, Failure, Prompt
from branchline.v1.errors_pb2 import (
    ERROR_REASON_SESSION_CLOSED,
    ERROR_REASON_SESSION_WORKING,
    ERROR_REASON_TASK_NOT_READY,
)
from branchline.v1.history_pb2 import (
    EVENT_KIND_AGENT_ASKED,
    EVENT_KIND_AGENT_FAILED,
    EVENT_KIND_AGENT_FINISHED,
    EVENT_KIND_TASK_FAILED,
)
from branchline.v1.sessions_pb2 import QueuedMessage, Session, WhenBusy
from branchline.v1.transcripts_pb2 import StopReason, TranscriptEntry
from branchline_internal.sandbox.v1.sandbox_pb2 import AgentSession, CancelTurnRequest, StartTurnRequest

from services.runtime.database import Reader
from services.runtime.errors import FailedPrecondition
from services.runtime.failures import failed
from services.runtime.logging import get_logger
from services.runtime.states import ENDING
from services.task import message_queue
from services.task.destinations import TO_SANDBOX
from services.task.open_task import OpenTask
from services.task.standing import (
    ALIVE,
    FAILED,
    IDLE,
    RUNNING,
    SESSION_UNDER_WAY,
    SESSION_WORKING,
    TURN_FAILED,
    UNBORN,
    WAITING,
    WORKING,
    refused,
)
from services.task.store import TaskStore

log = get_logger(__name__)

_QUEUES = frozenset({sessions_pb2.WHEN_BUSY_QUEUE, sessions_pb2.WHEN_BUSY_INTERRUPT})
_ENDS = frozenset({sessions_pb2.SESSION_STATE_IDLE, sessions_pb2.SESSION_STATE_FAILED})
_FOLLOWED = _ENDS | SESSION_WORKING


@dataclass(frozen=True, slots=True)
class Turns:
    """Begins and ends the turns of sessions."""

    store: TaskStore

    def begin(
        self, task: OpenTask, session: Session, prompt: Prompt, author: Actor, entry_id: str = ""
    ) -> TranscriptEntry:
        """Give the agent a prompt now; return it as the transcript holds it. No session of the task works."""
        now = task.clock.timestamp()
        session.turn += 1
        task.stand(session, sessions_pb2.SESSION_STATE_RUNNING)
        entry = TranscriptEntry(
            id=entry_id or task.clock.new_id("ent"),
            task_id=task.task.id,
            session_id=session.id,
            turn=session.turn,
            actor=author,
            create_time=now,
            end_time=now,
            user_message=prompt,
        )
        task.entry(entry)
        task.move(RUNNING, session_id=session.id)
        request = StartTurnRequest(session_id=session.id, turn=session.turn, prompt=prompt)
        task.send(TO_SANDBOX, session.id, session.turn, request)
        return entry

    def begin_next(self, tx: Reader, tasks: Iterable[OpenTask]) -> None:
        """In tasks that have become free, send the message that is next, if there is one."""
        free = [task for task in tasks if task.standing == IDLE]
        message_queue.load(tx, free)
        for task in free:
            open_to = [one.id for one in task.sessions if one.state != sessions_pb2.SESSION_STATE_CLOSED]
            message = message_queue.take_first(task, open_to)
            if message is not None:
                self._send(task, message)

    def _send(self, task: OpenTask, message: QueuedMessage) -> None:
        self.begin(task, task.session(message.session_id), message.prompt, message.author)

    def cancel(self, task: OpenTask, session: Session) -> None:
        """Have the agent of a session that works asked to stop. It can be asked again until the turn has ended."""
        wish = CancelTurnRequest(session_id=session.id, turn=session.turn)
        task.send(TO_SANDBOX, session.id, session.turn, wish)

    def opened(self, task: OpenTask, session: Session) -> None:
        """Note that the agent of a session has been started."""
        never = not session.turn and session.state == sessions_pb2.SESSION_STATE_FAILED
        if never or session.state == sessions_pb2.SESSION_STATE_PENDING:
            task.stand(session, sessions_pb2.SESSION_STATE_IDLE)

    def not_opened(self, task: OpenTask, session: Session, failure: Failure) -> None:
        """Note that the agent of a session could not be started; the message that came meanwhile fails with it."""
        if session.state in SESSION_WORKING:
            self.fail(task, session, failure)
        elif session.state == sessions_pb2.SESSION_STATE_PENDING:
            task.stand(session, sessions_pb2.SESSION_STATE_FAILED, failure)
            self._tell_failed(task, session, failure)

    def follow(self, task: OpenTask, state: AgentSession) -> bool:
        """Follow what the status sync reports of a session's agent; return whether the task has become free.

        What does not fit the session's turn or state is ignored: a report never fails.
        """
        row = task.rows.get(state.session_id)
        if row is None or state.revision <= row.agent_revision:
            return False
        row.agent_revision, row.touched = state.revision, True
        session, worked = row.session, row.session.state in SESSION_WORKING
        if (
            state.turn != session.turn
            or session.state == sessions_pb2.SESSION_STATE_CLOSED
            or state.state not in (_FOLLOWED if worked else _ENDS)
            or (not session.turn and state.state != sessions_pb2.SESSION_STATE_IDLE)
        ):
            log.info("report of an agent ignored", session=session.id, turn=state.turn, state=state.state)
            return False
        _take_offer(task, session, state)
        free = False
        if worked and task.task.state not in ENDING:
            free = state.state != session.state and self._follow(task, session, state)
        elif not worked and _is_news(session, state):
            failed_now = state.state == sessions_pb2.SESSION_STATE_FAILED
            task.stand(session, state.state, _failure_of(state) if failed_now else None)
        if state.state in _ENDS:
            task.move_head(state.head_commit, session.id)
        return free

    def _follow(self, task: OpenTask, session: Session, state: AgentSession) -> bool:
        if state.state == sessions_pb2.SESSION_STATE_FAILED:
            self.fail(task, session, _failure_of(state))
            return False
        task.stand(session, state.state)
        if state.state == sessions_pb2.SESSION_STATE_WAITING:
            if task.follow(WAITING, session_id=session.id):
                words = f"{session.display_name}: the agent waits for an answer"
                task.tell(EVENT_KIND_AGENT_ASKED, words, session.id, by_agent=True)
            return False
        if state.state == sessions_pb2.SESSION_STATE_RUNNING:
            task.follow(RUNNING, session_id=session.id)
            return False
        free = task.follow(IDLE, session_id=session.id)
        reason = _stop_name(state.stop_reason)
        how = "finished" if reason in ("end_turn", "unspecified") else f"stopped: {reason.replace('_', ' ')}"
        words = f"{session.display_name}: the agent {how}"
        task.tell(EVENT_KIND_AGENT_FINISHED, words, session.id, {"stop_reason": reason}, by_agent=True)
        return free

    def give_up(self, task: OpenTask, session: Session, turn: int, failure: Failure) -> None:
        """End a turn in failure of which it is not known whether the agent works, and have that cancelled."""
        if session.state in SESSION_WORKING and turn == session.turn:
            self.cancel(task, session)
            self.fail(task, session, failure)

    def fail(self, task: OpenTask, session: Session, failure: Failure) -> None:
        """End the turn of a session that works in failure."""
        task.stand(session, sessions_pb2.SESSION_STATE_FAILED, failure)
        task.follow(TURN_FAILED, failure, session.id)
        self._tell_failed(task, session, failure)

    def _tell_failed(self, task: OpenTask, session: Session, failure: Failure) -> None:
        words = f"{session.display_name}: {failure.message}"
        task.tell(EVENT_KIND_AGENT_FAILED, words, session.id, by_agent=True)

    def fail_all(self, task: OpenTask, failure: Failure) -> None:
        """End the task in failure, and every turn and start of an agent: its sandbox failed; it must be made anew."""
        if task.task.state in ENDING or not task.row.provisioned:
            return
        for session in task.sessions:
            if session.state in SESSION_UNDER_WAY:
                task.stand(session, sessions_pb2.SESSION_STATE_FAILED, failure)
        task.row.provisioned, task.row.touched = False, True
        if task.follow(FAILED, failure):
            task.tell(EVENT_KIND_TASK_FAILED, failure.message)


def must_wait(task: OpenTask, session: Session, when_busy: WhenBusy.ValueType) -> bool:
    """Say whether a message must wait; raise FailedPrecondition if it can be neither sent nor queued."""
    check_alive(task)
    if session.state == sessions_pb2.SESSION_STATE_CLOSED:
        raise FailedPrecondition(ERROR_REASON_SESSION_CLOSED, "the session is closed; reopen it first")
    working = task.standing in WORKING
    if is_ready(task) and not working:
        return False
    if when_busy in _QUEUES:
        return True
    if working:
        words = "an agent of this task works; queue the message, interrupt it or wait"
        raise FailedPrecondition(ERROR_REASON_SESSION_WORKING, words, session_id=working_session(task).id)
    raise not_ready(task)


def check_alive(task: OpenTask) -> None:
    """Raise FailedPrecondition if the task has ended, or is being ended."""
    if task.task.state in ENDING:
        raise refused(task.standing, f"the task is {task.standing.name}", *ALIVE)


def working_session(task: OpenTask) -> Session:
    """Return the session that works, of a task in which one does."""
    return next(one for one in task.sessions if one.state in SESSION_WORKING)


def is_ready(task: OpenTask) -> bool:
    """Say whether the task has a sandbox that takes messages."""
    return task.row.provisioned and task.task.state not in ENDING and task.standing not in (FAILED, *UNBORN)


def not_ready(task: OpenTask) -> FailedPrecondition:
    """Return the error for a task that has no sandbox that takes messages."""
    name = task.standing.name
    words = f"the task is {name} and not provisioned; queue the message, or have it provisioned again"
    return FailedPrecondition(ERROR_REASON_TASK_NOT_READY, words, state=name)


def _is_news(session: Session, state: AgentSession) -> bool:
    """Say whether a report changes how a session stands that does not work.

    A turn that failed stays so though its agent is idle by now: it can be retried.
    """
    stays = session.state == sessions_pb2.SESSION_STATE_FAILED and session.turn > 0
    return state.state != session.state and not stays


def _failure_of(state: AgentSession) -> Failure:
    if state.HasField("failure"):
        return state.failure
    return failed(FAILURE_REASON_INTERNAL, "the agent failed and said nothing")


def _take_offer(task: OpenTask, session: Session, state: AgentSession) -> None:
    """Take over what the agent listed, if it listed anything, and else than before."""
    if not state.models and not state.modes:
        return
    if list(state.models) != list(session.models) or list(state.modes) != list(session.modes):
        session.ClearField("models")
        session.ClearField("modes")
        session.models.extend(state.models)
        session.modes.extend(state.modes)
        task.change_session(session)


def _stop_name(reason: StopReason.ValueType) -> str:
    known = StopReason.values()
    name = StopReason.Name(reason if reason in known else transcripts_pb2.STOP_REASON_UNSPECIFIED)
    return name.removeprefix("STOP_REASON_").lower()
