"""Reads and watches of one task: in pages with bounds, for its organization alone."""

import asyncio
from typing import Any

import grpc
import pytest
from branchline.v1 import vocabulary_pb2 as words
from branchline.v1 import watches_pb2
from branchline.v1.repositories_pb2 import GetRepositoryOverviewRequest
from branchline.v1.repositories_pb2_grpc import RepositoryServiceStub as PublicRepositoryServiceStub
from branchline.v1.sessions_pb2 import ListTranscriptRequest, TranscriptEntry
from branchline.v1.sessions_pb2_grpc import SessionServiceStub
from branchline.v1.tasks_pb2 import GetTaskRequest, Task
from branchline.v1.tasks_pb2_grpc import TaskServiceStub
from branchline_internal.repository.v1.repository_pb2 import WatchIndexRequest
from branchline_internal.repository.v1.repository_pb2_grpc import RepositoryServiceStub
from branchline_internal.spine.v1.push_pb2 import WatchSelection

from services.repository.tables import SNAPSHOT_ENTRIES, WATCHED
from services.runtime.principal import Principal
from services.runtime.spine.chunks import PART_BYTES
from services.runtime.spine.tokens import consistency_token
from tests.unit.repository.conftest import Room, Running, newer

STRANGER = Principal(user_id="usr_2", organization_id="org_2", role=10, default_agent="mock")
SYNCED = watches_pb2.WATCH_FRAME_KIND_SYNCED


def said(task: Task, count: int, size: int = 10) -> list[TranscriptEntry]:
    session_id = task.sessions[0].id
    return [
        TranscriptEntry(id=f"ent_{n}", task_id=task.id, session_id=session_id, position=n, revision=1, text="x" * size)
        for n in range(1, count + 1)
    ]


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value.code(), error.value.details() or ""


async def watched(running: Running, task_id: str, principal: Principal, **selection: Any) -> list[Any]:
    request = WatchIndexRequest(task_id=task_id, selection=WatchSelection(until_synced=True, **selection))
    return [answer.frame async for answer in running.stub(RepositoryServiceStub, principal).WatchIndex(request)]


async def test_a_transcript_is_paged_by_number_and_by_bytes(running: Running) -> None:  # F22
    await running.add_repository()
    task = await running.create()
    await running.push(*said(task, 7, size=300_000))
    request = ListTranscriptRequest(task_id=task.id, session_id=task.sessions[0].id, page_size=5)
    sessions = running.stub(SessionServiceStub)

    pages: list[list[int]] = []
    while True:
        answer = await sessions.ListTranscript(request)
        assert answer.ByteSize() <= PART_BYTES + 1000
        pages.append([entry.position for entry in answer.entries])
        request.page_token = answer.next_page_token
        if not request.page_token:
            break

    assert pages == [[1, 2, 3], [4, 5, 6], [7]]


async def test_a_page_token_is_good_for_its_own_request_alone(running: Running) -> None:
    await running.add_repository()
    task, other = await running.create(), await running.create()
    await running.push(*said(task, 3))
    sessions = running.stub(SessionServiceStub)
    first = await sessions.ListTranscript(
        ListTranscriptRequest(task_id=task.id, session_id=task.sessions[0].id, page_size=1)
    )

    for token in (first.next_page_token, "17", "AAAA", "ä"):
        elsewhere = ListTranscriptRequest(task_id=other.id, session_id=other.sessions[0].id, page_token=token)
        code, _ = await refused(sessions.ListTranscript(elsewhere))
        assert code == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_session_of_another_task_has_no_transcript_here(running: Running) -> None:
    await running.add_repository()
    task, other = await running.create(), await running.create()

    request = ListTranscriptRequest(task_id=task.id, session_id=other.sessions[0].id)

    code, _ = await refused(running.stub(SessionServiceStub).ListTranscript(request))
    assert code == grpc.StatusCode.NOT_FOUND


async def test_nothing_of_another_organization_is_there(running: Running) -> None:
    await running.add_repository()
    task = await running.create()
    session_id = task.sessions[0].id

    answers = [
        await refused(running.stub(TaskServiceStub, STRANGER).GetTask(GetTaskRequest(task_id=task.id))),
        await refused(
            running.stub(SessionServiceStub, STRANGER).ListTranscript(
                ListTranscriptRequest(task_id=task.id, session_id=session_id)
            )
        ),
        await refused(
            running.stub(PublicRepositoryServiceStub, STRANGER).GetRepositoryOverview(
                GetRepositoryOverviewRequest(repository_id="repo_1")
            )
        ),
        await refused(watched(running, task.id, STRANGER)),
        await refused(watched(running, "task_none", STRANGER)),
    ]

    assert {code for code, _ in answers} == {grpc.StatusCode.NOT_FOUND}


async def test_a_consistency_token_tells_nothing_of_another_organization(running: Running) -> None:  # F31
    await running.add_repository()
    await running.add_repository("repo_2", "org_2")
    theirs = await running.create()
    own = await running.create(STRANGER, repository_id="repo_2")
    tasks = running.stub(TaskServiceStub, STRANGER)

    def reading(*entities: tuple[words.EntityKind.ValueType, str, int]) -> Any:
        token = consistency_token(entities)
        return refused(tasks.GetTask(GetTaskRequest(task_id=own.id, consistency_token=token), timeout=0.8))

    there = await reading((words.ENTITY_KIND_TASK, theirs.id, 1))
    there_too = await reading((words.ENTITY_KIND_SESSION, theirs.sessions[0].id, 1))
    nowhere = await reading((words.ENTITY_KIND_TASK, "task_none", 1))

    assert there == there_too == nowhere
    assert there[0] == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "caught up" in there[1]


async def test_ones_own_tokens_are_waited_for(running: Running) -> None:
    await running.add_repository()
    task = await running.create()
    following = newer(task, title="New")
    entry = said(task, 1)[0]
    token = consistency_token([(words.ENTITY_KIND_TASK, task.id, 2), (words.ENTITY_KIND_TRANSCRIPT_ENTRY, entry.id, 1)])
    request = GetTaskRequest(task_id=task.id, consistency_token=token)

    reading = asyncio.ensure_future(running.stub(TaskServiceStub).GetTask(request))
    watching = asyncio.ensure_future(watched(running, task.id, Principal(service="gateway"), consistency_token=token))
    await asyncio.sleep(0.05)
    await running.push(entry, following)

    assert (await reading).task.title == "New"
    changes = {change.id: change.revision for frame in await watching for change in frame.changes}
    assert changes == {task.id: 2, task.sessions[0].id: 1, entry.id: 1}


async def test_a_watch_resumes_where_it_was(running: Running) -> None:
    await running.add_repository()
    task = await running.create()
    first = await watched(running, task.id, Principal(service="gateway"))
    await running.push(newer(task, title="New"))

    again = await watched(running, task.id, Principal(service="gateway"), resume_token=first[-1].resume_token)

    assert [frame.kind for frame in first] == [
        watches_pb2.WATCH_FRAME_KIND_RESET,
        watches_pb2.WATCH_FRAME_KIND_SNAPSHOT,
        SYNCED,
    ]
    assert [frame.kind for frame in again] == [watches_pb2.WATCH_FRAME_KIND_CHANGES, SYNCED]
    assert [change.id for change in again[0].changes] == [task.id]
    other = await running.create()
    code, _ = await refused(
        watched(running, other.id, Principal(service="gateway"), resume_token=first[-1].resume_token)
    )
    assert code == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_snapshot_holds_the_newest_entries_of_the_transcripts(room: Room) -> None:  # F27
    await room.add_repository()
    task = await room.create()
    await room.push(*said(task, SNAPSHOT_ENTRIES + 7))

    kinds = [table.kind for table in WATCHED]
    pages = [page async for page in room.index.catch_up(task.id, kinds, None, "")]

    ids = [change.id for page in pages for change in page.changes if change.kind == words.ENTITY_KIND_TRANSCRIPT_ENTRY]
    assert ids == [f"ent_{n}" for n in range(8, SNAPSHOT_ENTRIES + 8)]
    shown = {change.kind for page in pages for change in page.changes}
    assert {words.ENTITY_KIND_TASK, words.ENTITY_KIND_SESSION} <= shown
