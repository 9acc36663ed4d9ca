"""A bare client for tests: one channel, a bearer token on every call, generated stubs, and gRPC's own errors.

The client for people is `branchline`; tests of the contract see what is on the wire.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any, Self

import grpc
from branchline.v1 import (
    agents_pb2_grpc,
    blobs_pb2_grpc,
    files_pb2_grpc,
    history_pb2,
    history_pb2_grpc,
    organizations_pb2,
    organizations_pb2_grpc,
    processes_pb2_grpc,
    repositories_pb2_grpc,
    secrets_pb2_grpc,
    server_pb2_grpc,
    sessions_pb2_grpc,
    tasks_pb2,
    tasks_pb2_grpc,
    users_pb2_grpc,
)

_OPTIONS = (("grpc.max_reconnect_backoff_ms", 2_000), ("grpc.use_local_subchannel_pool", 1))
_TRANSIENT = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED})
_SILENCE_SECONDS = 30.0
_PAUSE_SECONDS = 0.1

Frames = AsyncGenerator[Any, None]


class Client:
    """Everything that the gateway offers, as stubs."""

    def __init__(self, address: str, token: str = "") -> None:
        interceptors = [_UnaryBearer(token), _StreamBearer(token)] if token else []
        self.channel = grpc.aio.insecure_channel(address, options=_OPTIONS, interceptors=interceptors)
        self.agents = agents_pb2_grpc.AgentServiceStub(self.channel)
        self.blobs = blobs_pb2_grpc.BlobServiceStub(self.channel)
        self.files = files_pb2_grpc.FileServiceStub(self.channel)
        self.history = history_pb2_grpc.HistoryServiceStub(self.channel)
        self.organizations = organizations_pb2_grpc.OrganizationServiceStub(self.channel)
        self.processes = processes_pb2_grpc.ProcessServiceStub(self.channel)
        self.repositories = repositories_pb2_grpc.RepositoryServiceStub(self.channel)
        self.secrets = secrets_pb2_grpc.SecretServiceStub(self.channel)
        self.server = server_pb2_grpc.ServerServiceStub(self.channel)
        self.sessions = sessions_pb2_grpc.SessionServiceStub(self.channel)
        self.tasks = tasks_pb2_grpc.TaskServiceStub(self.channel)
        self.users = users_pb2_grpc.UserServiceStub(self.channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self.channel.close()

    def watch_organization(self, organization_id: str, resume_token: str = "", **fields: Any) -> Frames:
        """Watch an organization for ever, through reconnects; yields responses."""

        def connect(token: str) -> Any:
            request = organizations_pb2.WatchOrganizationRequest(
                organization_id=organization_id, resume_token=token, **fields
            )
            return self.organizations.WatchOrganization(request)

        return _watch(connect, resume_token)

    def watch_task(self, task_id: str, resume_token: str = "", **fields: Any) -> Frames:
        """Watch a task for ever, through reconnects; yields responses."""

        def connect(token: str) -> Any:
            return self.tasks.WatchTask(tasks_pb2.WatchTaskRequest(task_id=task_id, resume_token=token, **fields))

        return _watch(connect, resume_token)

    def watch_history(self, organization_id: str, resume_token: str = "", **fields: Any) -> Frames:
        """Watch an organization's feed for ever, through reconnects; yields responses."""

        def connect(token: str) -> Any:
            request = history_pb2.WatchHistoryRequest(organization_id=organization_id, resume_token=token, **fields)
            return self.history.WatchHistory(request)

        return _watch(connect, resume_token)


async def _watch(connect: Callable[[str], Any], resume_token: str) -> Frames:
    """Yield frames; after a break, or a silence without heartbeats, go on from the last resume token."""
    while True:
        call = connect(resume_token)
        try:
            while True:
                async with asyncio.timeout(_SILENCE_SECONDS):
                    response = await call.read()
                if response is grpc.aio.EOF:
                    break
                resume_token = response.header.resume_token or resume_token
                yield response
        except grpc.aio.AioRpcError as error:
            if error.code() not in _TRANSIENT:
                raise
        except TimeoutError:
            pass
        finally:
            call.cancel()
        await asyncio.sleep(_PAUSE_SECONDS)


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
