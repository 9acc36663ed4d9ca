"""How calls are made: with a credential, a request id and a deadline, again where that is safe, and fresh enough."""

import asyncio
import random
import uuid
from collections import deque
from collections.abc import AsyncGenerator
from functools import cache
from typing import TypeVar

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pb2 import MethodOptions
from google.protobuf.message import Message

from branchline.errors import BranchlineError, error_of
from branchline.tls import Endpoint, TlsError
from branchline.v1.errors_pb2 import ERROR_REASON_UNSPECIFIED
from branchline.v1.options_pb2 import ACCESS_READ, rule

MESSAGE_BYTES = 4 * 1024 * 1024
"""No server sends a larger message."""

_OPTIONS = (
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.use_local_subchannel_pool", 1),  # a connection of its own: the gateway bounds what one carries at once
)
_RETRY_SECONDS = (0.05, 2.0)
_REMEMBERED_TOKENS = 16
_TRANSIENT = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED})

R = TypeVar("R", bound=Message)


class Caller:
    """Makes calls over one channel.

    With `consistent`, what was changed through it is visible to all that is read through it later.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        token: str,
        seconds: float,
        *,
        consistent: bool = False,
        channel: grpc.aio.Channel | None = None,
    ) -> None:
        self.channel: grpc.aio.Channel = channel or endpoint.open(_OPTIONS)
        self._endpoint = endpoint
        self._token = token
        self._seconds = seconds
        self._tokens: deque[str] | None = deque(maxlen=_REMEMBERED_TOKENS) if consistent else None

    def consistently(self) -> "Caller":
        """Return a caller that sees its own changes, over the same channel."""
        return Caller(self._endpoint, self._token, self._seconds, consistent=True, channel=self.channel)

    async def call(
        self, method: MethodDescriptor, request: Message, response: type[R], timeout_seconds: float | None = None
    ) -> R:
        """Make a unary call; raise BranchlineError. It is repeated where that is safe, until its time is over."""
        request = self._prepared(method, request)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (self._seconds if timeout_seconds is None else timeout_seconds)
        pause, longest = _RETRY_SECONDS
        make: grpc.aio.UnaryUnaryMultiCallable[Message, R] = self.channel.unary_unary(
            _path(method), request_serializer=_serialize, response_deserializer=response.FromString
        )
        looked = False
        while True:
            try:
                answer = await make(request, timeout=max(0.0, deadline - loop.time()), metadata=self._metadata())
            except grpc.aio.AioRpcError as error:
                failure = error_of(error)
                if not looked:
                    looked = True
                    await self._look(failure, deadline - loop.time())
                wait = failure.retry_delay.total_seconds() if failure.retry_delay is not None else pause
                again = error.code() in _TRANSIENT and _repeatable(method, request) and "limit" not in failure.metadata
                if not again or loop.time() + wait >= deadline:
                    raise failure from error
                await asyncio.sleep(random.uniform(wait / 2, wait) if failure.retry_delay is None else wait)
                pause = min(pause * 2, longest)
            else:
                token = str(getattr(answer, "consistency_token", ""))
                if token and self._tokens is not None:
                    self._tokens.append(token)
                return answer

    async def stream(
        self, method: MethodDescriptor, request: Message, response: type[R], silence_seconds: float | None = None
    ) -> AsyncGenerator[R, None]:
        """Open a stream once; raise BranchlineError, and TimeoutError after a silence."""
        request = self._prepared(method, request)
        make: grpc.aio.UnaryStreamMultiCallable[Message, R] = self.channel.unary_stream(
            _path(method), request_serializer=_serialize, response_deserializer=response.FromString
        )
        call = make(request, metadata=self._metadata())
        try:
            while True:
                async with asyncio.timeout(silence_seconds):
                    answer = await call.read()
                if not isinstance(answer, response):  # the end
                    return
                yield answer
        except grpc.aio.AioRpcError as error:
            failure = error_of(error)
            await self._look(failure)
            raise failure from error
        finally:
            call.cancel()

    async def _look(self, failure: BranchlineError, seconds: float | None = None) -> None:
        """Raise TlsError if that is why the server could not be reached, and is seen in time: gRPC does not say."""
        if failure.code == grpc.StatusCode.UNAVAILABLE and failure.reason == ERROR_REASON_UNSPECIFIED:
            fault = await self._endpoint.fault(seconds)
            if fault is not None:
                raise fault from failure

    def _prepared(self, method: MethodDescriptor, request: Message) -> Message:
        """Return the request as it goes out: with an id of its own, and fresh enough for this caller."""
        fields = request.DESCRIPTOR.fields_by_name
        identified = "request_id" not in fields or bool(getattr(request, "request_id", ""))
        fresh = (
            self._tokens
            if "consistency" in fields and method.GetOptions().Extensions[rule].access == ACCESS_READ
            else None
        )
        if identified and not fresh:
            return request
        prepared = type(request)()
        prepared.CopyFrom(request)
        if not identified:
            setattr(prepared, "request_id", str(uuid.uuid4()))  # noqa: B010 - not every request has one
        for token in fresh or ():
            given = prepared.consistency.at_least_as_fresh  # pyright: ignore[reportUnknownMemberType, reportAttributeAccessIssue, reportUnknownVariableType]
            if token not in given and len(given) < _REMEMBERED_TOKENS:  # pyright: ignore[reportUnknownArgumentType]
                given.append(token)  # pyright: ignore[reportUnknownMemberType]
        return prepared

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self._token}"),) if self._token else ()


def is_transient(error: BranchlineError) -> bool:
    """Say whether a watch that failed so goes on by itself."""
    return not isinstance(error, TlsError) and error.code in {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.INTERNAL,  # how a broken connection sometimes looks
    }


def _repeatable(method: MethodDescriptor, request: Message) -> bool:
    idempotent = method.GetOptions().idempotency_level != MethodOptions.IDEMPOTENCY_UNKNOWN
    return idempotent and bool(getattr(request, "request_id", "given"))


@cache
def _path(method: MethodDescriptor) -> str:
    return f"/{method.containing_service.full_name}/{method.name}"


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()
