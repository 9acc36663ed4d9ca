"""Forwards public methods to the service that owns them: check, sign, call, pass the answer on as it is.

A method is defined once, in the public contract, and implemented where the state lives. Answers are not decoded.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any, cast

import grpc
import structlog
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from gateway.caller import current_caller
from gateway.placement import Placement
from gateway.routes import PACKAGE, Route
from services.runtime.errors import DomainError, PermissionDenied, reason_of
from services.runtime.principal import METADATA_KEY, Signer
from services.runtime.retry import Backoff

log = structlog.get_logger()

_ATTEMPTS = 4

Context = grpc.aio.ServicerContext[Any, Any]
Metadata = tuple[tuple[str, str], ...]


class Forwarder:
    """Makes handlers that forward."""

    def __init__(self, channels: Mapping[str, grpc.aio.Channel], placement: Placement, signer: Signer) -> None:
        self._channels = channels
        self._placement = placement
        self._signer = signer

    def handler(self, name: str, method: MethodDescriptor, route: Route) -> "grpc.RpcMethodHandler[Any, Any]":
        """Return the handler of one method."""
        request_type = GetMessageClass(method.input_type)
        response_type = GetMessageClass(method.output_type)
        channel, path = self._channels[route.owner], f"/{PACKAGE}.{name}"
        serializer = request_type.SerializeToString
        call = channel.unary_unary(path, request_serializer=serializer, response_deserializer=None)
        call_stream = channel.unary_stream(path, request_serializer=serializer, response_deserializer=None)

        async def forward(request: Message, context: Context) -> bytes:
            metadata = await self._admit(request, route)
            answer = await self._call(call, request, metadata, _seconds(context, route), safe=route.safe)
            if route.settle:
                await self._settle(response_type.FromString(answer))
            return answer

        async def forward_stream(request: Message, context: Context) -> AsyncIterator[bytes]:
            metadata = await self._admit(request, route)
            answers = call_stream(request, metadata=metadata, timeout=_seconds(context, route))
            try:
                async for answer in answers:
                    yield answer
            finally:
                answers.cancel()

        if route.stream:
            return grpc.unary_stream_rpc_method_handler(
                forward_stream, request_deserializer=request_type.FromString, response_serializer=None
            )
        return grpc.unary_unary_rpc_method_handler(
            forward, request_deserializer=request_type.FromString, response_serializer=None
        )

    async def _admit(self, request: Message, route: Route) -> Metadata:
        """Return the caller's signed principal, or raise if the caller may not do this."""
        wanted = str(getattr(request, route.target)) if route.target else ""
        token = str(getattr(request, "consistency_token", ""))
        caller = current_caller()
        if caller.role_limit and not route.target and not route.read:
            raise PermissionDenied("TOKEN_LIMITED", "this token is limited to a role; it cannot change its user")
        principal = await self._placement.place(caller, route.target, wanted, token, defaults=route.defaults)
        if route.target:
            principal.require(route.role)
        return ((METADATA_KEY, self._signer.sign(principal)),)

    async def _call(self, call: Any, request: Message, metadata: Metadata, seconds: float, *, safe: bool) -> bytes:
        """Call the owner; a safe call is repeated while the owner cannot be reached."""
        backoff = Backoff(first_seconds=0.1, most_seconds=1.0)
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return await call(request, metadata=metadata, timeout=seconds)
            except grpc.aio.AioRpcError as error:
                if error.code() != grpc.StatusCode.UNAVAILABLE or not safe or attempt == _ATTEMPTS:
                    raise
            await asyncio.sleep(backoff.next_seconds())
        raise AssertionError("the last attempt returns or raises")

    async def _settle(self, answer: Message) -> None:
        """Wait until the next call finds what this one made. It is made in any case, so a timeout is no error."""
        try:
            await self._placement.await_consistency(str(getattr(answer, "consistency_token", "")))
        except (DomainError, grpc.aio.AioRpcError) as error:
            log.info("index behind after a command", reason=reason_of(error))


def _seconds(context: Context, route: Route) -> float:
    left = cast("float | None", context.time_remaining())  # None without a deadline
    return route.timeout_seconds if left is None else min(left, route.timeout_seconds)
