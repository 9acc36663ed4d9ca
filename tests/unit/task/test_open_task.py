"""An open task writes each row once, whatever was done to it. C5."""

from typing import Any

import pytest
from branchline.v1 import sessions_pb2, tasks_pb2
from branchline.v1.sessions_pb2 import Session
from branchline.v1.tasks_pb2 import Task
from branchline_internal.sandbox.v1.sandbox_pb2 import StartTurnRequest

from services.runtime.errors import DomainError
from services.runtime.principal import Principal, bind_principal
from services.runtime.spine.tokens import parse_consistency_token
from services.runtime.validation import validate
from services.task.open_task import OpenTask
from tests.unit.task.room import Room, new_id


def message(task: OpenTask, **fields: Any) -> sessions_pb2.SendMessageRequest:
    given: dict[str, Any] = {"text": "go on", **fields}
    return sessions_pb2.SendMessageRequest(
        request_id=new_id(), task_id=task.task.id, session_id=task.sessions[0].id, **given
    )


async def test_whatever_is_changed_gets_one_revision_and_one_mark(room: Room) -> None:  # C5
    task = await room.task()
    session = task.sessions[0]
    before = len(await room.marks(Task))

    def change(opened: OpenTask) -> None:
        opened.move(tasks_pb2.TASK_STATUS_RUNNING)
        opened.move(tasks_pb2.TASK_STATUS_WAITING, "asks")
        opened.sessions[0].name = "Other"
        opened.change_session(opened.sessions[0])
        opened.stand(opened.sessions[0], opened.sessions[0].status, "a reason")

    await room.change(task.task.id, change)

    after = await room.read(task.task.id)
    assert after.task.revision == task.task.revision + 1
    assert after.sessions[0].revision == session.revision + 1
    assert len(await room.marks(Task)) == before
    assert after.task.sessions[0].name == "Other"


async def test_nothing_is_written_when_nothing_was_changed_or_the_block_raises(room: Room) -> None:
    task = await room.task()
    written = room.database.statements

    await room.change(task.task.id, lambda opened: None)
    with pytest.raises(ZeroDivisionError):
        await room.change(task.task.id, lambda opened: (opened.move(tasks_pb2.TASK_STATUS_RUNNING), 1 / 0))

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
    assert [one.status for one in await room.marks(Session)] == [3]


async def test_the_task_of_another_organization_is_not_found_and_a_viewer_may_not_command(room: Room) -> None:
    request = message(await room.task())

    bind_principal(Principal(user_id="usr_eve", organization_id="org_2", role=40))
    with pytest.raises(DomainError) as stranger:
        await room.database.write(room.sessions.send, request)
    bind_principal(Principal(user_id="usr_vi", organization_id="org_1", role=1))
    with pytest.raises(DomainError) as viewer:
        await room.database.write(room.sessions.send, request)

    assert (stranger.value.reason, viewer.value.reason) == ("NOT_FOUND", "ROLE_REQUIRED")


async def test_the_token_of_a_command_is_one_that_reads_take_however_many_sessions_there_are(room: Room) -> None:  # F22
    task = (await room.task()).task
    names = [new_id() for _ in range(199)]

    def add(opened: OpenTask) -> None:
        for name in names:
            opened.add_session(Session(id=f"ses_{name}", task_id=task.id, name=name))

    await room.change(task.id, add)
    opened = await room.read(task.id)
    rename = sessions_pb2.RenameSessionRequest(
        request_id=new_id(), task_id=task.id, session_id=f"ses_{names[-1]}", name="Other"
    )
    renamed = await room.database.write(room.sessions.rename, rename)

    for token in (opened.token(*opened.sessions), renamed.consistency_token):
        validate(tasks_pb2.GetTaskRequest(task_id=task.id, consistency_token=token))
    point = parse_consistency_token(renamed.consistency_token)
    assert {one.id: one.revision for one in point.entities} == {
        task.id: (await room.read(task.id)).task.revision,
        f"ses_{names[-1]}": renamed.session.revision,
    }
