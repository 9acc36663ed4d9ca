"""Deletion of a repository: to its end, in bounded steps, whatever happens on the way."""

import asyncio
from datetime import timedelta
from itertools import pairwise

import grpc
import pytest
from branchline.v1 import history_pb2, tasks_pb2
from branchline.v1.history_pb2 import HistoryEvent
from branchline.v1.repositories_pb2 import Branch, Repository
from branchline.v1.sandboxes_pb2 import Sandbox
from branchline.v1.sessions_pb2 import Session
from branchline.v1.tasks_pb2 import BranchChoice, Task, TaskSummary
from branchline.v1.transcripts_pb2 import TranscriptEntry
from branchline.v1.watches_pb2 import CHANGE_TYPE_DELETED
from branchline_internal.repository.v1.repository_pb2 import DeleteRepositoryRequest, EnsureRepositoryRequest
from branchline_internal.repository.v1.repository_pb2_grpc import RepositoryServiceStub
from branchline_internal.task.v1.task_pb2 import DeleteTaskRequest
from sqlalchemy import func, select

from services.repository.deletion import TELL_AGAIN_SECONDS
from services.repository.downward import TO_TASK
from services.repository.store import REPOSITORIES
from services.repository.tables import WATCHED, branches, transcript_entries
from services.repository.workbench import BURIED_AT_ONCE
from services.runtime.database import Reader, Statement
from services.runtime.errors import FailedPrecondition, NotFound
from services.runtime.principal import Principal
from tests.unit.repository.conftest import (
    MARKED,
    PRINCIPAL,
    Owner,
    Room,
    Running,
    eventually,
    newer,
    running_repository,
)

_BRANCHES = Statement(select(func.count()).select_from(branches))
_ENTRIES_LEFT = Statement(
    select(func.count()).select_from(transcript_entries).where(transcript_entries.c.deleted.is_(False))
)


async def finish(room: Room) -> int:
    steps = 0
    while await room.database.write(room.deletion.step):
        steps += 1
    return steps


async def delete(room: Room, repository_id: str = "repo_1") -> None:
    await room.database.write(room.deletion.begin, repository_id)


async def test_every_task_is_told_also_the_ended_ones_a_hundred_at_a_time(room: Room) -> None:
    await room.add_repository()
    tasks = [await room.create(branch=f"b{number}") for number in range(130)]
    await room.push(newer(tasks[0], state=tasks_pb2.TASK_STATE_ARCHIVED))

    await delete(room)
    await room.database.write(room.deletion.step)
    first = len(await room.marked(DeleteTaskRequest, TO_TASK))
    await finish(room)

    assert first == 100
    assert {one.task_id for one, _ in await room.marked(DeleteTaskRequest, TO_TASK)} == {task.id for task in tasks}
    ((repository, deleted),) = await room.marked(Repository)
    assert repository.HasField("delete_time")
    assert not deleted


async def test_what_is_being_deleted_takes_no_new_task(room: Room) -> None:
    await room.add_repository()
    await room.create()
    await delete(room)

    with pytest.raises(FailedPrecondition) as refused:
        await room.create()

    assert refused.value.reason == "BEING_DELETED"


async def test_a_deleted_task_leaves_tombstones_a_summary_and_an_event(room: Room) -> None:
    await room.add_repository()
    task, other = await room.create(branch="a"), await room.create(branch="b")
    await room.push(
        Sandbox(id="sbx_1", task_id=task.id, revision=1),
        *(
            TranscriptEntry(id=f"ent_{n}", task_id=task.id, session_id="ses_1", position=n, revision=1)
            for n in range(3)
        ),
    )
    await delete(room)
    await finish(room)
    before = await room.database.read(room.index.present, task.id)

    await room.push(newer(task), deleted=True)
    await finish(room)

    kinds = [table.kind for table in WATCHED]
    pages = [page async for page in room.index.catch_up(task.id, kinds, before, "")]
    changes = {change.id: change for page in pages for change in page.changes}
    assert changes.keys() == {task.id, task.sessions[0].id, "sbx_1", "ent_0", "ent_1", "ent_2"}
    assert {change.type for change in changes.values()} == {CHANGE_TYPE_DELETED}
    assert [
        Task.FromString(changes[task.id].entity),
        Session.FromString(changes[task.sessions[0].id].entity),
        Sandbox.FromString(changes["sbx_1"].entity),
        TranscriptEntry.FromString(changes["ent_1"].entity),
    ] == [
        Task(id=task.id),
        Session(id=task.sessions[0].id, task_id=task.id),
        Sandbox(id="sbx_1", task_id=task.id),
        TranscriptEntry(id="ent_1", session_id="ses_1", position=1, task_id=task.id),
    ]
    with pytest.raises(NotFound):
        await room.database.read(room.workbench.task, task.id, PRINCIPAL)
    assert await room.place(task.id) is None
    assert {one.id: deleted for one, deleted in await room.marked(TaskSummary)} == {task.id: True, other.id: False}
    events = [one for one, _ in await room.marked(HistoryEvent) if one.kind == history_pb2.EVENT_KIND_TASK_DELETED]
    assert [(one.task_id, one.repository_id) for one in events] == [(task.id, "repo_1")]
    assert await room.database.read(REPOSITORIES.get, "repo_1")


async def test_a_long_transcript_is_buried_in_bounded_steps(room: Room) -> None:
    await room.add_repository()
    task = await room.create()
    count = BURIED_AT_ONCE * 2 + 1
    await room.push(
        *(TranscriptEntry(id=f"e{n}", task_id=task.id, session_id="s", position=n, revision=1) for n in range(count))
    )

    await room.push(newer(task), deleted=True)

    left = [await room.database.read(Reader.value, _ENTRIES_LEFT)]
    while await room.database.write(room.deletion.step):
        left.append(await room.database.read(Reader.value, _ENTRIES_LEFT))
    assert [before - after for before, after in pairwise(left)] == [
        BURIED_AT_ONCE,
        BURIED_AT_ONCE,
        1,
        0,
    ]


async def test_with_its_last_task_the_repository_goes_and_nothing_late_bears_it_again(room: Room) -> None:
    given = Repository(id="repo_1", organization_id="org_1", display_name="acme/shop", revision=1)
    report = EnsureRepositoryRequest(repository=given, github=True, branches=[Branch(name="main")], github_revision=1)
    await room.database.write(room.store.ensure, report)
    tasks = [await room.create(branch=name) for name in ("a", "b")]
    await delete(room)
    await finish(room)

    await room.push(newer(tasks[0]), deleted=True)
    await finish(room)
    assert [deleted for _, deleted in await room.marked(Repository)] == [False]
    await room.push(newer(tasks[1]), deleted=True)
    await finish(room)

    ((repository, deleted),) = await room.marked(Repository)
    assert deleted
    assert (repository.id, repository.organization_id) == ("repo_1", "org_1")
    report.github_revision = 2
    await room.database.write(room.store.ensure, report)
    assert await room.database.read(REPOSITORIES.find, "repo_1") is None
    assert await room.database.read(Reader.value, _BRANCHES) == 0


async def test_what_comes_late_of_a_deleted_task_is_ignored(room: Room) -> None:  # F23
    await room.add_repository()
    task = await room.create()
    session = Session(id="ses_late", task_id=task.id, revision=1)
    await room.push(newer(task), deleted=True)

    while_it_is_buried = await room.push(session, newer(newer(task)))
    await finish(room)
    once_it_is = await room.push(session, newer(newer(task)), Sandbox(id="sbx", task_id=task.id, revision=1))

    assert (while_it_is_buried, once_it_is) == ({}, {})
    assert (await room.database.read(room.workbench.sessions, task.id, "", 100)).found == []
    assert await room.place(task.id) is None


async def test_deleting_twice_is_no_error_and_what_never_was_is_not_found(room: Room) -> None:
    await room.add_repository()
    await room.create()
    await delete(room)
    await delete(room)
    await finish(room)

    ((repository, _),) = await room.marked(Repository)
    assert repository.revision == 3  # born, touched by its task, being deleted
    with pytest.raises(NotFound):
        await delete(room, "repo_never")


async def test_a_task_that_its_owner_never_knew_or_forgot_can_be_deleted(room: Room) -> None:
    await room.add_repository()
    unborn, forgotten = await room.create(branch="a"), await room.create(branch="b")
    await room.push(newer(newer(newer(forgotten))))

    refused = await room.push(Task(id=unborn.id, revision=2), Task(id=forgotten.id, revision=2), deleted=True)
    await finish(room)

    assert refused == {}
    assert [await room.place(task.id) for task in (unborn, forgotten)] == [None, None]
    gone = {
        one.id: (deleted, one.organization_id, one.repository_id) for one, deleted in await room.marked(TaskSummary)
    }
    assert gone == dict.fromkeys((unborn.id, forgotten.id), (True, "org_1", "repo_1"))


async def test_a_task_that_is_still_there_is_told_again(room: Room) -> None:
    await room.add_repository()
    await room.create()
    await delete(room)
    await finish(room)
    told = await room.database.read(_told)
    assert await finish(room) == 0

    room.ahead.append(timedelta(seconds=TELL_AGAIN_SECONDS + 1))
    await finish(room)

    assert await room.database.read(_told) > told


def _told(tx: Reader) -> int:
    return max(row.seq for row in tx.rows(MARKED) if row.destination == TO_TASK and "DeleteTask" in row.type_url)


async def test_a_running_service_deletes_to_the_end(running: Running) -> None:
    await running.add_repository()
    tasks = [await running.create(branch=BranchChoice(new_branch=name)) for name in ("a", "b")]
    await running.stub(
        RepositoryServiceStub, Principal(service="organization", organization_id="org_1")
    ).DeleteRepository(DeleteRepositoryRequest(repository_id="repo_1"))

    await eventually(lambda: set(running.owner.deleted) == {task.id for task in tasks})
    await running.push(*map(newer, tasks), deleted=True)
    refused = [await refusal(running)]
    while refused[-1] != grpc.StatusCode.NOT_FOUND:
        refused.append(await refusal(running))

    assert set(refused) <= {grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.NOT_FOUND}


async def test_a_repository_goes_although_the_owner_of_its_tasks_does_not_know_them(running: Running) -> None:
    await running.add_repository()
    await running.create()
    running.owner.knows = False

    await running.stub(
        RepositoryServiceStub, Principal(service="organization", organization_id="org_1")
    ).DeleteRepository(DeleteRepositoryRequest(repository_id="repo_1"))
    async with asyncio.timeout(20):
        while await refusal(running) != grpc.StatusCode.NOT_FOUND:  # noqa: ASYNC110 - nothing tells when it has gone
            await asyncio.sleep(0.05)


async def refusal(running: Running) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await running.create()
    return refused.value.code()


async def test_a_deletion_goes_on_after_a_restart(url: str) -> None:
    silent = Owner()
    async with running_repository(url, silent) as running:
        await running.add_repository()
        task: Task = await running.create()
        organization = Principal(service="organization", organization_id="org_1")
        await running.stub(RepositoryServiceStub, organization).DeleteRepository(
            DeleteRepositoryRequest(repository_id="repo_1")
        )
    owner = Owner()
    owner.ready.set()

    async with running_repository(url, owner):
        await eventually(lambda: owner.deleted == [task.id])

    assert [one.task.id for one in owner.created] == [task.id]
