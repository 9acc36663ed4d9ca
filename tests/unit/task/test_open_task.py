"""An open task writes each row once, whatever was done to it. C5."""

from typing import Any

import pytest
from branchline.v1 import sessions_pb2, tasks_pb2
from branchline.v1.common_pb2 import FAILURE_REASON_INTERNAL, Consistency, Prompt
from branchline.v1.history_pb2 import EVENT_KIND_MESSAGE_SENT, HistoryEvent
from branchline.v1.sessions_pb2 import SESSION_STATE_RUNNING, WHEN_BUSY_QUEUE, Session
from branchline.v1.tasks_pb2 import Task
from branchline_internal.sandbox.v1.sandbox_pb2 import StartTurnRequest

from services.runtime.errors import DomainError
from services.runtime.failures import failed
from services.runtime.principal import Principal, bind_principal
from services.runtime.spine.tokens import parse_consistency
from services.runtime.validation import validate
from services.task.open_task import OpenTask
from services.task.standing import RUNNING, TURN_FAILED
from tests.unit.task.room import Room, new_id, request_id


def message(task: OpenTask, text: str = "go on", **fields: Any) -> sessions_pb2.SendMessageRequest:
    given: dict[str, Any] = {"prompt": Prompt(text=text), "session_id": task.sessions[0].id, **fields}
    if given.pop("queue", False):
        given["when_busy"] = WHEN_BUSY_QUEUE
    return sessions_pb2.SendMessageRequest(request_id=request_id(), task_id=task.task.id, **given)


async def test_whatever_is_changed_gets_one_revision_and_one_mark(room: Room) -> None:  # C5
    task = await room.task()
    session = task.sessions[0]
    before = len(await room.marks(Task))

    def change(opened: OpenTask) -> None:
        opened.move(RUNNING)
        opened.move(TURN_FAILED, failed(FAILURE_REASON_INTERNAL, "it broke"))
        opened.sessions[0].display_name = "Other"
        opened.change_session(opened.sessions[0])
        opened.stand(opened.sessions[0], opened.sessions[0].state)

    await room.change(task.task.id, change)

    after = await room.read(task.task.id)
    assert after.task.revision == task.task.revision + 1
    assert after.sessions[0].revision == session.revision + 1
    assert len(await room.marks(Task)) == before
    assert after.task.sessions[0].display_name == "Other"


async def test_a_failure_stays_until_the_task_stands_elsewhere(room: Room) -> None:
    task = await room.task()

    await room.change(task.task.id, lambda opened: opened.move(TURN_FAILED, failed(FAILURE_REASON_INTERNAL, "broke")))
    failing = await room.read(task.task.id)
    await room.change(task.task.id, lambda opened: opened.move(RUNNING))

    assert (failing.standing, failing.task.failure.message) == (TURN_FAILED, "broke")
    assert not (await room.read(task.task.id)).task.HasField("failure")


async def test_nothing_is_written_when_nothing_was_changed_or_the_block_raises(room: Room) -> None:
    task = await room.task()
    written = room.database.statements

    await room.change(task.task.id, lambda opened: None)
    with pytest.raises(ZeroDivisionError):
        await room.change(task.task.id, lambda opened: (opened.move(RUNNING), 1 / 0))

    assert room.database.statements == written + 4
    assert (await room.read(task.task.id)).task == task.task


async def test_a_message_costs_at_most_nine_statements(room: Room) -> None:  # C5
    task = await room.task()
    request = message(task)
    before = room.database.statements

    answer = await room.commands.run(request, sessions_pb2.SendMessageResponse, room.sessions.send, request)

    assert room.database.statements - before <= 9
    assert [one.turn for one in await room.marks(StartTurnRequest, "sandbox")] == [1]
    assert answer.entry.position == 1
    assert [one.state for one in await room.marks(Session)] == [SESSION_STATE_RUNNING]


async def test_the_task_of_another_organization_is_not_found_and_a_viewer_may_not_command(room: Room) -> None:
    request = message(await room.task())

    bind_principal(Principal(user_id="usr_eve", organization_id="org_2", role=40))
    with pytest.raises(DomainError) as stranger:
        await room.database.write(room.sessions.send, request)
    bind_principal(Principal(user_id="usr_vi", organization_id="org_1", role=1))
    with pytest.raises(DomainError) as viewer:
        await room.database.write(room.sessions.send, request)

    assert (stranger.value.reason, viewer.value.reason) == ("RESOURCE_NOT_FOUND", "ROLE_REQUIRED")


async def test_the_token_of_a_command_is_one_that_reads_take_however_many_sessions_there_are(room: Room) -> None:  # F22
    task = (await room.task()).task
    names = [new_id("ses") for _ in range(63)]

    def add(opened: OpenTask) -> None:
        for name in names:
            opened.add_session(Session(id=name, task_id=task.id, display_name=name))

    await room.change(task.id, add)
    opened = await room.read(task.id)
    session = Session(id=names[-1], task_id=task.id, display_name="Other")
    renamed = await room.database.write(room.sessions.update, sessions_pb2.UpdateSessionRequest(session=session))

    for token in (opened.token(*opened.sessions), renamed.consistency_token):
        fresh = Consistency(at_least_as_fresh=[token])
        validate(tasks_pb2.GetTaskRequest(task_id=task.id, consistency=fresh))
    point = parse_consistency(Consistency(at_least_as_fresh=[renamed.consistency_token])).point
    assert {one.id: one.revision for one in point.entities} == {
        task.id: (await room.read(task.id)).task.revision,
        names[-1]: renamed.session.revision,
    }


async def test_words_of_events_are_cut_to_what_the_contract_takes(room: Room) -> None:
    task = await room.task()

    await room.change(task.task.id, lambda opened: opened.tell(EVENT_KIND_MESSAGE_SENT, "ä" * 3000))

    event = next(one for one in await room.marks(HistoryEvent) if one.summary.startswith("ä"))
    validate(event)
