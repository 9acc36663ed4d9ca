"""What an agent asks is answered once; the first answer wins. F11, C1."""

import asyncio
from typing import Any

import pytest
from branchline.v1 import sessions_pb2, tasks_pb2
from branchline.v1.common_pb2 import FAILURE_REASON_TIMED_OUT, Consistency
from branchline.v1.sessions_pb2 import AnswerInputRequestResponse
from branchline.v1.tasks_pb2 import Task
from branchline.v1.transcripts_pb2 import Decline, InputAnswer, InputRequest, PermissionOption, PermissionRequest
from branchline_internal.sandbox.v1.sandbox_pb2 import AgentSession, AnswerInputRequest
from google.protobuf.struct_pb2 import Struct

from services.runtime.errors import DomainError
from services.runtime.failures import failed
from services.runtime.principal import Principal, bind_principal
from services.runtime.spine.outbox import COORDINATOR
from services.runtime.spine.tokens import parse_consistency
from services.task.inputs import ANSWERED, CANCELLED, PENDING
from services.task.open_task import OpenTask
from services.task.standing import RUNNING
from tests.unit.task.room import CALLER, NOWHERE, Room, new_id, request_id, sandbox_of
from tests.unit.task.test_turns import broke, ended, send

WAITING = sessions_pb2.SESSION_STATE_WAITING


def request_of(task: OpenTask, **fields: Any) -> InputRequest:
    """Return what the sandbox service pushes when an agent asks for permission."""
    given: dict[str, Any] = {"turn": 1, "state": PENDING, "revision": 1, **fields}
    request = InputRequest(
        id=new_id("inp"), task_id=task.task.id, session_id=task.sessions[0].id, entry_id="ent_1", **given
    )
    if not request.HasField("question"):
        options = [PermissionOption(id="yes", display_name="Allow"), PermissionOption(id="no")]
        request.permission.CopyFrom(PermissionRequest(options=options))
        request.permission.tool_call.title = "rm -r build"
    return request


def waits(task: OpenTask, revision: int = 1) -> AgentSession:
    return AgentSession(session_id=task.sessions[0].id, task_id=task.task.id, state=WAITING, turn=1, revision=revision)


async def asked(room: Room, **fields: Any) -> tuple[OpenTask, InputRequest]:
    task = await room.task()
    await send(room, task)
    request = request_of(task, **fields)
    assert await room.push(request, waits(task)) == {}
    return task, request


def answer(request: InputRequest, option: str = "yes", **fields: Any) -> sessions_pb2.AnswerInputRequestRequest:
    return sessions_pb2.AnswerInputRequestRequest(
        request_id=request_id(),
        task_id=request.task_id,
        input_request_id=request.id,
        answer=InputAnswer(**(fields or {"option_id": option})),
    )


async def run(room: Room, request: sessions_pb2.AnswerInputRequestRequest) -> AnswerInputRequestResponse:
    return await room.commands.run(request, AnswerInputRequestResponse, room.sessions.answer, request)


async def refusal(room: Room, request: sessions_pb2.AnswerInputRequestRequest) -> str:
    with pytest.raises(DomainError) as refused:
        await run(room, request)
    return refused.value.reason


async def counted(room: Room, task: OpenTask) -> int:
    return (await room.read(task.task.id)).task.pending_input_count


async def test_what_is_asked_is_kept_pushed_and_counted_in_one_revision_of_the_task(room: Room) -> None:
    task = await room.task()
    await send(room, task)
    before = (await room.read(task.task.id)).task.revision

    request = request_of(task)
    await room.push(request, waits(task))

    held = await room.input(request.id)
    assert (held.state, held.revision, held.organization_id) == (PENDING, 1, "org_1")
    assert held.permission == request.permission
    assert await room.marks(InputRequest, COORDINATOR) == [held]
    after = (await room.read(task.task.id)).task
    assert (after.pending_input_count, after.revision) == (1, before + 1)
    assert (await room.marks(Task))[-1].pending_input_count == 1


async def test_the_first_of_two_answers_at_the_same_moment_wins(room: Room) -> None:
    _, request = await asked(room)

    async def as_user(user_id: str, option: str) -> AnswerInputRequestResponse:
        bind_principal(Principal(user_id=user_id, organization_id="org_1", role=CALLER.role))
        return await run(room, answer(request, option))

    outcomes = await asyncio.gather(as_user("usr_a", "yes"), as_user("usr_b", "no"), return_exceptions=True)

    assert isinstance(outcomes[0], AnswerInputRequestResponse)
    assert isinstance(outcomes[1], DomainError)
    assert (outcomes[1].reason, outcomes[1].metadata) == ("ALREADY_ANSWERED", {"answered_by": "usr_a"})
    told = [(one.answer.option_id, one.answered_by.user_id) for one in await room.marks(AnswerInputRequest, "sandbox")]
    assert told == [("yes", "usr_a")]


async def test_an_answer_shows_at_once_and_its_request_repeated_gives_the_first_answer(room: Room) -> None:
    task, request = await asked(room)
    wanted = answer(request)

    first, second = await asyncio.gather(run(room, wanted), run(room, wanted))
    later = await run(room, wanted)

    assert first == second == later
    told = first.input_request
    assert (told.state, told.answer.option_id, told.answered_by.user_id) == (ANSWERED, "yes", "usr_ann")
    assert told.HasField("answer_time")
    assert await room.marks(InputRequest, COORDINATOR) == [told]
    assert await counted(room, task) == 0
    assert (await room.events(task.task.id)).count("INPUT_ANSWERED") == 1
    point = parse_consistency(Consistency(at_least_as_fresh=[first.consistency_token])).point
    assert {one.id: one.revision for one in point.entities}[request.id] == told.revision == 2


async def test_what_the_sandbox_says_after_the_answer_changes_nothing(room: Room) -> None:
    task, request = await asked(room)
    answered = (await run(room, answer(request))).input_request

    for number, state in enumerate((PENDING, ANSWERED, CANCELLED), 1):
        request.state, request.revision = state, number
        assert await room.push(request) == {}

    assert await room.input(request.id) == answered
    assert await counted(room, task) == 0
    assert await refusal(room, answer(request, "no")) == "ALREADY_ANSWERED"


async def test_a_push_that_comes_twice_is_taken_once(room: Room) -> None:
    task, request = await asked(room)

    assert await room.push(request) == {}

    assert (await room.input(request.id)).revision == 1
    assert await counted(room, task) == 1


async def test_an_option_that_was_not_offered_is_refused(room: Room) -> None:
    _, request = await asked(room)

    assert await refusal(room, answer(request, "maybe")) == "FIELD_INVALID"
    assert await refusal(room, answer(request, form=Struct())) == "FIELD_INVALID"
    assert not await room.marks(AnswerInputRequest)


async def test_a_question_is_answered_with_a_form_or_declined(room: Room) -> None:
    _, first = await asked(room, question={"text": "Which port?"})
    _, second = await asked(room, question={"text": "Which port?"})
    form = Struct()
    form.update({"port": 8080})
    large = Struct()
    large.update({"port": "x" * 20_000})

    assert await refusal(room, answer(first, "yes")) == "FIELD_INVALID"
    assert await refusal(room, answer(first, form=large)) == "FIELD_INVALID"
    filled = await run(room, answer(first, form=form))
    declined = await run(room, answer(second, decline=Decline(reason="later")))

    assert filled.input_request.answer.form == form
    assert declined.input_request.answer.decline.reason == "later"


@pytest.mark.parametrize("how", ["ended", "failed", "killed", "given up", "sandbox lost"])
async def test_whatever_ends_the_turn_cancels_what_it_asked(room: Room, how: str) -> None:
    task, request = await asked(room)
    session_id = task.sessions[0].id
    if how == "ended":
        await room.push(ended(task, revision=2))
    elif how == "failed":
        await room.push(broke(task, revision=2))
    elif how == "killed":
        await room.public.KillTask(tasks_pb2.KillTaskRequest(task_id=task.task.id), NOWHERE)
    elif how == "given up":
        lost = failed(FAILURE_REASON_TIMED_OUT, "lost")
        await room.change(task.task.id, lambda one: room.turns.give_up(one, one.session(session_id), 1, lost))
    else:
        await room.push(sandbox_of(task, 6))

    held = await room.input(request.id)
    assert (held.state, held.revision) == (CANCELLED, 2)
    assert await room.marks(InputRequest, COORDINATOR) == [held]
    assert await counted(room, task) == 0
    reason = await refusal(room, answer(request))
    assert reason == "NO_LONGER_WAITING"


async def test_what_was_asked_and_the_end_of_its_turn_may_come_together(room: Room) -> None:
    task = await room.task()
    await send(room, task)
    request = request_of(task)

    assert await room.push(request, ended(task)) == {}

    assert (await room.input(request.id)).state == CANCELLED
    assert await counted(room, task) == 0


async def test_what_comes_after_its_turn_is_cancelled_and_of_another_turn_too(room: Room) -> None:
    task = await room.task()
    await send(room, task)
    other = request_of(task, turn=2)
    await room.push(other)
    await room.push(ended(task))
    late = request_of(task)
    await room.push(late)

    assert [(await room.input(one.id)).state for one in (other, late)] == [CANCELLED, CANCELLED]
    assert await counted(room, task) == 0


async def test_the_sandbox_may_close_what_it_asked(room: Room) -> None:
    task, request = await asked(room)
    request.state, request.revision = CANCELLED, 2

    await room.push(request)

    assert (await room.input(request.id)).state == CANCELLED
    assert await counted(room, task) == 0


async def test_a_request_of_another_task_is_not_found(room: Room) -> None:
    _, request = await asked(room)
    other, _ = await asked(room)
    request.task_id = other.task.id

    assert await refusal(room, answer(request)) == "RESOURCE_NOT_FOUND"
    request.id = "inp_none"
    assert await refusal(room, answer(request)) == "RESOURCE_NOT_FOUND"


async def test_several_requests_of_a_turn_are_counted_each(room: Room) -> None:
    task, first = await asked(room)
    second = request_of(task)
    await room.push(second)
    both = await counted(room, task)

    await run(room, answer(first))
    one = await counted(room, task)
    await room.push(ended(task, revision=2))

    assert (both, one, await counted(room, task)) == (2, 1, 0)
    assert (await room.input(first.id)).state == ANSWERED
    assert (await room.input(second.id)).state == CANCELLED
    assert (await room.read(task.task.id)).standing != RUNNING
