"""What an agent asks is answered once; the first answer wins. F11, C1."""

import asyncio

import pytest
from branchline.v1 import sessions_pb2
from branchline.v1.sessions_pb2 import AnswerPermissionResponse, PermissionOption, TranscriptEntry
from branchline_internal.sandbox.v1.sandbox_pb2 import AgentSession, AnswerPermissionRequest

from services.runtime.errors import DomainError
from services.runtime.principal import Principal, bind_principal
from services.task.open_task import OpenTask
from tests.unit.task.room import CALLER, Room, new_id
from tests.unit.task.test_turns import ended, send

WAITING = sessions_pb2.SESSION_STATUS_WAITING


async def asked(room: Room) -> tuple[OpenTask, TranscriptEntry]:
    task = await room.task()
    await send(room, task)
    entry = TranscriptEntry(
        id=new_id("ent"),
        session_id=task.sessions[0].id,
        task_id=task.task.id,
        kind=sessions_pb2.TRANSCRIPT_ENTRY_KIND_PERMISSION,
        text="May I?",
        state="pending",
        streaming=True,
        turn=1,
        options=[PermissionOption(id="yes"), PermissionOption(id="no")],
        revision=1,
    )
    waits = AgentSession(session_id=task.sessions[0].id, task_id=task.task.id, status=WAITING, turn=1, revision=1)
    await room.push(entry, waits)
    return task, entry


def answer(task: OpenTask, entry: TranscriptEntry, option: str = "yes") -> sessions_pb2.AnswerPermissionRequest:
    return sessions_pb2.AnswerPermissionRequest(
        request_id=new_id(),
        task_id=task.task.id,
        session_id=task.sessions[0].id,
        entry_id=entry.id,
        option_id=option,
    )


async def run(room: Room, request: sessions_pb2.AnswerPermissionRequest) -> AnswerPermissionResponse:
    return await room.commands.run(request, AnswerPermissionResponse, room.sessions.answer, request)


async def refusal(room: Room, request: sessions_pb2.AnswerPermissionRequest) -> str:
    with pytest.raises(DomainError) as refused:
        await run(room, request)
    return refused.value.reason


async def test_the_first_of_two_answers_at_the_same_moment_wins(room: Room) -> None:
    task, entry = await asked(room)

    async def as_user(user_id: str, option: str) -> AnswerPermissionResponse:
        bind_principal(Principal(user_id=user_id, organization_id="org_1", role=CALLER.role))
        return await run(room, answer(task, entry, option))

    outcomes = await asyncio.gather(as_user("usr_a", "yes"), as_user("usr_b", "no"), return_exceptions=True)

    assert isinstance(outcomes[0], AnswerPermissionResponse)
    assert isinstance(outcomes[1], DomainError)
    assert outcomes[1].reason == "ALREADY_ANSWERED"
    assert [(one.option_id, one.user_id) for one in await room.marks(AnswerPermissionRequest)] == [("yes", "usr_a")]


async def test_the_same_request_at_once_and_later_gives_the_first_answer(room: Room) -> None:
    task, entry = await asked(room)
    request = answer(task, entry)

    first, second = await asyncio.gather(run(room, request), run(room, request))
    later = await run(room, request)

    assert first == second == later
    assert (first.entry.state, first.entry.user_id) == ("answered: yes", "usr_ann")
    assert (await room.events(task.task.id)).count("PERMISSION_ANSWERED") == 1


async def test_the_entry_is_shown_as_answered_when_the_sandbox_pushes_it(room: Room) -> None:
    task, entry = await asked(room)
    await run(room, answer(task, entry))

    held = await room.entry(entry.id)
    assert (held.state, held.revision) == ("pending", 1)

    held.state, held.streaming, held.revision = "answered: yes", False, 2
    assert await room.push(held) == {}
    assert (await room.entry(entry.id)).state == "answered: yes"
    assert await refusal(room, answer(task, entry, "no")) == "ALREADY_ANSWERED"


async def test_an_option_that_was_not_offered_is_refused(room: Room) -> None:
    task, entry = await asked(room)

    assert await refusal(room, answer(task, entry, "maybe")) == "INVALID_FIELD"
    assert not await room.marks(AnswerPermissionRequest)


async def test_nobody_waits_after_the_turn(room: Room) -> None:
    task, entry = await asked(room)
    await room.push(ended(task, revision=2))

    assert await refusal(room, answer(task, entry)) == "NO_LONGER_WAITING"


async def test_an_entry_of_another_session_or_kind_is_not_found(room: Room) -> None:
    task, entry = await asked(room)
    other, _ = await asked(room)
    text = TranscriptEntry(id=new_id("ent"), session_id=task.sessions[0].id, revision=1)
    await room.push(text)

    assert await refusal(room, answer(other, entry)) == "NOT_FOUND"
    assert await refusal(room, answer(task, text)) == "NOT_FOUND"
