"""What agents wait for: sandboxes say what is asked, and the first answer is decided here.

A request is PENDING once and then never again: it is answered, or its turn ends without an answer. What is done to
requests is written when their task is closed; see `open_task`.
"""

from collections.abc import Iterable, Sequence

from branchline.v1 import errors_pb2 as errors
from branchline.v1 import transcripts_pb2
from branchline.v1.common_pb2 import ENTITY_KIND_INPUT_REQUEST, Actor
from branchline.v1.history_pb2 import EVENT_KIND_INPUT_ANSWERED
from branchline.v1.transcripts_pb2 import InputAnswer, InputRequest
from branchline_internal.sandbox.v1.sandbox_pb2 import AnswerInputRequest
from sqlalchemy import select

from services.runtime.actors import current_actor
from services.runtime.database import Reader, Statement, Tx, is_in
from services.runtime.errors import FailedPrecondition, InvalidArgument, NotFound
from services.runtime.limits import STRUCT_BYTES
from services.runtime.spine.resources import Resources
from services.task.destinations import TO_SANDBOX
from services.task.open_task import OpenTask
from services.task.standing import SESSION_WORKING
from services.task.tables import input_requests

PENDING = transcripts_pb2.INPUT_REQUEST_STATE_PENDING
ANSWERED = transcripts_pb2.INPUT_REQUEST_STATE_ANSWERED
CANCELLED = transcripts_pb2.INPUT_REQUEST_STATE_CANCELLED

_PENDING_OF = Statement(
    select(input_requests.c.payload).where(is_in(input_requests.c.task_id, "ids"), input_requests.c.pending)
)

INPUTS = Resources(
    input_requests,
    InputRequest,
    ENTITY_KIND_INPUT_REQUEST,
    lambda request: {"id": request.id, "task_id": request.task_id, "pending": request.state == PENDING},
)


def take(tx: Reader, tasks: dict[str, OpenTask], told: Sequence[InputRequest]) -> None:
    """Take over what sandboxes say of requests. One that is settled here stays so."""
    newest = {one.id: one for one in sorted(told, key=lambda one: one.revision)}
    held = {one.id: one for one in INPUTS.find_many(tx, list(newest))}
    for said in newest.values():
        task, before = tasks[said.task_id], held.get(said.id)
        if said.session_id in task.rows and (before is None or before.state == PENDING):
            _take(task, before, said)


def _take(task: OpenTask, before: InputRequest | None, said: InputRequest) -> None:
    session = task.session(said.session_id)
    request = InputRequest()
    request.CopyFrom(said)
    request.organization_id = task.task.organization_id
    waits = session.state in SESSION_WORKING and said.turn == session.turn
    if request.state == PENDING and not waits:
        request.state = CANCELLED
    request.revision = before.revision if before is not None else 0
    if request != before:
        _keep(task, request, was_pending=before is not None)


def answer(tx: Reader, task: OpenTask, request_id: str, given: InputAnswer) -> InputRequest:
    """Record an answer and have the agent told.

    Raise NotFound, InvalidArgument, or FailedPrecondition if it is not the first or nobody waits for it.
    """
    request = INPUTS.find(tx, request_id)
    if request is None or request.task_id != task.task.id:
        raise NotFound(ENTITY_KIND_INPUT_REQUEST, request_id)
    _check(request, given)
    if request.state == ANSWERED:
        by = _name(request.answered_by)
        raise FailedPrecondition(
            errors.ERROR_REASON_ALREADY_ANSWERED, "the request was answered before", answered_by=by
        )
    if request.state != PENDING:
        raise FailedPrecondition(errors.ERROR_REASON_NO_LONGER_WAITING, "nobody waits for the answer any more")
    request.state = ANSWERED
    request.answer.CopyFrom(given)
    request.answered_by.CopyFrom(current_actor())
    request.answer_time.CopyFrom(task.clock.timestamp())
    _keep(task, request, was_pending=True)
    wanted = AnswerInputRequest(
        session_id=request.session_id, input_request_id=request.id, answer=given, answered_by=request.answered_by
    )
    task.send(TO_SANDBOX, request.id, 1, wanted)
    asked = request.permission.tool_call.title or request.question.text
    task.tell(EVENT_KIND_INPUT_ANSWERED, f"{_words(request, given)}: {asked}", request.session_id)
    return request


def settle(tx: Reader, tasks: Iterable[OpenTask]) -> None:
    """Close what agents asked in turns that have ended in this transaction."""
    over = {task.task.id: task for task in tasks if task.rested and task.task.pending_input_count}
    if not over:
        return
    held = [InputRequest.FromString(row.payload) for row in tx.rows(_PENDING_OF, {"ids": sorted(over)})]
    for found in (*held, *(one for task in over.values() for one in list(task.inputs.values()))):
        task = over[found.task_id]
        request = task.inputs.get(found.id, found)
        if request.state == PENDING and request.session_id in task.rested:
            request.state = CANCELLED
            _keep(task, request, was_pending=True)


def write(tx: Tx, changed: Sequence[InputRequest]) -> None:
    """Write what was changed of tasks that are closed."""
    INPUTS.save(tx, changed)


def _keep(task: OpenTask, request: InputRequest, *, was_pending: bool) -> None:
    task.inputs[request.id] = request
    task.count_inputs((request.state == PENDING) - was_pending)


def _check(request: InputRequest, given: InputAnswer) -> None:
    """Raise InvalidArgument for an answer that is none to what is asked."""
    kind = given.WhichOneof("answer")
    if kind == "decline":
        return
    if request.HasField("question"):
        if kind != "form":
            raise InvalidArgument("answer", "a question is answered with a form, or declined")
        if given.form.ByteSize() > STRUCT_BYTES:
            raise InvalidArgument("answer.form", f"has more than {STRUCT_BYTES} bytes")
        return
    known = [option.id for option in request.permission.options]
    if kind != "option_id":
        raise InvalidArgument("answer", "a request for permission is answered with an option, or declined")
    if given.option_id not in known:
        raise InvalidArgument("answer.option_id", f"is not one of the request's options: {', '.join(known) or 'none'}")


def _words(request: InputRequest, given: InputAnswer) -> str:
    """Return an answer in words for people."""
    if given.HasField("decline"):
        return "declined"
    if given.HasField("form"):
        return "answered"
    chosen = next(option for option in request.permission.options if option.id == given.option_id)
    return chosen.display_name or chosen.id


def _name(actor: Actor) -> str:
    return actor.user_id or actor.session_id or actor.system
