"""Retry, archive, kill and delete: what is decided before their workflows run."""

from collections.abc import Callable
from typing import Any

import pytest
from branchline.v1 import sandboxes_pb2, sessions_pb2, tasks_pb2
from branchline.v1.history_pb2 import HistoryEvent
from branchline.v1.sessions_pb2 import TranscriptEntry
from branchline.v1.tasks_pb2 import Task, TaskStatus
from branchline_internal.sandbox.v1.sandbox_pb2 import AgentSession, DestroySandboxRequest
from branchline_internal.task.v1.task_pb2 import StartWorkflow

from services.runtime.database import Tx
from services.runtime.errors import DomainError
from services.task.deletion import Deletion
from services.task.lifecycle import END, PROVISION
from services.task.status import Status, status_name
from services.task.store import DELETE, DROPPED
from tests.unit.task.room import NOWHERE, Room, new_id, sandbox_of
from tests.unit.task.test_turns import send

ARCHIVED, KILLED = tasks_pb2.TASK_STATUS_ARCHIVED, tasks_pb2.TASK_STATUS_KILLED
KILLED_FOR_GOOD = {tasks_pb2.TASK_STATUS_KILLING, KILLED}
"""Nobody wants these undone; that the first becomes the second is the sweep's to see to."""

STATUSES = [status for status in TaskStatus.values() if status]


def commands(room: Room, task_id: str) -> list[Callable[[], Any]]:
    """Return every public command that may lead a task on."""
    given: dict[str, Any] = {"request_id": new_id(), "task_id": task_id}
    return [
        lambda: room.public.RetryTask(tasks_pb2.RetryTaskRequest(**given), NOWHERE),
        lambda: room.public.ArchiveTask(tasks_pb2.ArchiveTaskRequest(**given), NOWHERE),
        lambda: room.public.KillTask(tasks_pb2.KillTaskRequest(**given), NOWHERE),
    ]


@pytest.mark.parametrize("status", sorted(set(STATUSES) - KILLED_FOR_GOOD), ids=status_name)
async def test_from_every_status_a_public_command_leads_on(room: Room, status: Status) -> None:  # issue item 4
    ways: list[str] = []
    for place in range(3):
        task = await room.task(status)
        try:
            await commands(room, task.task.id)[place]()
        except DomainError:
            continue
        after = await room.read(task.task.id)
        if after.task.status != status or after.row.workflow:
            ways.append(status_name(after.task.status))
    assert ways


async def test_a_task_is_archived_with_its_turns_closed_and_its_queue_settled(room: Room) -> None:  # F29
    task = await room.task()
    await send(room, task)
    waiting = await send(room, task, queue=True)

    await room.public.ArchiveTask(tasks_pb2.ArchiveTaskRequest(request_id="a", task_id=task.task.id), NOWHERE)

    after = await room.read(task.task.id)
    assert (after.row.workflow, after.sessions[0].status) == (END, sessions_pb2.SESSION_STATUS_CLOSED)
    assert (await room.entry(waiting.id)).state == DROPPED
    late = AgentSession(
        session_id=task.sessions[0].id,
        task_id=task.task.id,
        status=sessions_pb2.SESSION_STATUS_IDLE,
        turn=1,
        revision=1,
    )
    assert await room.push(late) == {}
    assert (await room.read(task.task.id)).task.status == tasks_pb2.TASK_STATUS_ARCHIVING


@pytest.mark.parametrize("status", [tasks_pb2.TASK_STATUS_PENDING, tasks_pb2.TASK_STATUS_PROVISIONING])
async def test_a_session_that_never_began_is_closed_with_its_task(room: Room, status: Status) -> None:
    task = await room.task(status)
    await room.change(task.task.id, lambda task: task.stand(task.sessions[0], sessions_pb2.SESSION_STATUS_PENDING))

    await room.public.ArchiveTask(tasks_pb2.ArchiveTaskRequest(request_id="a", task_id=task.task.id), NOWHERE)

    assert [one.status for one in (await room.read(task.task.id)).sessions] == [sessions_pb2.SESSION_STATUS_CLOSED]


async def test_the_kill_of_an_archived_task_never_takes_its_branch_back(room: Room) -> None:  # F9, F23
    task = await room.task(ARCHIVED)

    await room.public.KillTask(tasks_pb2.KillTaskRequest(request_id="a", task_id=task.task.id), NOWHERE)

    events = [event for event in await room.marks(HistoryEvent) if event.task_id == task.task.id]
    assert [dict(event.details) for event in events] == [{"from": "archived", "to": "killed"}]
    assert (await room.read(task.task.id)).task.status == KILLED


async def test_a_retry_keeps_a_sandbox_with_work_in_it_and_leaves_one_that_is_gone(room: Room) -> None:
    kept, left = await room.task(), await room.task()
    for task in (kept, left):
        await send(room, task)
    await room.push(sandbox_of(kept, sandboxes_pb2.SANDBOX_STATUS_ERROR), sandbox_of(left, 5))

    for task in (kept, left):
        request = tasks_pb2.RetryTaskRequest(request_id=new_id(), task_id=task.task.id)
        await room.public.RetryTask(request, NOWHERE)

    assert (await room.read(kept.task.id)).task.active_sandbox_id == kept.task.active_sandbox_id
    assert (await room.read(left.task.id)).task.active_sandbox_id == ""
    gone = [one.sandbox_id for one in await room.marks(DestroySandboxRequest)]
    assert gone == [left.task.active_sandbox_id]


async def test_a_retry_begins_with_a_new_workflow_and_may_name_another_agent(room: Room) -> None:
    task = await room.task(tasks_pb2.TASK_STATUS_ERROR)
    request = tasks_pb2.RetryTaskRequest(request_id="r", task_id=task.task.id, agent="codex")

    first = await room.public.RetryTask(request, NOWHERE)
    again = await room.public.RetryTask(request, NOWHERE)

    after = await room.read(task.task.id)
    assert first == again
    assert (after.row.workflow, after.row.attempt, after.sessions[0].agent) == (PROVISION, 2, "codex")
    assert [one.attempt for one in await room.marks(StartWorkflow)] == [2]


async def test_a_task_is_removed_in_bounded_steps_and_told_as_deleted(room: Room) -> None:
    task, other = await room.task(), await room.task()
    said = [TranscriptEntry(id=f"ent_{number}", session_id=task.sessions[0].id, revision=1) for number in range(1100)]
    await room.push(*said)
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
    tombstone = next(one for one in await room.marks(Task) if one.id == task.task.id)
    assert tombstone.revision > task.task.revision
    assert await room.database.write(deletion.remove_part, task.task.id, attempt)
    late = TranscriptEntry(id="ent_late", session_id=task.sessions[0].id, revision=1)
    assert await room.push(late, sandbox_of(task, sandboxes_pb2.SANDBOX_STATUS_DESTROYED)) == {}


async def test_a_task_that_is_being_deleted_takes_no_commands(room: Room) -> None:
    task = await room.task(ARCHIVED)

    await room.database.write(lambda tx: _delete(room, tx, task.task.id))
    await room.database.write(lambda tx: _delete(room, tx, task.task.id))

    after = await room.read(task.task.id)
    assert (after.task.status, after.row.workflow, after.row.attempt) == (ARCHIVED, DELETE, 2)
    for command in commands(room, task.task.id):
        with pytest.raises(DomainError) as refused:
            await command()
        assert refused.value.reason == "BEING_DELETED"


def _delete(room: Room, tx: Tx, task_id: str) -> None:
    with room.store.open(tx, task_id) as task:
        room.lifecycle.delete(tx, task)
