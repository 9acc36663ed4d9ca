"""Calls of the Python client: credentials, request ids, repetition, errors, freshness, pages. Item 6."""

import time
import uuid
from datetime import timedelta

import grpc
import pytest
from branchline import AsyncClient, BranchlineError, pages
from branchline.v1.common_pb2 import Consistency
from branchline.v1.errors_pb2 import (
    ERROR_REASON_FIELD_INVALID,
    ERROR_REASON_INDEX_BEHIND,
    ERROR_REASON_QUOTA_EXCEEDED,
    ERROR_REASON_UNSPECIFIED,
)
from branchline.v1.files_pb2 import DeleteFileRequest
from branchline.v1.processes_pb2 import SignalProcessRequest
from branchline.v1.tasks_pb2 import (
    CreateTaskRequest,
    CreateTaskResponse,
    GetTaskRequest,
    GetTaskResponse,
    KillTaskRequest,
    ListTasksRequest,
    ListTasksResponse,
    Task,
    TaskSummary,
)
from branchline.v1.users_pb2 import GetCurrentUserRequest

from tests.unit.sdk.server import Failure, Server

UNAVAILABLE, EXHAUSTED = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_command_is_repeated_under_one_id_until_it_is_answered(server: Server, client: AsyncClient) -> None:
    server.answers["CreateTask"] += [Failure(), Failure(EXHAUSTED), CreateTaskResponse(task=Task(id="task_1"))]
    request = CreateTaskRequest(repository_id="repo_1")

    answer = await client.tasks.create_task(request)

    ids = {sent.request_id for sent in server.requests}
    assert answer.task.id == "task_1"
    assert (len(server.requests), len(ids)) == (3, 1)
    assert uuid.UUID(ids.pop())
    assert not request.request_id  # the caller's message is the caller's


async def test_each_command_has_an_id_of_its_own_and_a_callers_id_is_kept(server: Server, client: AsyncClient) -> None:
    for given in ("", "", "mine"):
        await client.tasks.create_task(CreateTaskRequest(request_id=given))

    first, second, third = (sent.request_id for sent in server.requests)
    assert first != second
    assert third == "mine"


async def test_what_is_not_safe_is_asked_for_once(server: Server, client: AsyncClient) -> None:
    for method in ("DeleteFile", "SignalProcess"):
        server.answers[method] += [Failure()]

    for call in (
        client.files.delete_file(DeleteFileRequest(path="a")),
        client.processes.signal_process(SignalProcessRequest()),
    ):
        with pytest.raises(BranchlineError) as failed:
            await call
        assert failed.value.code == UNAVAILABLE

    assert len(server.requests) == 2


@pytest.mark.parametrize(
    "failure",
    [
        Failure(grpc.StatusCode.ABORTED),
        Failure(grpc.StatusCode.INTERNAL),
        Failure(grpc.StatusCode.DEADLINE_EXCEEDED),
        Failure(EXHAUSTED, "QUOTA_EXCEEDED", {"limit": "64"}),
        Failure(UNAVAILABLE, "INDEX_BEHIND", retry=timedelta(seconds=60)),
    ],
    ids=lambda failure: f"{failure.code.name} {failure.reason}",
)
async def test_what_waiting_does_not_mend_fails_at_once(server: Server, client: AsyncClient, failure: Failure) -> None:
    server.answers["GetTask"] += [failure]

    with pytest.raises(BranchlineError) as failed:
        await client.tasks.get_task(GetTaskRequest(task_id="task_1"))

    assert failed.value.code == failure.code
    assert len(server.requests) == 1


async def test_the_server_says_how_long_to_wait(server: Server, client: AsyncClient) -> None:
    delay = timedelta(seconds=0.3)
    server.answers["GetTask"] += [Failure(UNAVAILABLE, "INDEX_BEHIND", retry=delay), GetTaskResponse()]
    begun = time.monotonic()

    await client.tasks.get_task(GetTaskRequest(task_id="task_1"))

    assert time.monotonic() - begun >= delay.total_seconds()


async def test_a_call_that_is_not_answered_ends_when_its_time_is_over(server: Server, client: AsyncClient) -> None:
    server.hangs = True

    with pytest.raises(BranchlineError) as failed:
        await client.tasks.get_task(GetTaskRequest(task_id="task_1"), timeout_seconds=0.2)

    assert failed.value.code == grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_server_that_is_not_there_is_unavailable_when_the_time_is_over() -> None:
    async with AsyncClient("127.0.0.1:1", timeout_seconds=0.5) as client:
        with pytest.raises(BranchlineError) as failed:
            await client.users.get_current_user(GetCurrentUserRequest())

    assert failed.value.code == UNAVAILABLE


async def test_the_credential_goes_with_every_call(server: Server, client: AsyncClient) -> None:
    await client.tasks.get_task(GetTaskRequest())
    async with AsyncClient(server.address) as nobody:
        await nobody.tasks.get_task(GetTaskRequest())

    assert server.authorizations == ["Bearer secret", ""]


async def test_an_error_says_what_why_where_and_when_again(server: Server, client: AsyncClient) -> None:
    server.answers["GetTask"] += [
        Failure(grpc.StatusCode.INVALID_ARGUMENT, "FIELD_INVALID", {"field": "task_id"}, field="task_id"),
        Failure(UNAVAILABLE, "INDEX_BEHIND", retry=timedelta(minutes=1)),
        Failure(EXHAUSTED, "QUOTA_EXCEEDED", {"limit": "64"}),
    ]
    failed: list[BranchlineError] = []
    for _ in range(3):
        with pytest.raises(BranchlineError) as one:
            await client.tasks.get_task(GetTaskRequest())
        failed.append(one.value)

    invalid, behind, quota = failed
    assert (invalid.reason, invalid.field) == (ERROR_REASON_FIELD_INVALID, "task_id")
    assert str(invalid) == "INVALID_ARGUMENT, FIELD_INVALID: as told"
    assert (behind.reason, behind.retry_delay) == (ERROR_REASON_INDEX_BEHIND, timedelta(minutes=1))
    assert (quota.reason, quota.metadata) == (ERROR_REASON_QUOTA_EXCEEDED, {"limit": "64"})


@pytest.mark.parametrize(("reason", "domain"), [("OF_NEXT_YEAR", "branchline.dev"), ("FIELD_INVALID", "example.com")])
async def test_a_reason_that_is_not_known_is_none(
    server: Server, client: AsyncClient, reason: str, domain: str
) -> None:
    server.answers["GetTask"] += [Failure(grpc.StatusCode.NOT_FOUND, reason, domain=domain)]

    with pytest.raises(BranchlineError) as failed:
        await client.tasks.get_task(GetTaskRequest())

    assert failed.value.reason == ERROR_REASON_UNSPECIFIED
    assert str(failed.value) == "NOT_FOUND: as told"


async def test_a_session_reads_what_was_changed_through_it(server: Server, client: AsyncClient) -> None:
    session = client.session()
    server.answers["CreateTask"] += [CreateTaskResponse(consistency_token="one")]
    server.answers["KillTask"] += [CreateTaskResponse(consistency_token="two")]

    await session.tasks.create_task(CreateTaskRequest())
    await session.tasks.kill_task(KillTaskRequest())
    own = Consistency(at_least_as_fresh=["mine", "two"])
    await session.tasks.list_tasks(ListTasksRequest(consistency=own))
    await client.tasks.list_tasks(ListTasksRequest())
    await client.session().tasks.list_tasks(ListTasksRequest())
    async with session.watch_task("task_1") as view:
        server.stream(Failure(grpc.StatusCode.NOT_FOUND))
        with pytest.raises(BranchlineError):
            await view.wait_for(lambda _: True, 10)

    reads = server.requests[2:]
    listed, outside, other, watched = (list(sent.consistency.at_least_as_fresh) for sent in reads)
    assert listed == ["mine", "two", "one"]
    assert outside == other == []
    assert watched == ["one", "two"]


async def test_a_session_remembers_its_newest_commands_as_many_as_a_read_takes(
    server: Server, client: AsyncClient
) -> None:
    session = client.session()
    for number in range(20):
        server.answers["CreateTask"] += [CreateTaskResponse(consistency_token=str(number))]
        await session.tasks.create_task(CreateTaskRequest())

    await session.tasks.get_task(GetTaskRequest())

    assert list(server.requests[-1].consistency.at_least_as_fresh) == [str(number) for number in range(4, 20)]


async def test_pages_are_read_as_they_are_needed_until_there_are_none(server: Server, client: AsyncClient) -> None:
    first, last = [TaskSummary(id="a"), TaskSummary(id="b")], [TaskSummary(id="c")]
    server.answers["ListTasks"] += [
        ListTasksResponse(tasks=first, next_page_token="next"),
        ListTasksResponse(next_page_token="last"),  # a page may be empty in the midst of a list
        ListTasksResponse(tasks=last),
    ]
    request = ListTasksRequest(organization_id="org_1")
    seen: list[tuple[str, int]] = []

    async for task in pages(client.tasks.list_tasks, request, lambda page: page.tasks):
        seen.append((task.id, len(server.requests)))

    assert seen == [("a", 1), ("b", 1), ("c", 3)]
    assert [sent.page_token for sent in server.requests] == ["", "next", "last"]
    assert not request.page_token
