"""Sessions are recorded at once and opened behind that; what can be changed of them, and of tasks."""

from typing import Any

import pytest
from branchline.v1 import common_pb2, sessions_pb2, tasks_pb2
from branchline.v1.agents_pb2 import Agent, AgentMode, AgentModel
from branchline.v1.sessions_pb2 import Session, SessionOptions
from branchline.v1.tasks_pb2 import Task
from branchline_internal.sandbox.v1.sandbox_pb2 import (
    AgentReport,
    AgentSession,
    CloseSessionRequest,
    OpenSessionRequest,
    StartTurnRequest,
)
from google.protobuf.field_mask_pb2 import FieldMask

from services.runtime.errors import DomainError
from services.runtime.failures import failed
from services.task import sessions
from services.task.open_task import OpenTask
from services.task.standing import ARCHIVED, FAILED, IDLE, QUEUED, RUNNING, TURN_FAILED, Standing
from tests.unit.task.room import NOWHERE, Room, new_id, request_id
from tests.unit.task.test_turns import broke, queue, send

PENDING, AT_REST, WORKS, BROKEN, CLOSED = (
    sessions_pb2.SESSION_STATE_PENDING,
    sessions_pb2.SESSION_STATE_IDLE,
    sessions_pb2.SESSION_STATE_RUNNING,
    sessions_pb2.SESSION_STATE_FAILED,
    sessions_pb2.SESSION_STATE_CLOSED,
)
NO_AGENT = failed(common_pb2.FAILURE_REASON_AGENT_NOT_STARTED, "it has no key")


async def create(room: Room, task: OpenTask, **fields: Any) -> Session:
    request = sessions_pb2.CreateSessionRequest(request_id=request_id(), task_id=task.task.id, **fields)
    answer = sessions_pb2.CreateSessionResponse
    return (await room.commands.run(request, answer, room.sessions.create, request)).session


async def refusal(call: Any) -> DomainError:
    with pytest.raises(DomainError) as refused:
        await call
    return refused.value


async def know(room: Room, task: OpenTask) -> None:
    """Let the sandbox say which agents it knows."""
    known = [
        Agent(id="claude", models=[AgentModel(id="opus")], modes=[AgentMode(id="plan")]),
        Agent(id="scripted"),
    ]
    sandbox_id, task_id = task.task.active_sandbox_id, task.task.id
    await room.push(AgentReport(sandbox_id=sandbox_id, task_id=task_id, agents=known, revision=1))


async def test_a_session_is_pending_at_once_and_its_agent_is_asked_for(room: Room) -> None:
    task = await room.task()

    session = await create(room, task, options=SessionOptions(model="opus", mode="plan"))

    assert (session.state, session.turn, session.revision) == (PENDING, 0, 1)
    assert (session.display_name, session.agent, session.etag != "") == ("Session 2", "scripted", True)
    assert await room.marks(OpenSessionRequest, "sandbox") == [
        OpenSessionRequest(
            sandbox_id=task.task.active_sandbox_id,
            session_id=session.id,
            agent="scripted",
            model="opus",
            mode="plan",
        )
    ]
    after = await room.read(task.task.id)
    assert [one.state for one in after.task.sessions] == [AT_REST, PENDING]
    assert after.standing == IDLE
    assert "SESSION_CREATED" in await room.events(task.task.id)


async def test_a_session_that_opens_is_idle_whoever_says_so_first(room: Room) -> None:
    task = await room.task()
    first, second = await create(room, task), await create(room, task)

    await room.change(task.task.id, lambda one: room.turns.opened(one, one.session(first.id)))
    await room.push(AgentSession(session_id=second.id, task_id=task.task.id, state=AT_REST, revision=1))
    await room.change(task.task.id, lambda one: room.turns.opened(one, one.session(second.id)))

    after = await room.read(task.task.id)
    assert [one.state for one in after.sessions] == [AT_REST] * 3
    assert after.session(second.id).revision == 2


async def test_a_session_that_does_not_open_has_failed_and_the_task_has_not(room: Room) -> None:
    task = await room.task()
    session = await create(room, task)

    await room.change(task.task.id, lambda one: room.turns.not_opened(one, one.session(session.id), NO_AGENT))

    after = await room.read(task.task.id)
    assert (after.session(session.id).state, after.session(session.id).failure) == (BROKEN, NO_AGENT)
    assert (after.standing, after.task.HasField("failure")) == (IDLE, False)
    assert "AGENT_FAILED" in await room.events(task.task.id)
    await send(room, after, session=1)
    assert (await room.read(task.task.id)).session(session.id).state == WORKS


async def test_a_message_to_a_session_that_is_being_opened_fails_with_it(room: Room) -> None:
    task = await room.task()
    session = await create(room, task)
    await send(room, await room.read(task.task.id), session=1)
    begun = await room.read(task.task.id)

    await room.change(task.task.id, lambda one: room.turns.not_opened(one, one.session(session.id), NO_AGENT))

    assert (begun.standing, begun.session(session.id).state) == (RUNNING, WORKS)
    after = await room.read(task.task.id)
    assert (after.standing, after.task.failure) == (TURN_FAILED, NO_AGENT)
    retry = sessions_pb2.RetryTurnRequest(task_id=task.task.id, session_id=session.id, turn=1)
    assert (await room.database.write(room.sessions.retry, retry)).session.turn == 2
    lanes = await room.outbox.listed(parked=False, destination="sandbox", after_seq=0, most=100)
    assert {row.entity_id for row in lanes} == {session.id}
    assert [row.type_url.rpartition(".")[2] for row in lanes] == ["OpenSessionRequest", "StartTurnRequest"]


@pytest.mark.parametrize("standing", [QUEUED, FAILED, ARCHIVED], ids=lambda one: one.name)
async def test_a_session_needs_a_task_with_a_sandbox(room: Room, standing: Standing) -> None:
    error = await refusal(create(room, await room.task(standing)))

    assert error.reason == ("STATE_FORBIDS" if standing == ARCHIVED else "TASK_NOT_READY")
    assert error.metadata["state"] == standing.name


async def test_what_the_sandbox_does_not_know_is_refused(room: Room) -> None:
    task = await room.task()
    await know(room, task)

    unknown = await refusal(create(room, task, options=SessionOptions(agent="gemini")))
    model = await refusal(create(room, task, options=SessionOptions(agent="claude", model="haiku")))
    mode = await refusal(create(room, task, options=SessionOptions(agent="claude", mode="yolo")))

    assert [one.reason for one in (unknown, model, mode)] == ["AGENT_UNKNOWN"] * 3
    assert unknown.metadata == {"field": "options.agent", "agent": "gemini", "agents": "claude, scripted"}
    assert [one.metadata["field"] for one in (model, mode)] == ["options.model", "options.mode"]
    assert (
        await create(room, task, options=SessionOptions(agent="claude", model="opus", mode="plan"))
    ).agent == "claude"
    assert (await create(room, task, options=SessionOptions(model="any"))).model == "any"


async def test_a_task_has_at_most_64_sessions(room: Room) -> None:
    task = await room.task(sessions=sessions.MOST)

    error = await refusal(create(room, task))

    assert (error.reason, error.metadata) == ("QUOTA_EXCEEDED", {"limit": "sessions"})


async def rename(
    room: Room, session: Session, name: str, etag: str = "", paths: tuple[str, ...] = ("display_name",)
) -> sessions_pb2.UpdateSessionResponse:
    given = Session(id=session.id, task_id=session.task_id, display_name=name, etag=etag)
    request = sessions_pb2.UpdateSessionRequest(session=given, update_mask=FieldMask(paths=paths))
    return await room.database.write(room.sessions.update, request)


async def test_a_session_is_renamed_and_its_etag_follows_its_name_alone(room: Room) -> None:
    task = await room.task()
    held = task.sessions[0]
    await send(room, task)
    worked = (await room.read(task.task.id)).sessions[0]

    renamed = (await rename(room, held, "Other", etag=held.etag)).session

    assert worked.etag == held.etag != renamed.etag
    assert renamed.display_name == "Other"
    assert (await refusal(rename(room, held, "Third", etag=held.etag))).reason == "ETAG_MISMATCH"
    assert (await refusal(rename(room, held, " "))).reason == "FIELD_INVALID"
    assert (await refusal(rename(room, held, "x", paths=("state",)))).metadata["field"] == "update_mask"
    assert (await room.read(task.task.id)).task.sessions[0].display_name == "Other"


async def test_a_name_that_is_the_same_changes_nothing(room: Room) -> None:
    task = await room.task()

    same = (await rename(room, task.sessions[0], "Session 1")).session

    assert same == task.sessions[0]
    assert "SESSION_UPDATED" not in await room.events(task.task.id)


async def test_a_task_gets_another_title_and_its_etag_follows_that_alone(room: Room) -> None:
    task = await room.task()

    async def retitle(title: str, etag: str = "", *paths: str) -> Task:
        given = Task(id=task.task.id, title=title, etag=etag)
        request = tasks_pb2.UpdateTaskRequest(task=given, update_mask=FieldMask(paths=paths))
        answer = await room.public.UpdateTask(request, NOWHERE)
        assert answer.consistency_token
        return answer.task

    await send(room, task)
    titled = await retitle("Better", task.task.etag)

    assert (titled.title, titled.state) == ("Better", tasks_pb2.TASK_STATE_ACTIVE)
    assert titled.etag != task.task.etag
    assert (await refusal(retitle("Third", task.task.etag))).reason == "ETAG_MISMATCH"
    assert (await refusal(retitle(" "))).reason == "FIELD_INVALID"
    assert (await refusal(retitle("x", "", "branch"))).metadata["field"] == "update_mask"
    assert (await room.read(task.task.id)).task == titled


async def test_a_session_that_was_closed_is_opened_again_by_its_next_message(room: Room) -> None:
    task = await room.task()
    this: dict[str, str] = {"task_id": task.task.id, "session_id": task.sessions[0].id}
    await room.database.write(room.sessions.close, sessions_pb2.CloseSessionRequest(**this))

    closed = await refusal(send(room, task))
    reopened = await room.database.write(room.sessions.reopen, sessions_pb2.ReopenSessionRequest(**this))
    await send(room, task)

    assert closed.reason == "SESSION_CLOSED"
    assert reopened.session.state == AT_REST
    assert len(await room.marks(CloseSessionRequest)) == len(await room.marks(StartTurnRequest)) == 1


async def test_a_session_that_works_is_not_closed(room: Room) -> None:
    task = await room.task()
    await send(room, task)
    request = sessions_pb2.CloseSessionRequest(task_id=task.task.id, session_id=task.sessions[0].id)

    error = await refusal(room.database.write(room.sessions.close, request))

    assert (error.reason, error.metadata) == ("SESSION_WORKING", {"session_id": task.sessions[0].id})


async def test_the_histories_of_a_task_tell_who_did_what(room: Room) -> None:
    task = await room.task()
    await send(room, task)
    await queue(room, task)
    await room.push(broke(task))

    told = await room.events(task.task.id)

    assert [one for one in told if one != "TASK_STATE_CHANGED"] == ["MESSAGE_SENT", "MESSAGE_SENT", "AGENT_FAILED"]


async def test_a_session_that_is_not_there_is_not_found(room: Room) -> None:
    task = await room.task()
    strange = Session(id=new_id("ses"), task_id=task.task.id)

    assert (await refusal(rename(room, strange, "x"))).reason == "RESOURCE_NOT_FOUND"
