"""Answers to what agents ask: the first one wins, and it is decided here."""

from dataclasses import dataclass

from branchline.v1.sessions_pb2 import TRANSCRIPT_ENTRY_KIND_PERMISSION, Session, TranscriptEntry
from branchline.v1.vocabulary_pb2 import (
    ENTITY_KIND_TRANSCRIPT_ENTRY,
    ERROR_REASON_ALREADY_ANSWERED,
    ERROR_REASON_NO_LONGER_WAITING,
    EVENT_KIND_PERMISSION_ANSWERED,
)
from branchline_internal.sandbox.v1.sandbox_pb2 import AnswerPermissionRequest
from sqlalchemy import bindparam, delete

from services.runtime.clock import Clock
from services.runtime.database import Statement, Tx, insert_new
from services.runtime.errors import FailedPrecondition, InvalidArgument, NotFound
from services.task.destinations import TO_SANDBOX
from services.task.open_task import OpenTask
from services.task.status import SESSION_WORKING
from services.task.store import ENTRIES
from services.task.tables import permission_answers

_ANSWERED = "answered"
_KEEP_SECONDS = 7 * 24 * 3600.0

_ANSWER = Statement(insert_new(permission_answers, ["entry_id"]))
_FORGET = Statement(delete(permission_answers).where(permission_answers.c.answer_time < bindparam("before")))


@dataclass(frozen=True, slots=True)
class Permissions:
    """Who answered what."""

    clock: Clock

    def answer(
        self, tx: Tx, task: OpenTask, session: Session, entry_id: str, option_id: str, user_id: str
    ) -> TranscriptEntry:
        """Record an answer and have the agent told; return the entry as it will be.

        Raise NotFound, InvalidArgument, or FailedPrecondition if it is not the first or nobody waits for it.
        """
        entry = ENTRIES.get(tx, entry_id)
        if entry.session_id != session.id or entry.kind != TRANSCRIPT_ENTRY_KIND_PERMISSION:
            raise NotFound(ENTITY_KIND_TRANSCRIPT_ENTRY, entry_id)
        if option_id not in [option.id for option in entry.options]:
            known = ", ".join(option.id for option in entry.options) or "none"
            raise InvalidArgument("option_id", f"is not one of the request's options: {known}")
        answered = entry.state.startswith(_ANSWERED)
        waiting = entry.streaming and entry.turn == session.turn and session.status in SESSION_WORKING
        if not waiting and not answered:
            raise FailedPrecondition(ERROR_REASON_NO_LONGER_WAITING, "nobody waits for the answer any more")
        row = {
            "entry_id": entry_id,
            "task_id": task.task.id,
            "option_id": option_id,
            "user_id": user_id,
            "answer_time": self.clock.seconds(),
        }
        if answered or not tx.change(_ANSWER, row):
            raise FailedPrecondition(ERROR_REASON_ALREADY_ANSWERED, "the request was answered before")
        request = AnswerPermissionRequest(
            session_id=session.id, entry_id=entry_id, option_id=option_id, user_id=user_id
        )
        task.send(TO_SANDBOX, entry_id, 1, request)
        task.tell(EVENT_KIND_PERMISSION_ANSWERED, f"{entry.text}: {option_id}", session.id)
        # The entry is the sandbox's: it is stored and shown as answered once the sandbox has pushed it so.
        entry.state = f"{_ANSWERED}: {option_id}"
        entry.user_id = user_id
        entry.streaming = False
        entry.revision += 1
        return entry

    def forget_old(self, tx: Tx) -> None:
        """Forget answers whose entries have shown them for long."""
        tx.change(_FORGET, {"before": self.clock.seconds() - _KEEP_SECONDS})
