"""Who gets in, how often, and for how long it is remembered. AUTH, API-1."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from branchline.v1 import organizations_pb2, tasks_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gateway import standing, watches
from gateway.allowance import Allowance
from gateway.caller import REFUSAL_SECONDS
from services.runtime.errors import ResourceExhausted
from tests.unit.gateway.backend import (
    ORGANIZATION_ID,
    Backend,
    View,
    eventually,
    follow,
    opened,
    task_entry,
    until_synced,
)

GET_TASK = "/branchline.v1.TaskService/GetTask"
GET = tasks_pb2.GetTaskRequest(task_id="task_1")


@pytest_asyncio.fixture
async def backend(tmp_path: Path) -> AsyncGenerator[Backend, None]:
    backend = Backend(tmp_path)
    async with backend.running():
        yield backend


@pytest.fixture
def checked_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have open watches checked ten times as often as they are."""
    often = standing.CHECK_SECONDS / 10
    for module in (watches, standing):
        monkeypatch.setattr(module, "CHECK_SECONDS", often)


async def refusal(call: Awaitable[Any]) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    return refused.value.code()


async def test_a_call_needs_a_token_that_is_known(backend: Backend) -> None:
    async with backend.gateway(), backend.client() as known, backend.client("guess") as unknown:
        answer = await known.tasks.GetTask(GET)
        guessed = await refusal(unknown.tasks.GetTask(GET))
        async with grpc.aio.insecure_channel(backend.addresses["gateway"]) as channel:
            get: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(GET_TASK)
            nobody = await refusal(get(b""))
            health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())

    assert answer.task.title == "a title"
    assert guessed == nobody == grpc.StatusCode.UNAUTHENTICATED
    assert health.status == health_pb2.HealthCheckResponse.SERVING


async def test_the_organization_is_asked_once_for_many_calls_at_the_same_moment(backend: Backend) -> None:
    async with backend.gateway(), backend.client() as client:
        await asyncio.gather(*(client.tasks.GetTask(GET) for _ in range(50)))

    assert backend.asked == 1


async def test_a_revoked_token_stops_a_busy_watch_within_seconds(backend: Backend) -> None:  # F6
    view = View()
    async with backend.gateway(), backend.client() as client:
        call = opened(client)
        following = asyncio.create_task(follow(call, view))
        await eventually(lambda: view.token)
        backend.revoke("token")
        revoked = time.monotonic()
        revision = 0
        while not following.done():
            revision += 1
            await backend.put(task_entry("busy", revision))
            await asyncio.sleep(0.01)
        elapsed = time.monotonic() - revoked
        code = await refusal(following)
        again = await refusal(client.tasks.GetTask(GET))

    assert code == again == grpc.StatusCode.UNAUTHENTICATED
    assert elapsed < 7
    assert revision > 50


async def test_a_removed_member_is_out_of_watches_and_calls_within_seconds(
    backend: Backend, checked_often: None
) -> None:
    backend.add_caller("other", "usr_2")
    async with backend.gateway(), backend.client() as admin, backend.client("other") as other:
        view = View()
        following = asyncio.create_task(follow(opened(other), view))
        await eventually(lambda: view.token)
        await other.tasks.GetTask(GET)
        await admin.organizations.RemoveMember(
            organizations_pb2.RemoveMemberRequest(organization_id=ORGANIZATION_ID, user_id="usr_2")
        )
        at_once = await refusal(other.tasks.GetTask(GET))
        async with asyncio.timeout(4):
            code = await refusal(following)

    assert at_once == code == grpc.StatusCode.NOT_FOUND


async def test_a_watch_of_what_was_deleted_ends_within_seconds(backend: Backend, checked_often: None) -> None:
    async with backend.gateway(), backend.client() as client:
        view = View()
        request = tasks_pb2.WatchTaskRequest(task_id="task_1")
        following = asyncio.create_task(follow(client.tasks.WatchTask(request), view))
        await eventually(lambda: view.token)
        backend.placed.clear()
        async with asyncio.timeout(4):
            code = await refusal(following)

    assert code == grpc.StatusCode.NOT_FOUND


async def test_one_callers_flood_is_refused_and_anothers_calls_are_not(backend: Backend) -> None:
    backend.add_caller("other", "usr_2")
    async with backend.gateway(calls_per_minute=120), backend.client() as flood, backend.client("other") as other:
        calls = [flood.tasks.GetTask(GET) for _ in range(60)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        await other.tasks.GetTask(GET)

    refused = [one for one in outcomes if isinstance(one, grpc.aio.AioRpcError)]
    assert {one.code() for one in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert 35 <= len(refused) <= 40


async def test_who_tries_made_up_tokens_is_held_back_and_others_are_not(backend: Backend) -> None:
    async with backend.gateway(), backend.client() as known:

        async def guess(number: int) -> None:
            for attempt in range(1000):
                async with backend.client(f"guess-{number}-{attempt}") as stranger:
                    assert await refusal(stranger.tasks.GetTask(GET)) == grpc.StatusCode.UNAUTHENTICATED

        await known.tasks.GetTask(GET)
        guessing = [asyncio.create_task(guess(number)) for number in range(20)]
        await asyncio.sleep(REFUSAL_SECONDS / 3)
        started = time.monotonic()
        await known.tasks.GetTask(GET)
        took = time.monotonic() - started
        for one in guessing:
            one.cancel()
        await asyncio.wait(guessing)

    assert 20 <= backend.asked <= 40
    assert took < REFUSAL_SECONDS / 4
    assert not [one for one in guessing if not one.cancelled()]


async def test_open_watches_outlive_a_restart_of_who_checks_them(
    backend: Backend, tmp_path: Path, checked_often: None
) -> None:
    (tmp_path / "more").mkdir()
    restarted = Backend(tmp_path / "more")
    async with restarted.gateway(), restarted.client() as client:
        view = View()
        async with restarted.running():
            following = asyncio.create_task(follow(opened(client), view))
            await eventually(lambda: view.token)
        await asyncio.sleep(1.5)  # checks fall into the outage
        async with restarted.running():
            await restarted.put(task_entry("a", 1))
            await eventually(lambda: view.held == {"a": 1})
        assert not following.done()
        following.cancel()


async def test_a_fresh_watch_needs_no_heartbeat_to_be_synced(backend: Backend) -> None:
    async with backend.gateway(), backend.client() as client:
        await backend.put(task_entry("a", 1))
        started = time.monotonic()
        view = await until_synced(opened(client))

    assert view.held == {"a": 1}
    assert time.monotonic() - started < 2


def test_calls_grow_back_with_time_up_to_ten_seconds_worth() -> None:
    now = 0.0
    allowance = Allowance(60, lambda: now)

    def taken() -> int:
        count = 0
        try:
            while True:
                allowance.take("caller")
                count += 1
        except ResourceExhausted:
            return count

    at_once = taken()
    now += 2
    after_two_seconds = taken()
    now += 1000
    after_long = taken()

    assert (at_once, after_two_seconds, after_long) == (10, 2, 10)
