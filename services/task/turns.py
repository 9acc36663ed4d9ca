"""The rules of turn-taking: one session of a task works at a time; messages begin turns or wait for one."""

from collections.abc import Iterable
from dataclasses import dataclass

from branchline.v1 import sessions_pb2, tasks_pb2
from branchline.v1.sessions_pb2 import Attachment, Session, TranscriptEntry
from branchline.v1.vocabulary_pb2 import (
    ERROR_REASON_SESSION_CLOSED,
    ERROR_REASON_SESSION_WORKING,
    ERROR_REASON_TASK_NOT_READY,
    EVENT_KIND_AGENT_ASKED,
    EVENT_KIND_AGENT_FAILED,
    EVENT_KIND_AGENT_FINISHED,
    EVENT_KIND_TASK_FAILED,
)
from branchline_internal.sandbox.v1.sandbox_pb2 import AgentSession, CancelTurnRequest, StartTurnRequest

from services.runtime.database import Tx
from services.runtime.errors import FailedPrecondition, InvalidArgument
from services.runtime.logging import get_logger
from services.runtime.statuses import ENDING, WORKING
from services.task.destinations import TO_SANDBOX
from services.task.open_task import OpenTask
from services.task.status import SESSION_WORKING, SessionStanding, refused, status_name
from services.task.store import DROPPED, QUEUED, QUEUED_OF_TASK, TaskStore

log = get_logger(__name__)

ATTACHMENTS_BYTES = 256 * 1024
"""Most that the attachments of one message have in sum."""

_ENDS = frozenset({sessions_pb2.SESSION_STATUS_IDLE, sessions_pb2.SESSION_STATUS_ERROR})
_FOLLOWED = _ENDS | SESSION_WORKING


@dataclass(frozen=True, slots=True)
class Turns:
    """Begins and ends the turns of sessions."""

    store: TaskStore

    def begin(self, task: OpenTask, session: Session, entry: TranscriptEntry) -> None:
        """Give the agent a message now. The task is ready, and no session of it works."""
        session.turn += 1
        task.stand(session, sessions_pb2.SESSION_STATUS_RUNNING)
        entry.turn = session.turn
        entry.state = ""
        task.entry(entry)
        task.move(tasks_pb2.TASK_STATUS_RUNNING, session_id=session.id)
        request = StartTurnRequest(
            session_id=session.id, turn=session.turn, text=entry.text, attachments=entry.attachments
        )
        task.send(TO_SANDBOX, session.id, session.turn, request)

    def queue(self, task: OpenTask, entry: TranscriptEntry) -> None:
        """Let a message wait until the agent is free."""
        entry.state = QUEUED
        task.entry(entry)

    def begin_next(self, tx: Tx, tasks: Iterable[OpenTask]) -> None:
        """In tasks that have become free, send the message that has waited longest, if there is one."""
        free = {task.task.id: task for task in tasks if task.task.status == tasks_pb2.TASK_STATUS_IDLE}
        for entry in self.store.first_queued(tx, free) if free else []:
            task = free[entry.task_id]
            session = task.session(entry.session_id)
            if session.status == sessions_pb2.SESSION_STATUS_CLOSED:
                self.drop_queued(tx, task, session.id)
            else:
                self.begin(task, session, entry)

    def drop_queued(self, tx: Tx, task: OpenTask, session_id: str = "") -> None:
        """Settle messages that wait and will not be sent: those to a session, or all."""
        for entry in QUEUED_OF_TASK(tx, task_id=task.task.id):
            if session_id in ("", entry.session_id):
                entry.state = DROPPED
                task.entry(entry)

    def follow(self, task: OpenTask, state: AgentSession) -> bool:
        """Follow what the status sync reports of a session's agent; return whether the task has become free.

        What does not fit the session's turn or status is ignored: a report never fails.
        """
        row = task.rows.get(state.session_id)
        if row is None or state.revision <= row.agent_revision:
            return False
        row.agent_revision, row.touched = state.revision, True
        session, status = row.session, state.status
        worked = session.status in SESSION_WORKING
        if (
            state.turn != session.turn
            or session.status == sessions_pb2.SESSION_STATUS_CLOSED
            or status not in (_FOLLOWED if worked else _ENDS)
            or (not session.turn and status != sessions_pb2.SESSION_STATUS_IDLE)
        ):
            log.info("report of an agent ignored", session=session.id, turn=state.turn, status=status)
            return False
        free = False
        if worked and task.task.status not in ENDING:
            free = status != session.status and self._follow(task, session, status, state.status_reason)
        elif status != session.status:
            task.stand(session, status, state.status_reason)
        if status in _ENDS:
            task.move_head(state.head_commit)
        return free

    def _follow(self, task: OpenTask, session: Session, status: SessionStanding, reason: str) -> bool:
        if status == sessions_pb2.SESSION_STATUS_ERROR:
            self.fail(task, session, reason)
            return False
        task.stand(session, status, reason)
        if status == sessions_pb2.SESSION_STATUS_WAITING:
            if task.follow(tasks_pb2.TASK_STATUS_WAITING, "the agent asks for permission", session.id):
                words = f"{session.name}: the agent asks for permission"
                task.tell(EVENT_KIND_AGENT_ASKED, words, session.id, by_agent=True)
            return False
        if status == sessions_pb2.SESSION_STATUS_RUNNING:
            task.follow(tasks_pb2.TASK_STATUS_RUNNING, session_id=session.id)
            return False
        free = task.follow(tasks_pb2.TASK_STATUS_IDLE, session_id=session.id)
        task.tell(EVENT_KIND_AGENT_FINISHED, f"{session.name}: the agent finished", session.id, by_agent=True)
        return free

    def give_up(self, task: OpenTask, session: Session, turn: int, reason: str) -> None:
        """End a turn in error of which it is not known whether the agent works, and have that cancelled."""
        if session.status in SESSION_WORKING and turn == session.turn:
            task.send(TO_SANDBOX, session.id, turn, CancelTurnRequest(session_id=session.id, turn=turn))
            self.fail(task, session, reason)

    def fail(self, task: OpenTask, session: Session, reason: str) -> None:
        """End the turn of a session that works in error."""
        task.stand(session, sessions_pb2.SESSION_STATUS_ERROR, reason)
        task.follow(tasks_pb2.TASK_STATUS_ERROR, reason, session.id)
        task.tell(EVENT_KIND_AGENT_FAILED, f"{session.name}: {reason}", session.id, by_agent=True)

    def fail_all(self, task: OpenTask, reason: str) -> None:
        """End the task in error, and every turn with it: its sandbox failed. It must be provisioned anew."""
        if task.task.status in ENDING or not task.row.provisioned:
            return
        for session in task.sessions:
            if session.status in SESSION_WORKING:
                task.stand(session, sessions_pb2.SESSION_STATUS_ERROR, reason)
        task.row.provisioned, task.row.touched = False, True
        if task.follow(tasks_pb2.TASK_STATUS_ERROR, reason):
            task.tell(EVENT_KIND_TASK_FAILED, reason)


def must_wait(task: OpenTask, session: Session, *, may_queue: bool) -> bool:
    """Say whether a message must wait; raise FailedPrecondition if it can be neither sent nor queued."""
    status = task.task.status
    if status in ENDING:
        raise refused(status, f"the task is {status_name(status)}")
    if session.status == sessions_pb2.SESSION_STATUS_CLOSED:
        raise FailedPrecondition(ERROR_REASON_SESSION_CLOSED, "the session is closed; reopen it first")
    if status not in WORKING and is_ready(task):
        return False
    if may_queue:
        return True
    if status in WORKING:
        words = "an agent of this task works; queue the message or wait"
        raise FailedPrecondition(ERROR_REASON_SESSION_WORKING, words)
    raise not_ready(task)


def is_ready(task: OpenTask) -> bool:
    """Say whether the task has a sandbox that takes messages."""
    provisioned = (tasks_pb2.TASK_STATUS_IDLE, tasks_pb2.TASK_STATUS_ERROR, *WORKING)
    return task.row.provisioned and task.task.status in provisioned


def not_ready(task: OpenTask) -> FailedPrecondition:
    """Return the error for a task that has no sandbox that takes messages."""
    name = status_name(task.task.status)
    words = f"the task is {name} and not provisioned; queue the message, or retry the task"
    return FailedPrecondition(ERROR_REASON_TASK_NOT_READY, words, status=name)


def check_attachments(attachments: Iterable[Attachment]) -> None:
    """Raise InvalidArgument if the attachments of a message are too large together."""
    size = sum(len(one.path.encode()) + len(one.content.encode()) for one in attachments)
    if size > ATTACHMENTS_BYTES:
        raise InvalidArgument("attachments", f"have {size} bytes in sum; at most {ATTACHMENTS_BYTES} are taken")
