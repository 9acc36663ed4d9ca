"""What passes through the gateway, and what is refused at the door. API-2, API-3, API-5."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
import pytest_asyncio
from branchline.v1 import history_pb2, sessions_pb2, tasks_pb2, users_pb2
from branchline.v1.common_pb2 import Consistency, Prompt
from branchline.v1.users_pb2 import User
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.routes import PUBLIC
from services.runtime.errors import detail_of
from services.runtime.spine.tokens import consistency_token
from tests.support.messages import messages
from tests.unit.gateway.backend import ORGANIZATION_ID, TASK, Backend, as_new_as, opened, task_entry

GET_TASK = "/branchline.v1.TaskService/GetTask"
BEARER = (("authorization", "Bearer token"),)


@pytest_asyncio.fixture
async def backend(tmp_path: Path) -> AsyncGenerator[Backend, None]:
    backend = Backend(tmp_path)
    async with backend.running(), backend.gateway():
        yield backend


async def refusal(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str, list[str]]:
    """Return the code, the reason and the fields that a call is refused with."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    info = detail_of(refused.value, error_details_pb2.ErrorInfo)
    bad = detail_of(refused.value, error_details_pb2.BadRequest)
    return refused.value.code(), info.reason, [one.field for one in bad.field_violations]


async def test_bytes_that_are_no_request_are_refused_by_name(backend: Backend) -> None:  # F16
    async with backend.client() as client:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = client.channel.unary_unary(GET_TASK)
        refused = await refusal(call(b"\xff\xff\xff"))

    assert refused == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_MALFORMED", ["request"])


async def test_times_out_of_range_and_unstorable_text_name_their_field(backend: Backend) -> None:  # F9, F16
    token = users_pb2.CreateApiTokenRequest(display_name="a")
    token.expire_time.seconds = 2**63 - 1
    history = history_pb2.ListHistoryEventsRequest(organization_id=ORGANIZATION_ID)
    history.filter.start_time.nanos = -1
    async with backend.client() as client:
        refused = [
            await refusal(client.users.CreateApiToken(token)),
            await refusal(client.history.ListHistoryEvents(history)),
            await refusal(client.tasks.GetTask(tasks_pb2.GetTaskRequest(task_id="a\0b"))),
        ]

    assert [one[0] for one in refused] == [grpc.StatusCode.INVALID_ARGUMENT] * 3
    assert [one[2] for one in refused] == [["expire_time"], ["filter.start_time"], ["task_id"]]


def requests(name: str) -> st.SearchStrategy[tuple[str, bytes]]:
    """Return requests of a method: any bytes, and its message with boundary values."""
    made = messages(GetMessageClass(PUBLIC[name].input_type)).map(lambda message: message.SerializeToString())
    return st.tuples(st.just(name), st.one_of(st.binary(max_size=40), made))


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.sampled_from(sorted(PUBLIC)).flatmap(requests))
async def test_no_bytes_make_any_method_fail_in_a_way_that_nobody_foresaw(
    backend: Backend, request_of: tuple[str, bytes]
) -> None:  # F16
    name, data = request_of
    method = PUBLIC[name]
    path = f"/{method.containing_service.full_name}/{method.name}"
    code = grpc.StatusCode.OK
    async with backend.client() as client:
        try:
            if method.server_streaming:
                await client.channel.unary_stream(path)(data, timeout=0.3).read()
            else:
                await client.channel.unary_unary(path)(data, timeout=0.3)
        except grpc.aio.AioRpcError as error:
            code = error.code()

    assert code not in {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL}


async def test_a_request_travels_on_as_the_bytes_that_came(backend: Backend) -> None:
    unknown_field = b"\xba\x3e\x03abc"
    async with backend.client() as client:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, tasks_pb2.GetTaskResponse] = client.channel.unary_unary(
            GET_TASK,
            response_deserializer=tasks_pb2.GetTaskResponse.FromString,
        )
        answer = await call(tasks_pb2.GetTaskRequest(task_id="task_1").SerializeToString() + unknown_field)

    assert answer.task.id == "task_1"


async def test_an_unknown_id_is_not_waited_for_unless_the_token_names_it(backend: Backend) -> None:  # F31
    unrelated = consistency_token([(TASK, "another", 1)])
    named = consistency_token([(TASK, "task_late", 1)])

    async def born_later() -> None:
        await asyncio.sleep(0.3)
        backend.placed.add("task_late")

    async with backend.client() as client:
        started = time.monotonic()
        request = tasks_pb2.GetTaskRequest(task_id="task_late", consistency=Consistency(at_least_as_fresh=[unrelated]))
        unknown = await refusal(client.tasks.GetTask(request))
        at_once = time.monotonic() - started
        later = asyncio.create_task(born_later())
        request.consistency.at_least_as_fresh.append(named)
        found = await client.tasks.GetTask(request)
        await later
        garbled = tasks_pb2.GetTaskRequest(task_id="task_1", consistency=Consistency(at_least_as_fresh=["%%%"]))
        invalid = await refusal(client.tasks.GetTask(garbled))

    assert unknown[0] == grpc.StatusCode.NOT_FOUND
    assert at_once < 1
    assert found.task.id == "task_late"
    assert invalid[1:] == ("CONSISTENCY_TOKEN_INVALID", ["consistency.at_least_as_fresh"])


async def test_a_command_answers_within_the_deadline_though_the_index_never_settles(backend: Backend) -> None:  # F31
    never = consistency_token([(TASK, "never", 9)])
    async with backend.client() as client:
        request = tasks_pb2.CreateTaskRequest(repository_id="task_1", prompt=Prompt(text=never))
        started = time.monotonic()
        answer = await client.tasks.CreateTask(request, timeout=2)
        elapsed = time.monotonic() - started

    assert answer.task.id == "task_new"
    assert 1 < elapsed < 2


async def test_a_watch_that_waits_for_its_consistency_token_says_so_in_the_end(
    backend: Backend,
) -> None:
    await backend.put(task_entry("a", 1))
    async with backend.client() as client:
        started = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await opened(client, consistency=as_new_as("a", 1_000_000, nanos=500_000_000)).read()
        elapsed = time.monotonic() - started

    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    info = detail_of(refused.value, error_details_pb2.ErrorInfo)
    assert (info.reason, dict(info.metadata)) == ("INDEX_BEHIND", {"resource_type": "task", "id": "a"})
    assert detail_of(refused.value, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() > 0
    assert 0.5 <= elapsed < 3


class Silent(grpc.GenericRpcHandler):  # pyright: ignore[reportMissingTypeArgument] - it takes none when it runs
    """Takes every call and never answers."""

    def __init__(self) -> None:
        self.given_up = asyncio.Event()

    def service(self, handler_call_details: Any) -> Any:
        return cast("Any", grpc).unary_unary_rpc_method_handler(self._wait)

    async def _wait(self, _data: bytes, _context: Any) -> bytes:
        try:
            await asyncio.Event().wait()
        finally:
            self.given_up.set()
        return b""


async def test_a_call_that_its_owner_does_not_answer_says_why_within_the_callers_deadline(
    tmp_path: Path,
) -> None:  # F16
    silent, server = Silent(), grpc.aio.server()
    server.add_generic_rpc_handlers((silent,))
    server.add_insecure_port(f"unix:{tmp_path}/silent")
    await server.start()
    away = {"task": f"unix:{tmp_path}/silent", "user": f"unix:{tmp_path}/nobody"}
    backend = Backend(tmp_path, elsewhere=away)
    async with backend.running(), backend.gateway(), backend.client() as client:
        session = sessions_pb2.CreateSessionRequest(task_id="task_1")
        preferences = users_pb2.UpdateUserRequest(user=User(display_name="a"))
        unanswered, unreached = await asyncio.gather(
            refusal(client.sessions.CreateSession(session, timeout=1)),
            refusal(client.users.UpdateUser(preferences, timeout=1)),
        )
        await asyncio.wait_for(silent.given_up.wait(), 5)
    await server.stop(0)

    assert unanswered[:2] == (grpc.StatusCode.DEADLINE_EXCEEDED, "NOT_ANSWERED")
    assert unreached[:2] == (grpc.StatusCode.UNAVAILABLE, "SERVICE_UNREACHABLE")
