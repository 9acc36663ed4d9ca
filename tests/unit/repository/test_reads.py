"""Reads and watches of one task: in pages with bounds, for its organization alone."""

import asyncio
from typing import Any

import grpc
import pytest
from branchline.v1 import common_pb2, watches_pb2
from branchline.v1.common_pb2 import Consistency
from branchline.v1.repositories_pb2 import Branch, ListBranchesRequest, PullRequest, Repository
from branchline.v1.repositories_pb2_grpc import RepositoryServiceStub as PublicRepositoryServiceStub
from branchline.v1.sessions_pb2 import ListTranscriptEntriesRequest, Session
from branchline.v1.sessions_pb2_grpc import SessionServiceStub
from branchline.v1.tasks_pb2 import GetTaskRequest, Task, TranscriptSelection
from branchline.v1.tasks_pb2_grpc import TaskServiceStub
from branchline.v1.transcripts_pb2 import AgentMessage, TranscriptEntry
from branchline_internal.repository.v1.repository_pb2 import EnsureRepositoryRequest, WatchIndexRequest
from branchline_internal.repository.v1.repository_pb2_grpc import RepositoryServiceStub
from branchline_internal.spine.v1.push_pb2 import WatchSelection
from google.protobuf.duration_pb2 import Duration

from services.runtime.principal import Principal
from services.runtime.spine.chunks import PART_BYTES
from services.runtime.spine.tokens import consistency_token
from tests.unit.repository.conftest import Running, newer

STRANGER = Principal(user_id="usr_2", organization_id="org_2", role=10, default_agent="mock")
SYNCED = watches_pb2.FRAME_KIND_SYNCED
TRANSCRIPT = common_pb2.ENTITY_KIND_TRANSCRIPT_ENTRY


def said(task: Task, count: int, size: int = 10, session_id: str = "") -> list[TranscriptEntry]:
    prefix = f"{session_id}_" if session_id else "ent_"
    session_id = session_id or task.sessions[0].id
    return [
        TranscriptEntry(
            id=f"{prefix}{n}",
            task_id=task.id,
            session_id=session_id,
            position=n,
            revision=1,
            agent_message=AgentMessage(text="x" * size),
        )
        for n in range(1, count + 1)
    ]


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value.code(), error.value.details() or ""


def consistency(tokens: list[str], **max_wait: int) -> Consistency:
    return Consistency(at_least_as_fresh=tokens, max_wait=Duration(**max_wait) if max_wait else None)


async def watched(
    running: Running,
    task_id: str,
    principal: Principal,
    transcripts: TranscriptSelection | None = None,
    **selection: Any,
) -> list[Any]:
    request = WatchIndexRequest(
        task_id=task_id, selection=WatchSelection(until_synced=True, **selection), transcripts=transcripts
    )
    return [answer.frame async for answer in running.stub(RepositoryServiceStub, principal).WatchIndex(request)]


async def test_a_transcript_is_paged_by_number_and_by_bytes(running: Running) -> None:  # F22
    await running.add_repository()
    task = await running.create()
    await running.push(*said(task, 7, size=300_000))
    request = ListTranscriptEntriesRequest(task_id=task.id, session_id=task.sessions[0].id, page_size=5)
    sessions = running.stub(SessionServiceStub)

    pages: list[list[int]] = []
    while True:
        answer = await sessions.ListTranscriptEntries(request)
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
    first = await sessions.ListTranscriptEntries(
        ListTranscriptEntriesRequest(task_id=task.id, session_id=task.sessions[0].id, page_size=1)
    )

    for token in (first.next_page_token, "17", "AAAA", "ä"):
        elsewhere = ListTranscriptEntriesRequest(task_id=other.id, session_id=other.sessions[0].id, page_token=token)
        code, _ = await refused(sessions.ListTranscriptEntries(elsewhere))
        assert code == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_session_of_another_task_has_no_transcript_here(running: Running) -> None:
    await running.add_repository()
    task, other = await running.create(), await running.create()

    request = ListTranscriptEntriesRequest(task_id=task.id, session_id=other.sessions[0].id)

    code, _ = await refused(running.stub(SessionServiceStub).ListTranscriptEntries(request))
    assert code == grpc.StatusCode.NOT_FOUND


async def test_nothing_of_another_organization_is_there(running: Running) -> None:
    await running.add_repository()
    task = await running.create()
    session_id = task.sessions[0].id

    answers = [
        await refused(running.stub(TaskServiceStub, STRANGER).GetTask(GetTaskRequest(task_id=task.id))),
        await refused(
            running.stub(SessionServiceStub, STRANGER).ListTranscriptEntries(
                ListTranscriptEntriesRequest(task_id=task.id, session_id=session_id)
            )
        ),
        await refused(
            running.stub(PublicRepositoryServiceStub, STRANGER).ListBranches(
                ListBranchesRequest(repository_id="repo_1")
            )
        ),
        await refused(watched(running, task.id, STRANGER)),
        await refused(watched(running, "task_none", STRANGER)),
    ]

    assert {code for code, _ in answers} == {grpc.StatusCode.NOT_FOUND}


async def test_branches_are_paged_by_number_and_by_bytes(running: Running) -> None:
    names = [f"feature/{number:04}/{'x' * 180}" for number in range(900)]
    repository = Repository(id="repo_1", organization_id="org_1", display_name="acme/shop", revision=1)
    found = [Branch(name=name, head_commit="a" * 40) for name in names]
    pulls = [
        PullRequest(number=n + 1, head_branch=name, title="ü" * 256, url="x" * 512) for n, name in enumerate(names)
    ]
    ensure = EnsureRepositoryRequest(
        repository=repository, github=True, branches=found, pull_requests=pulls, github_revision=1
    )
    await running.stub(RepositoryServiceStub, Principal(service="organization")).EnsureRepository(ensure)
    request = ListBranchesRequest(repository_id="repo_1", page_size=1000)
    pages: list[list[str]] = []
    while True:
        answer = await running.stub(PublicRepositoryServiceStub).ListBranches(request)
        assert answer.ByteSize() < PART_BYTES + 10_000
        pages.append([branch.name for branch in answer.branches])
        if not answer.next_page_token:
            break
        request.page_token = answer.next_page_token

    assert len(pages) > 1
    assert [name for page in pages for name in page] == names


async def test_a_consistency_token_tells_nothing_of_another_organization(running: Running) -> None:  # F31
    await running.add_repository()
    await running.add_repository("repo_2", "org_2")
    theirs = await running.create()
    own = await running.create(STRANGER, repository_id="repo_2")
    tasks = running.stub(TaskServiceStub, STRANGER)

    def reading(*entities: tuple[common_pb2.EntityKind.ValueType, str, int]) -> Any:
        token = consistency_token(entities)
        return refused(
            tasks.GetTask(GetTaskRequest(task_id=own.id, consistency=consistency([token], nanos=300_000_000)))
        )

    there = await reading((common_pb2.ENTITY_KIND_TASK, theirs.id, 1))
    there_too = await reading((common_pb2.ENTITY_KIND_SESSION, theirs.sessions[0].id, 1))
    nowhere = await reading((common_pb2.ENTITY_KIND_TASK, "task_none", 1))

    assert there == there_too == nowhere
    assert there[0] == grpc.StatusCode.UNAVAILABLE
    assert "caught up" in there[1]


async def test_ones_own_tokens_are_waited_for(running: Running) -> None:
    await running.add_repository()
    task = await running.create()
    following = newer(task, title="New")
    entry = said(task, 1)[0]
    token = consistency_token(
        [(common_pb2.ENTITY_KIND_TASK, task.id, 2), (common_pb2.ENTITY_KIND_TRANSCRIPT_ENTRY, entry.id, 1)]
    )
    request = GetTaskRequest(task_id=task.id, consistency=consistency([token]))

    reading = asyncio.ensure_future(running.stub(TaskServiceStub).GetTask(request))
    watching = asyncio.ensure_future(
        watched(running, task.id, Principal(service="gateway"), consistency=consistency([token]))
    )
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
        watches_pb2.FRAME_KIND_RESET,
        watches_pb2.FRAME_KIND_SNAPSHOT,
        SYNCED,
    ]
    assert [frame.kind for frame in again] == [watches_pb2.FRAME_KIND_CHANGES, SYNCED]
    assert [change.id for change in again[0].changes] == [task.id]
    other = await running.create()
    code, _ = await refused(
        watched(running, other.id, Principal(service="gateway"), resume_token=first[-1].resume_token)
    )
    assert code == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_snapshot_holds_the_newest_entries_of_each_transcript(running: Running) -> None:  # F27
    await running.add_repository()
    task = await running.create()
    second = Session(id="ses_second", task_id=task.id, revision=1)
    mine, other = task.sessions[0].id, second.id
    await running.push(*said(task, 57), second)
    await running.push(*said(task, 3, session_id=other))

    async def shown(**selection: Any) -> dict[str, list[int]]:
        transcripts = TranscriptSelection(**selection)
        frames = await watched(running, task.id, Principal(service="gateway"), transcripts)
        kinds = {change.kind for frame in frames for change in frame.changes}
        assert {common_pb2.ENTITY_KIND_TASK, common_pb2.ENTITY_KIND_SESSION} <= kinds
        found: dict[str, list[int]] = {mine: [], other: []}
        for change in (change for frame in frames for change in frame.changes):
            if change.kind == common_pb2.ENTITY_KIND_TRANSCRIPT_ENTRY:
                found[change.session_id].append(TranscriptEntry.FromString(change.entity).position)
        return found

    assert await shown() == {mine: list(range(8, 58)), other: [1, 2, 3]}
    assert await shown(tail_entries=0) == {mine: [], other: []}
    assert await shown(tail_entries=2) == {mine: [56, 57], other: [2, 3]}
    assert await shown(tail_entries=10_000) == {mine: list(range(1, 58)), other: [1, 2, 3]}
    assert await shown(session_ids=[other], tail_entries=1) == {mine: [], other: [3]}


async def test_no_snapshot_holds_more_than_five_hundred_entries_of_a_transcript(running: Running) -> None:
    await running.add_repository()
    task = await running.create()
    await running.push(*said(task, 507))

    transcripts = TranscriptSelection(tail_entries=2**31 - 1)
    frames = await watched(running, task.id, Principal(service="gateway"), transcripts)

    ids = [change.id for frame in frames for change in frame.changes if change.kind == TRANSCRIPT]
    assert ids == [f"ent_{n}" for n in range(8, 508)]
