"""The client for plain code: the same as the one for `async` code, in a thread of its own. Item 6."""

import asyncio
import inspect
from collections.abc import Callable
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar

import grpc
import pytest
from branchline import AsyncClient, BranchlineError, Client, all_pages
from branchline.v1.files_pb2 import ListFilesRequest
from branchline.v1.organizations_pb2 import WatchOrganizationRequest
from branchline.v1.tasks_pb2 import (
    CreateTaskRequest,
    CreateTaskResponse,
    GetTaskRequest,
    ListTasksRequest,
    ListTasksResponse,
    TaskSummary,
)

from tests.unit.sdk.server import Failure, Server
from tests.unit.sdk.test_views import CHANGES, frame, gone, snapshot, upserted

T = TypeVar("T")
SECONDS = 10


def public(thing: Any) -> dict[str, Any]:
    return {name: value for name, value in inspect.getmembers(thing) if not name.startswith("_")}


def parameters(function: Any) -> list[tuple[str, Any, str]]:
    return [(one.name, one.default, str(one.annotation)) for one in inspect.signature(function).parameters.values()]


async def plainly(server: Server, job: Callable[[Client], T]) -> T:
    """Do a job as plain code does, in a thread beside the server's."""

    def work() -> T:
        with Client(server.address, "secret", timeout_seconds=SECONDS) as client:
            return job(client)

    return await asyncio.to_thread(work)


async def test_both_clients_have_the_same_services_methods_and_watches(server: Server, client: AsyncClient) -> None:
    def compare(plain: Client) -> None:
        ours, theirs = public(plain), public(client)
        assert ours.keys() == theirs.keys() - {"caller"}
        for name, service in ours.items():
            if inspect.ismethod(service):
                assert parameters(service) == parameters(theirs[name]), name
                continue
            methods = public(service)
            assert methods.keys() == public(theirs[name]).keys()
            for method, function in methods.items():
                assert parameters(function) == parameters(getattr(theirs[name], method)), method
                assert inspect.getdoc(function) == inspect.getdoc(getattr(theirs[name], method))

    await plainly(server, compare)


async def test_calls_repeat_fail_and_remember_as_those_of_async_code(server: Server) -> None:
    server.answers["CreateTask"] += [Failure(), CreateTaskResponse(consistency_token="one")]
    server.answers["GetTask"] += [Failure(grpc.StatusCode.NOT_FOUND, "RESOURCE_NOT_FOUND")]

    def job(client: Client) -> None:
        session = client.session()
        session.tasks.create_task(CreateTaskRequest())
        with pytest.raises(BranchlineError, match="NOT_FOUND, RESOURCE_NOT_FOUND"):
            session.tasks.get_task(GetTaskRequest())

    await plainly(server, job)

    first, again, read = server.requests
    assert first.request_id == again.request_id != ""
    assert list(read.consistency.at_least_as_fresh) == ["one"]


async def test_pages_come_one_by_one(server: Server) -> None:
    server.answers["ListTasks"] += [
        ListTasksResponse(tasks=[TaskSummary(id="a")], next_page_token="next"),
        ListTasksResponse(tasks=[TaskSummary(id="b")]),
    ]

    def job(client: Client) -> list[str]:
        return [task.id for task in all_pages(client.tasks.list_tasks, ListTasksRequest(), lambda page: page.tasks)]

    assert await plainly(server, job) == ["a", "b"]
    assert [sent.page_token for sent in server.requests] == ["", "next"]


async def test_a_view_is_waited_for_and_read_without_async(server: Server) -> None:
    server.stream(*snapshot(upserted("a"), token="one"), Failure(), frame(CHANGES, upserted("b"), gone("a")))

    def job(client: Client) -> list[str]:
        with client.watch_organization("org_1", heartbeat=timedelta(seconds=2)) as watched:
            watched.wait_for(lambda view: "b" in view.tasks, SECONDS)
            with pytest.raises(TimeoutError):
                watched.wait_for(lambda view: "c" in view.tasks, 0.05)
            assert list(watched.view.tasks) == ["b"]
            return [change.task.id for change in islice(watched.changes(), 1)]

    assert await plainly(server, job) == ["b"]
    assert [(sent.resume_token, sent.heartbeat_interval.seconds) for sent in server.requests] == [("", 2), ("one", 2)]


async def test_a_stream_is_read_and_left_without_async(server: Server) -> None:
    server.stream(frame(CHANGES, upserted("a")), Failure(grpc.StatusCode.NOT_FOUND), frame(CHANGES, upserted("b")))

    def job(client: Client) -> list[str]:
        broken, left = (client.organizations.watch_organization(WatchOrganizationRequest()) for _ in "ab")
        first = next(broken)
        with pytest.raises(BranchlineError):
            next(broken)
        second = next(left)
        left.close()
        return [change.task.id for one in (first, second) for change in one.changes]

    assert await plainly(server, job) == ["a", "b"]


async def test_what_a_view_waits_for_cannot_call_the_client(server: Server) -> None:
    server.stream(*snapshot())

    def job(client: Client) -> None:
        with client.watch_organization("org_1") as watched, pytest.raises(RuntimeError, match="wait for itself"):
            watched.wait_for(lambda _: bool(client.files.list_files(ListFilesRequest())), SECONDS)

    await plainly(server, job)


async def test_a_view_is_read_while_it_is_written(server: Server) -> None:
    server.stream(*snapshot())
    server.stream(*(frame(CHANGES, *(upserted(f"{part} {one}") for one in range(50))) for part in range(400)))

    def job(client: Client) -> None:
        with client.watch_organization("org_1") as watched:
            while len(watched.view.tasks) < 20_000:
                pass

    await plainly(server, job)
