"""Queries about what agents wait for. The first answer is kept until the agent was told; what is settled goes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from branchline.v1.common_pb2 import Actor
from branchline.v1.transcripts_pb2 import (
    INPUT_REQUEST_STATE_CANCELLED,
    INPUT_REQUEST_STATE_PENDING,
    InputAnswer,
    InputRequest,
)
from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy import bindparam, delete, select, update

from services.runtime.database import Reader, Statement, Tx, insert_new
from services.runtime.spine.outbox import Mark, Outbox
from services.sandbox.questions import Asked, takes
from services.sandbox.tables import input_requests

_c = input_requests.c
_OF_SESSION = _c.session_id == bindparam("session")
_ASK = Statement(insert_new(input_requests, ["id"]))
_ASKED = Statement(select(input_requests).where(_OF_SESSION).order_by(_c.id))
_OPEN = Statement(
    select(_c.payload).where(_c.id == bindparam("request"), _OF_SESSION, _c.answered.is_(False)).with_for_update()
)
_ANSWER = Statement(
    update(input_requests)
    .where(_c.id == bindparam("request"), _c.answered.is_(False))
    .values(answered=True, payload=bindparam("answered_payload"))
)
_DROP = Statement(delete(input_requests).where(_c.id == bindparam("request")))
_DROP_ALL = Statement(delete(input_requests).where(_OF_SESSION))


@dataclass(frozen=True, slots=True)
class QuestionStore:
    """What the agents of this service wait for."""

    outbox: Outbox
    now: Callable[[], Timestamp]

    def answer(self, tx: Tx, session_id: str, request_id: str, answer: InputAnswer, answered_by: Actor) -> bool:
        """Record the first answer to what is open; return False for any other, which is dropped."""
        payload = tx.value(_OPEN, {"request": request_id, "session": session_id})
        if payload is None:
            return False
        request = InputRequest.FromString(payload)
        if not takes(request, answer):
            return False
        request.answer.CopyFrom(answer)
        request.answered_by.CopyFrom(answered_by)
        request.answer_time.CopyFrom(self.now())
        given = {"request": request_id, "answered_payload": request.SerializeToString()}
        return tx.change(_ANSWER, given) > 0

    def asked(self, tx: Reader, session_id: str) -> list[Asked]:
        """Return what the agent of a session waits for."""
        rows = tx.rows(_ASKED, {"session": session_id})
        return [Asked(InputRequest.FromString(row.payload), row.rpc_id) for row in rows]

    def keep(self, tx: Tx, asked: Sequence[Asked]) -> None:
        """Store what is asked and forget what is settled; tell of both."""
        tx.change_many(_ASK, [_row(one) for one in asked if one.request.state == INPUT_REQUEST_STATE_PENDING])
        over = [one.request.id for one in asked if one.request.state != INPUT_REQUEST_STATE_PENDING]
        tx.change_many(_DROP, [{"request": request_id} for request_id in over])
        self._tell(tx, asked)

    def cancel_all(self, tx: Tx, session_id: str) -> None:
        """Close what the agent of a session waits for, now that nobody is told any answer."""
        asked = self.asked(tx, session_id)
        for one in asked:
            one.request.state = INPUT_REQUEST_STATE_CANCELLED
            one.request.revision += 1
        tx.change(_DROP_ALL, {"session": session_id})
        self._tell(tx, asked)

    def _tell(self, tx: Tx, asked: Sequence[Asked]) -> None:
        self.outbox.mark(tx, [Mark(one.request.id, one.request.revision, one.request) for one in asked])


def _row(asked: Asked) -> dict[str, Any]:
    return {
        "id": asked.request.id,
        "session_id": asked.request.session_id,
        "rpc_id": asked.rpc_id,
        "answered": False,
        "payload": asked.request.SerializeToString(),
    }
