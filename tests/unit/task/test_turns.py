"""Messages begin turns or wait; what agents and sandboxes report is followed, and never fails."""

import itertools
from typing import Any

import pytest
from branchline.v1 import sandboxes_pb2, sessions_pb2, tasks_pb2
from branchline.v1.sandboxes_pb2 import SandboxStatus
from branchline.v1.sessions_pb2 import Attachment, SessionStatus, TranscriptEntry
from branchline.v1.tasks_pb2 import TaskStatus
from branchline_internal.sandbox.v1.sandbox_pb2 import (
    AgentSession,
    CancelTurnRequest,
    CloseSessionRequest,
    StartTurnRequest,
)

from services.runtime.errors import DomainError, InvalidArgument
from services.task.lifecycle import PROVISION
from services.task.open_task import OpenTask
from services.task.status import Status, status_name
from services.task.store import DROPPED, QUEUED
from tests.unit.task.room import NOWHERE, Room, new_id, sandbox_of
from tests.unit.task.test_open_task import message

IDLE, RUNNING, ERROR = tasks_pb2.TASK_STATUS_IDLE, tasks_pb2.TASK_STATUS_RUNNING, tasks_pb2.TASK_STATUS_ERROR
TASK_STATUSES = [status for status in TaskStatus.values() if status]
SESSION_STATUSES = [status for status in SessionStatus.values() if status]


async def send(room: Room, task: OpenTask, session: int = 0, **fields: Any) -> TranscriptEntry:
    request = message(task, **fields)
    request.session_id = task.sessions[session].id
    return (await room.database.write(room.sessions.send, request)).entry


def report(task: OpenTask, status: SessionStatus.ValueType, turn: int, revision: int, **fields: str) -> AgentSession:
    return AgentSession(
        session_id=task.sessions[0].id, task_id=task.task.id, status=status, turn=turn, revision=revision, **fields
    )


def ended(task: OpenTask, turn: int = 1, revision: int = 1, **fields: str) -> AgentSession:
    return report(task, sessions_pb2.SESSION_STATUS_IDLE, turn, revision, **fields)


async def test_a_turn_ends_and_the_message_that_waited_longest_begins_the_next(room: Room) -> None:
    task = await room.task(sessions=2)
    await send(room, task)
    second = await send(room, task, session=1, queue=True)
    third = await send(room, task, queue=True)

    await room.push(ended(task))

    assert (await room.entry(second.id)).state == ""
    assert (await room.entry(third.id)).state == QUEUED
    after = await room.read(task.task.id)
    assert [one.status for one in after.sessions] == [2, 3]
    assert after.task.status == RUNNING


@pytest.mark.parametrize("status", [tasks_pb2.TASK_STATUS_PENDING, tasks_pb2.TASK_STATUS_PROVISIONING])
async def test_messages_wait_while_a_task_is_provisioned_again(room: Room, status: Status) -> None:  # F4
    task = await room.task(status)

    with pytest.raises(DomainError) as refused:
        await send(room, task)
    queued = await send(room, task, queue=True)

    assert refused.value.reason == "TASK_NOT_READY"
    assert queued.state == QUEUED
    assert (await room.read(task.task.id)).task.status == status


@pytest.mark.parametrize("status", TASK_STATUSES, ids=status_name)
async def test_no_report_is_ever_refused(room: Room, status: Status) -> None:  # F23
    task = await room.task(status)
    revision = itertools.count(1)
    for held, reported, turn in itertools.product(SESSION_STATUSES, SESSION_STATUSES, (0, 1, 2)):
        task.task.status = status
        task.sessions[0].turn = 1
        task.stand(task.sessions[0], held)
        room.turns.follow(task, report(task, reported, turn, next(revision), status_reason="why"))

    for number, reported in enumerate(SandboxStatus.values(), 1):
        assert await room.push(sandbox_of(task, reported, revision=number)) == {}
    for number, reported in enumerate(SESSION_STATUSES, 1):
        assert await room.push(report(task, reported, 0, number)) == {}


async def test_a_sandbox_that_fails_ends_its_turns_and_the_task_can_be_retried(room: Room) -> None:  # F23
    task = await room.task(sessions=2)
    await send(room, task)

    await room.push(sandbox_of(task, sandboxes_pb2.SANDBOX_STATUS_ERROR, "power"))

    failed = await room.read(task.task.id)
    assert (failed.task.status, failed.task.status_reason) == (ERROR, "the sandbox failed: power")
    assert [one.status for one in failed.sessions] == [sessions_pb2.SESSION_STATUS_ERROR, 2]
    with pytest.raises(DomainError, match="not provisioned"):
        await send(room, task, session=1)
    assert await room.push(ended(task)) == {}
    assert (await room.read(task.task.id)).task.status == ERROR
    retry = tasks_pb2.RetryTaskRequest(request_id=new_id(), task_id=task.task.id)
    await room.public.RetryTask(retry, NOWHERE)
    assert (await room.read(task.task.id)).row.workflow == PROVISION


async def test_the_head_commit_comes_with_the_end_of_the_turn(room: Room) -> None:  # C3, F10
    task = await room.task()
    await send(room, task)

    await room.push(ended(task, head_commit="a" * 40))
    await room.push(ended(task, revision=2, head_commit="a" * 40))

    assert (await room.read(task.task.id)).task.head_commit == "a" * 40
    assert (await room.events(task.task.id)).count("BRANCH_MOVED") == 1


async def test_an_echo_of_running_changes_nothing(room: Room) -> None:  # C12
    task = await room.task()
    await send(room, task)
    before = await room.read(task.task.id)

    await room.push(report(task, sessions_pb2.SESSION_STATUS_RUNNING, 1, 1))

    after = await room.read(task.task.id)
    assert (after.task, after.sessions) == (before.task, before.sessions)


async def test_entries_of_a_turn_are_numbered_before_its_end_is_followed(room: Room) -> None:
    task = await room.task()
    await send(room, task)
    following = await send(room, task, queue=True)
    said = [
        TranscriptEntry(id=f"ent_{number}", session_id=task.sessions[0].id, task_id=task.task.id, revision=1)
        for number in range(3)
    ]

    await room.push(ended(task), *said, TranscriptEntry(id="ent_1", session_id=task.sessions[0].id, revision=2))

    numbered = [(await room.entry(one.id)).position for one in said]
    assert numbered == [3, 4, 5]
    assert (await room.entry(following.id)).position == 2
    assert (await room.entry("ent_1")).revision == 2


async def test_a_batch_of_entries_costs_the_same_however_long(room: Room) -> None:
    task = await room.task()

    async def cost(first: int, count: int) -> int:
        before = room.database.statements
        await room.push(
            *(
                TranscriptEntry(id=f"ent_{number}", session_id=task.sessions[0].id, revision=1)
                for number in range(first, first + count)
            )
        )
        return room.database.statements - before

    assert await cost(0, 1) == await cost(1, 300) <= 6
    assert (await room.entry("ent_300")).position == 301


async def test_what_concerns_a_task_that_is_gone_is_ignored_and_what_is_too_large_refused(room: Room) -> None:
    gone = AgentSession(session_id="ses_gone", task_id="task_gone", turn=1, revision=1)
    large = TranscriptEntry(id="ent_large", session_id="ses_gone", text="x" * 600_000, revision=1)

    assert await room.push(gone, TranscriptEntry(id="ent_x", session_id="ses_gone", revision=1)) == {}
    assert list(await room.push(gone, large)) == [1]


async def test_closing_a_session_drops_what_waits_for_it_and_nothing_wakes_it(room: Room) -> None:  # F26, F8
    task = await room.task(sessions=2)
    await send(room, task)
    waiting = await send(room, task, session=1, queue=True)
    request = sessions_pb2.CloseSessionRequest(
        request_id=new_id(), task_id=task.task.id, session_id=task.sessions[1].id
    )

    first = await room.commands.run(request, sessions_pb2.CloseSessionResponse, room.sessions.close, request)
    again = await room.commands.run(request, sessions_pb2.CloseSessionResponse, room.sessions.close, request)
    await room.push(ended(task))

    after = await room.read(task.task.id)
    assert first == again
    assert (await room.entry(waiting.id)).state == DROPPED
    assert after.sessions[1].status == sessions_pb2.SESSION_STATUS_CLOSED
    assert after.task.status == IDLE
    assert [one.session_id for one in await room.marks(CloseSessionRequest)] == [task.sessions[1].id]
    assert len(await room.marks(StartTurnRequest)) == 1


async def test_attachments_are_bounded_in_sum(room: Room) -> None:  # F22, F30
    task = await room.task()
    half = Attachment(path="a", content="ä" * (64 * 1024 - 1))

    await send(room, task, attachments=[half, half], text="x" * 65536)
    with pytest.raises(InvalidArgument, match="attachments"):
        await send(room, task, queue=True, attachments=[half, half, Attachment(path="abcd", content="x")])

    marks = await room.marks(TranscriptEntry)
    assert all(one.ByteSize() <= 512 * 1024 for one in marks)


async def test_a_turn_that_ends_in_error_says_why_and_the_next_message_begins_another(room: Room) -> None:
    task = await room.task()
    await send(room, task)

    await room.push(report(task, sessions_pb2.SESSION_STATUS_ERROR, 1, 1, status_reason="it broke"))
    failed = await room.read(task.task.id)
    await send(room, task)

    assert (failed.task.status, failed.task.status_reason) == (ERROR, "it broke")
    after = await room.read(task.task.id)
    assert (after.task.status, after.sessions[0].turn) == (RUNNING, 2)


async def test_a_cancellation_names_its_turn_and_can_be_repeated(room: Room) -> None:  # F20
    task = await room.task()
    await send(room, task)

    def request() -> sessions_pb2.CancelTurnRequest:
        return sessions_pb2.CancelTurnRequest(request_id=new_id(), task_id=task.task.id, session_id=task.sessions[0].id)

    await room.database.write(room.sessions.cancel, request())
    await room.database.write(room.sessions.cancel, request())

    assert [(one.session_id, one.turn) for one in await room.marks(CancelTurnRequest)] == [(task.sessions[0].id, 1)]
