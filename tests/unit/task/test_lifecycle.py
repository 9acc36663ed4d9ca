"""Retry, archive, kill and delete: what is decided before their workflows run."""

from collections.abc import Callable
from typing import Any

import pytest
from branchline.v1 import sandboxes_pb2, sessions_pb2, tasks_pb2
from branchline.v1.history_pb2 import HistoryEvent
from branchline.v1.sessions_pb2 import SessionOptions
from branchline.v1.tasks_pb2 import Task
from branchline.v1.transcripts_pb2 import TranscriptEntry
from branchline_internal.sandbox.v1.sandbox_pb2 import AgentReport, AgentSession, DestroySandboxRequest
from branchline_internal.task.v1.task_pb2 import StartWorkflow
from sqlalchemy import bindparam, func, select

from services.runtime.database import Statement, Tx
from services.runtime.errors import DomainError
from services.task.deletion import Deletion
from services.task.lifecycle import END, PROVISION
from services.task.open_task import OpenTask
from services.task.standing import (
    ARCHIVED,
    ARCHIVING,
    FAILED,
    KILLED,
    KILLING,
    PROVISIONING,
    QUEUED,
    TRANSITIONS,
    TURN_FAILED,
    Standing,
)
from services.task.store import DELETE, REPORTS
from services.task.tables import input_requests, queued_messages
from tests.unit.task.room import NOWHERE, Room, request_id, sandbox_of
from tests.unit.task.test_inputs import request_of
from tests.unit.task.test_turns import queue, send

KILLED_FOR_GOOD = {KILLING, KILLED}
"""Nobody wants these undone; that the first becomes the second is the sweep's to see to."""

_COUNTS = [
    Statement(select(func.count()).where(table.c.task_id == bindparam("of")))
    for table in (queued_messages, input_requests)
]
LED_ON = sorted(set(TRANSITIONS) - KILLED_FOR_GOOD)


def commands(room: Room, task_id: str) -> list[Callable[[], Any]]:
    """Return every public command that may lead a task on."""
    given: dict[str, Any] = {"request_id": request_id(), "task_id": task_id}
    return [
        lambda: room.public.RetryProvisioning(tasks_pb2.RetryProvisioningRequest(**given), NOWHERE),
        lambda: room.public.ArchiveTask(tasks_pb2.ArchiveTaskRequest(**given), NOWHERE),
        lambda: room.public.KillTask(tasks_pb2.KillTaskRequest(**given), NOWHERE),
    ]


@pytest.mark.parametrize("standing", LED_ON, ids=lambda one: one.name)
async def test_from_every_standing_a_public_command_leads_on(room: Room, standing: Standing) -> None:  # issue item 4
    ways: list[str] = []
    for place in range(3):
        task = await room.task(standing)
        try:
            await commands(room, task.task.id)[place]()
        except DomainError:
            continue
        after = await room.read(task.task.id)
        if after.standing != standing or after.row.workflow:
            ways.append(after.standing.name)
    assert ways


async def test_a_task_is_archived_with_its_turns_closed_and_its_queue_settled(room: Room) -> None:  # F29
    task = await room.task()
    await send(room, task)
    await queue(room, task)

    await room.public.ArchiveTask(tasks_pb2.ArchiveTaskRequest(request_id=request_id(), task_id=task.task.id), NOWHERE)

    after = await room.read(task.task.id)
    assert (after.row.workflow, after.sessions[0].state) == (END, sessions_pb2.SESSION_STATE_CLOSED)
    assert await room.queued(task.task.id) == []
    late = AgentSession(
        session_id=task.sessions[0].id,
        task_id=task.task.id,
        state=sessions_pb2.SESSION_STATE_IDLE,
        turn=1,
        revision=1,
    )
    assert await room.push(late) == {}
    assert (await room.read(task.task.id)).standing == ARCHIVING


@pytest.mark.parametrize("standing", [QUEUED, PROVISIONING, FAILED], ids=lambda one: one.name)
async def test_a_session_that_never_began_is_closed_with_its_task(room: Room, standing: Standing) -> None:
    task = await room.task(standing)
    await room.change(task.task.id, lambda one: one.stand(one.sessions[0], sessions_pb2.SESSION_STATE_PENDING))

    await room.public.ArchiveTask(tasks_pb2.ArchiveTaskRequest(request_id=request_id(), task_id=task.task.id), NOWHERE)

    assert [one.state for one in (await room.read(task.task.id)).sessions] == [sessions_pb2.SESSION_STATE_CLOSED]


async def test_the_kill_of_an_archived_task_never_takes_its_branch_back(room: Room) -> None:  # F9, F23
    task = await room.task(ARCHIVED)

    await room.public.KillTask(tasks_pb2.KillTaskRequest(request_id=request_id(), task_id=task.task.id), NOWHERE)

    events = [event for event in await room.marks(HistoryEvent) if event.task_id == task.task.id]
    assert [dict(event.details) for event in events] == [{"from": "archived", "to": "killed"}]
    assert (await room.read(task.task.id)).standing == KILLED


async def test_a_retry_keeps_a_sandbox_with_work_in_it_and_leaves_one_that_is_gone(room: Room) -> None:
    kept, left = await room.task(), await room.task()
    for task in (kept, left):
        await send(room, task)
    await room.push(sandbox_of(kept, sandboxes_pb2.SANDBOX_STATE_FAILED), sandbox_of(left, 5))

    for task in (kept, left):
        request = tasks_pb2.RetryProvisioningRequest(request_id=request_id(), task_id=task.task.id)
        await room.public.RetryProvisioning(request, NOWHERE)

    assert (await room.read(kept.task.id)).task.active_sandbox_id == kept.task.active_sandbox_id
    assert (await room.read(left.task.id)).task.active_sandbox_id == ""
    gone = [one.sandbox_id for one in await room.marks(DestroySandboxRequest)]
    assert gone == [left.task.active_sandbox_id]


async def test_a_retry_begins_with_a_new_workflow_and_may_name_another_agent(room: Room) -> None:
    task = await room.task(FAILED)
    await room.change(task.task.id, lambda one: _prefer(one, "opus"))
    options = SessionOptions(agent="codex", mode="plan")
    request = tasks_pb2.RetryProvisioningRequest(request_id=request_id(), task_id=task.task.id, session=options)

    first = await room.public.RetryProvisioning(request, NOWHERE)
    again = await room.public.RetryProvisioning(request, NOWHERE)

    after = await room.read(task.task.id)
    assert first == again
    assert (after.row.workflow, after.row.attempt, after.standing) == (PROVISION, 2, QUEUED)
    chosen = after.sessions[0]
    assert (chosen.agent, chosen.model, chosen.mode) == ("codex", "", "plan")
    assert after.task.sessions[0].agent == "codex"
    assert [one.attempt for one in await room.marks(StartWorkflow)] == [2]


async def test_what_is_not_said_of_the_first_session_is_kept_at_a_retry(room: Room) -> None:
    task = await room.task(FAILED)
    await room.change(task.task.id, lambda one: _prefer(one, "opus"))

    for options in (None, SessionOptions(mode="plan"), SessionOptions(agent="scripted")):
        await room.change(task.task.id, _fail)
        request = tasks_pb2.RetryProvisioningRequest(task_id=task.task.id, session=options)
        await room.public.RetryProvisioning(request, NOWHERE)

    kept = (await room.read(task.task.id)).sessions[0]
    assert (kept.agent, kept.model, kept.mode) == ("scripted", "opus", "plan")


async def test_only_a_task_without_a_sandbox_that_works_is_provisioned_again(room: Room) -> None:
    task = await room.task(TURN_FAILED)

    with pytest.raises(DomainError) as refused:
        await commands(room, task.task.id)[0]()

    assert refused.value.reason == "STATE_FORBIDS"
    assert refused.value.metadata == {"state": "turn_failed", "allowed_states": "failed"}


async def test_a_retry_keeps_what_waits(room: Room) -> None:
    task = await room.task(FAILED)
    waiting = await queue(room, task)

    await commands(room, task.task.id)[0]()

    assert await room.queued(task.task.id) == [waiting]


async def test_a_task_is_removed_in_bounded_steps_and_told_as_deleted(room: Room) -> None:
    task, other = await room.task(), await room.task()
    said = [TranscriptEntry(id=f"ent_{number}", session_id=task.sessions[0].id, revision=1) for number in range(1100)]
    await room.push(*said)
    await send(room, task)
    agents = AgentReport(sandbox_id=task.task.active_sandbox_id, task_id=task.task.id, revision=1)
    await room.push(request_of(task), agents)
    await send(room, other)
    await room.database.write(lambda tx: _delete(room, tx, task.task.id))
    attempt = (await room.read(task.task.id)).row.attempt
    deletion = Deletion(room.store)

    parts = 1
    while not await room.database.write(deletion.remove_part, task.task.id, attempt):
        parts += 1

    assert parts == 4
    assert await room.database.read(room.store.find, task.task.id) is None
    assert (await room.read(other.task.id)).sessions[0].turn == 1
    assert await room.database.read(lambda tx: REPORTS.find(tx, task.task.active_sandbox_id)) is None
    assert await _rows(room, task.task.id) == 0
    tombstone = next(one for one in await room.marks(Task) if one.id == task.task.id)
    assert tombstone.revision > task.task.revision
    assert await room.database.write(deletion.remove_part, task.task.id, attempt)
    late = TranscriptEntry(id="ent_late", session_id=task.sessions[0].id, revision=1)
    assert await room.push(late, sandbox_of(task, sandboxes_pb2.SANDBOX_STATE_DESTROYED)) == {}


async def test_a_task_that_is_being_deleted_takes_no_commands(room: Room) -> None:
    task = await room.task(ARCHIVED)

    await room.database.write(lambda tx: _delete(room, tx, task.task.id))
    await room.database.write(lambda tx: _delete(room, tx, task.task.id))

    after = await room.read(task.task.id)
    assert (after.standing, after.row.workflow, after.row.attempt) == (ARCHIVED, DELETE, 2)
    for command in commands(room, task.task.id):
        with pytest.raises(DomainError) as refused:
            await command()
        assert refused.value.reason == "BEING_DELETED"


def _delete(room: Room, tx: Tx, task_id: str) -> None:
    with room.store.open(tx, task_id) as task:
        room.lifecycle.delete(tx, task)


async def _rows(room: Room, task_id: str) -> int:
    """Count what is left of a task beside transcripts and sessions."""
    found = await room.database.read(lambda tx: [tx.value(statement, {"of": task_id}) for statement in _COUNTS])
    return sum(found)


def _prefer(task: OpenTask, model: str) -> None:
    task.sessions[0].model = model
    task.change_session(task.sessions[0])


def _fail(task: OpenTask) -> None:
    task.task.state, task.task.activity = FAILED
    task.change()
