"""A thin client: one channel, the bearer token on every call, and watches that survive reconnects."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from branchline.v1 import (
    history_pb2,
    history_pb2_grpc,
    organizations_pb2,
    organizations_pb2_grpc,
    repositories_pb2_grpc,
    sandboxes_pb2_grpc,
    sessions_pb2_grpc,
    tasks_pb2,
    tasks_pb2_grpc,
    users_pb2_grpc,
)
from branchline.v1.watches_pb2 import WatchFrame

_SILENCE_SECONDS = 30.0
_MESSAGE_BYTES = 4 * 1024 * 1024  # the gateway sends no larger one
_RETRY_SECONDS = (0.1, 5.0)
_TRANSIENT = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED})
_OPTIONS = (
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.max_receive_message_length", _MESSAGE_BYTES),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.use_local_subchannel_pool", 1),  # a connection of its own: the gateway bounds what one carries at once
)


class Client:
    """Everything that the gateway offers, as typed stubs.

    Failed calls raise `grpc.aio.AioRpcError`; its status carries `google.rpc` details.
    """

    def __init__(self, address: str, token: str) -> None:
        interceptors = [_UnaryBearer(token), _StreamBearer(token)]
        self.channel = grpc.aio.insecure_channel(address, options=_OPTIONS, interceptors=interceptors)
        self.organizations = organizations_pb2_grpc.OrganizationServiceStub(self.channel)
        self.repositories = repositories_pb2_grpc.RepositoryServiceStub(self.channel)
        self.tasks = tasks_pb2_grpc.TaskServiceStub(self.channel)
        self.sessions = sessions_pb2_grpc.SessionServiceStub(self.channel)
        self.sandboxes = sandboxes_pb2_grpc.SandboxServiceStub(self.channel)
        self.users = users_pb2_grpc.UserServiceStub(self.channel)
        self.history = history_pb2_grpc.HistoryServiceStub(self.channel)

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channel."""
        await self.channel.close()

    def watch_organization(self, organization_id: str, resume_token: str = "") -> AsyncIterator[WatchFrame]:
        """Watch an organization for ever, through reconnects."""

        def connect(token: str) -> Any:
            request = organizations_pb2.WatchOrganizationRequest(organization_id=organization_id, resume_token=token)
            return self.organizations.WatchOrganization(request)

        return _watch(connect, resume_token)

    def watch_task(self, task_id: str, session_id: str = "", resume_token: str = "") -> AsyncIterator[WatchFrame]:
        """Watch a task, or one session of it, for ever, through reconnects."""

        def connect(token: str) -> Any:
            request = tasks_pb2.WatchTaskRequest(task_id=task_id, session_id=session_id, resume_token=token)
            return self.tasks.WatchTask(request)

        return _watch(connect, resume_token)

    def watch_history(
        self, organization_id: str, task_id: str = "", resume_token: str = ""
    ) -> AsyncIterator[WatchFrame]:
        """Watch an organization's feed for ever, through reconnects."""

        def connect(token: str) -> Any:
            request = history_pb2.WatchHistoryRequest(
                organization_id=organization_id, task_id=task_id, resume_token=token
            )
            return self.history.WatchHistory(request)

        return _watch(connect, resume_token)


async def _watch(connect: Callable[[str], Any], resume_token: str) -> AsyncIterator[WatchFrame]:
    """Yield frames; after a break, or a silence without heartbeats, go on from the last resume token."""
    pause, longest = _RETRY_SECONDS
    while True:
        call = connect(resume_token)
        try:
            while True:
                async with asyncio.timeout(_SILENCE_SECONDS):
                    response = await call.read()
                if response is grpc.aio.EOF:
                    break
                pause = _RETRY_SECONDS[0]
                resume_token = response.frame.resume_token or resume_token
                yield response.frame
        except grpc.aio.AioRpcError as error:
            if error.code() not in _TRANSIENT:
                raise
        except TimeoutError:
            pass
        finally:
            call.cancel()
        await asyncio.sleep(random.uniform(pause / 2, pause))
        pause = min(pause * 2, longest)


def _with_bearer(details: grpc.aio.ClientCallDetails, token: str) -> grpc.aio.ClientCallDetails:
    metadata = grpc.aio.Metadata(*(details.metadata or ()))
    metadata.add("authorization", f"Bearer {token}")
    return grpc.aio.ClientCallDetails(
        method=details.method,
        timeout=details.timeout,
        metadata=metadata,
        credentials=details.credentials,
        wait_for_ready=details.wait_for_ready,
    )


class _UnaryBearer(grpc.aio.UnaryUnaryClientInterceptor):
    def __init__(self, token: str) -> None:
        self._token = token

    async def intercept_unary_unary(
        self, continuation: Callable[..., Any], client_call_details: grpc.aio.ClientCallDetails, request: Any
    ) -> Any:
        return await continuation(_with_bearer(client_call_details, self._token), request)


class _StreamBearer(grpc.aio.UnaryStreamClientInterceptor):
    def __init__(self, token: str) -> None:
        self._token = token

    async def intercept_unary_stream(
        self, continuation: Callable[..., Any], client_call_details: grpc.aio.ClientCallDetails, request: Any
    ) -> Any:
        return await continuation(_with_bearer(client_call_details, self._token), request)
