"""A server that does as it is told: real gRPC with every method of the contract, whose answers the test writes."""

import asyncio
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2


@dataclass(frozen=True)
class Failure:
    """What a call ends with in place of an answer."""

    code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE
    reason: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    field: str = ""
    retry: timedelta | None = None
    domain: str = "branchline.dev"

    async def raise_in(self, context: Any) -> None:
        details: list[Message] = []
        if self.reason:
            metadata = dict(self.metadata)
            details.append(error_details_pb2.ErrorInfo(reason=self.reason, domain=self.domain, metadata=metadata))
        if self.field:
            violation = error_details_pb2.BadRequest.FieldViolation(field=self.field)
            details.append(error_details_pb2.BadRequest(field_violations=[violation]))
        if self.retry is not None:
            details.append(error_details_pb2.RetryInfo(retry_delay=self.retry))
        status = status_pb2.Status(code=self.code.value[0], message="as told")
        for detail in details:
            packed = AnyMessage()
            packed.Pack(detail)
            status.details.append(packed)
        await context.abort(self.code, "as told", (("grpc-status-details-bin", status.SerializeToString()),))


@dataclass
class Server(grpc.GenericRpcHandler):
    """Answers calls of a method with what is in `answers` for it, an empty response when nothing is left.

    Every stream takes from `streamed` in its turn; a failure there ends it, and the next goes on behind it.
    """

    address: str = ""
    answers: defaultdict[str, deque[Message | Failure]] = field(
        default_factory=lambda: defaultdict[str, deque[Message | Failure]](deque)
    )
    streamed: asyncio.Queue[Message | Failure] = field(default_factory=asyncio.Queue[Message | Failure])
    requests: list[Any] = field(default_factory=list[Any])
    """Every request, in the order in which they came."""
    authorizations: list[str] = field(default_factory=list[str])
    hangs: bool = False

    def stream(self, *items: Message | Failure) -> None:
        for item in items:
            self.streamed.put_nowait(item)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        name = handler_call_details.method.lstrip("/").replace("/", ".")
        method = descriptor_pool.Default().FindMethodByName(name)
        response = GetMessageClass(method.output_type)
        streams = method.server_streaming
        kind: Any = grpc.unary_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler

        async def answer(request: Message, context: Any) -> Message:
            self._note(request, context)
            if self.hangs:
                await asyncio.Event().wait()
            waiting = self.answers[method.name]
            item = waiting.popleft() if waiting else response()
            if isinstance(item, Failure):
                await item.raise_in(context)
            return item  # pyright: ignore[reportReturnType] - `raise_in` has ended the call

        async def stream(request: Message, context: Any) -> AsyncIterator[Message]:
            self._note(request, context)
            while True:
                item = await self.streamed.get()
                if isinstance(item, Failure):
                    await item.raise_in(context)
                else:
                    yield item

        take = GetMessageClass(method.input_type).FromString
        return kind(stream if streams else answer, take, _serialize)

    async def called(self, times: int) -> None:
        """Wait until so many calls have come."""
        async with asyncio.timeout(10):
            while len(self.requests) < times:  # noqa: ASYNC110 - gRPC has no event for it
                await asyncio.sleep(0.02)

    def _note(self, request: Message, context: Any) -> None:
        self.requests.append(request)
        self.authorizations.append(dict(context.invocation_metadata()).get("authorization", ""))


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


@asynccontextmanager
async def served(credentials: grpc.ServerCredentials | None = None) -> AsyncGenerator[Server, None]:
    """Serve on a port of its own, with TLS if credentials are given."""
    server, grpc_server = Server(), grpc.aio.server()
    grpc_server.add_generic_rpc_handlers((server,))
    if credentials is None:
        port = grpc_server.add_insecure_port("127.0.0.1:0")
    else:
        port = grpc_server.add_secure_port("127.0.0.1:0", credentials)
    server.address = f"127.0.0.1:{port}"
    await grpc_server.start()
    try:
        yield server
    finally:
        await grpc_server.stop(0)
