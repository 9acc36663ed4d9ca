"""The services beside the task service, as tiny real gRPC servers of their contracts."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
from branchline.v1.common_pb2 import BlobReference
from branchline.v1.errors_pb2 import ErrorReason
from branchline_internal.repository.v1 import repository_pb2, repository_pb2_grpc
from branchline_internal.sandbox.v1 import sandbox_pb2, sandbox_pb2_grpc
from branchline_internal.spine.v1 import push_pb2, push_pb2_grpc
from google.protobuf.message import Message
from grpc_status import rpc_status

from services.runtime.errors import DomainError

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass
class Refusal:
    """How a method answers instead of doing it."""

    code: grpc.StatusCode
    words: str
    reason: ErrorReason.ValueType | None = None
    """Why, as one of our services says it; None is another one's error."""
    times: int = 1_000_000
    session_id: str = ""
    """The one session that it is about; empty means all."""


@dataclass
class SandboxNeighbour(sandbox_pb2_grpc.SandboxServiceServicer):
    """Takes everything down; refuses what a test says, for all sandboxes or one."""

    calls: list[Message] = field(default_factory=list[Message])
    refusals: dict[str, Refusal] = field(default_factory=dict[str, Refusal])
    hanging: set[str] = field(default_factory=set[str])
    """Sessions whose calls never return."""
    output: str = ""
    errors: str = ""
    exit_code: int = 0
    principals: list[str] = field(default_factory=list[str])

    def of(self, message: type[Message], **fields: str) -> list[Any]:
        """Return the calls of a kind that have these fields."""
        found = [call for call in self.calls if isinstance(call, message)]
        return [one for one in found if all(getattr(one, name) == value for name, value in fields.items())]

    async def _take(self, request: Any, context: Context) -> None:
        self.calls.append(request)
        self.principals += [str(value) for key, value in context.invocation_metadata() or () if "principal" in key]
        if getattr(request, "session_id", "") in self.hanging:
            await asyncio.Event().wait()
        name = type(request).__name__.removesuffix("Request")
        refusal = self.refusals.get(name)
        if refusal is not None and refusal.times > 0 and refusal.session_id in ("", getattr(request, "session_id", "")):
            refusal.times -= 1
            if refusal.reason is not None:
                error = DomainError(refusal.reason, refusal.words)
                error.code = refusal.code
                await context.abort_with_status(rpc_status.to_status(error.to_status()))
            await context.abort(refusal.code, refusal.words)

    async def CreateSandbox(self, request: Any, context: Context) -> Any:
        await self._take(request, context)
        return sandbox_pb2.CreateSandboxResponse()

    async def DestroySandbox(self, request: Any, context: Context) -> Any:
        await self._take(request, context)
        return sandbox_pb2.DestroySandboxResponse()

    async def Execute(self, request: Any, context: Context) -> Any:
        await self._take(request, context)
        output = self.output or f"{request.environment['BRANCH']}\n"
        return sandbox_pb2.ExecuteResponse(exit_code=self.exit_code, stdout=output, stderr=self.errors)

    async def PutFile(self, request: Any, context: Context) -> Any:
        await self._take(request, context)
        return sandbox_pb2.PutFileResponse()

    async def OpenSession(self, request: Any, context: Context) -> Any:
        await self._take(request, context)
        return sandbox_pb2.OpenSessionResponse()

    async def StartTurn(self, request: Any, context: Context) -> Any:
        await self._take(request, context)
        return sandbox_pb2.StartTurnResponse()

    async def CancelTurn(self, request: Any, context: Context) -> Any:
        await self._take(request, context)
        return sandbox_pb2.CancelTurnResponse()

    async def AnswerInput(self, request: Any, context: Context) -> Any:
        await self._take(request, context)
        return sandbox_pb2.AnswerInputResponse()

    async def CloseSession(self, request: Any, context: Context) -> Any:
        await self._take(request, context)
        return sandbox_pb2.CloseSessionResponse()


@dataclass
class RepositoryNeighbour(repository_pb2_grpc.RepositoryServiceServicer, push_pb2_grpc.PushServiceServicer):
    """Takes everything that is pushed up, and has no credentials."""

    pushed: list[push_pb2.PushEntry] = field(default_factory=list[push_pb2.PushEntry])
    calls: list[Message] = field(default_factory=list[Message])

    async def GetGitCredential(self, request: Any, context: Context) -> Any:
        return repository_pb2.GetGitCredentialResponse()

    async def ClaimBlobs(self, request: Any, context: Context) -> Any:
        self.calls.append(request)
        if "blob_gone" in request.blob_ids:
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no blob")
        known = [BlobReference(blob_id=one, display_name=f"{one}.png", size_bytes=3) for one in request.blob_ids]
        return repository_pb2.ClaimBlobsResponse(blobs=known)

    async def FetchBlob(self, request: Any, context: Context) -> Any:
        self.calls.append(request)
        return repository_pb2.FetchBlobResponse(data=b"abc"[request.offset :])

    async def StoreBlob(self, request: Any, context: Context) -> Any:
        self.calls.append(request)
        blob = BlobReference(blob_id="blob_new", media_type=request.media_type, size_bytes=len(request.data))
        return repository_pb2.StoreBlobResponse(blob=blob)

    async def Push(
        self, request_iterator: AsyncIterator[push_pb2.PushRequest], context: Context
    ) -> AsyncIterator[push_pb2.PushResponse]:
        async for request in request_iterator:
            self.pushed += request.entries
            yield push_pb2.PushResponse(batch=request.batch)
