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
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from gateway.caller import current_caller
from gateway.placement import Placement
from gateway.routes import PACKAGE, Route
from services.runtime.errors import DomainError, PermissionDenied, Unavailable, reason_of
from services.runtime.principal import METADATA_KEY, Signer
from services.runtime.retry import Backoff

log = structlog.get_logger()

_PATIENCE_SECONDS = 10.0
"""How long a call is repeated while its owner cannot be reached, or has not been born yet."""

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
            answer = await self._call(call, request, route, _seconds(context, route))
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
        token = str(getattr(request, "consistency_token", ""))
        caller = current_caller()
        if caller.role_limit and not route.target and not route.read:
            raise PermissionDenied("TOKEN_LIMITED", "this token is limited to a role; it cannot change its user")
        principal = await self._placement.place(caller, route.target, _wanted(request, route), token, defaults=route.defaults)
        if route.target:
            principal.require(route.role)
        return ((METADATA_KEY, self._signer.sign(principal)),)

    async def _call(self, call: Any, request: Message, route: Route, seconds: float) -> bytes:
        """Call the owner, again and again for a while if nothing can have happened there yet."""
        clock = asyncio.get_running_loop()
        deadline = clock.time() + min(seconds, _PATIENCE_SECONDS)
        backoff = Backoff(first_seconds=0.1, most_seconds=1.0)
        while True:
            metadata = await self._admit(request, route)
            try:
                return await call(request, metadata=metadata, timeout=seconds)
            except grpc.aio.AioRpcError as error:
                unborn = _is_missing(error, _wanted(request, route))
                if not unborn and not (route.safe and error.code() == grpc.StatusCode.UNAVAILABLE):
                    raise
                pause = backoff.next_seconds()
                if clock.time() + pause > deadline:
                    if unborn:
                        raise Unavailable(
                            "NOT_READY", "it is made, but its coordinator has not answered yet; try again"
                        ) from error
                    raise
            if unborn:
                self._placement.forget(route.target, _wanted(request, route))
            await asyncio.sleep(pause)

    async def _settle(self, answer: Message) -> None:
        """Wait until the next call finds what this one made. It is made in any case, so a timeout is no error."""
        try:
            await self._placement.await_consistency(str(getattr(answer, "consistency_token", "")))
        except (DomainError, grpc.aio.AioRpcError) as error:
            log.info("index behind after a command", reason=reason_of(error))


def _wanted(request: Message, route: Route) -> str:
    return str(getattr(request, route.target)) if route.target else ""


def _is_missing(error: grpc.aio.AioRpcError, wanted: str) -> bool:
    """Say whether the owner does not know the very resource that the organization has just placed there."""
    if error.code() != grpc.StatusCode.NOT_FOUND or not wanted:
        return False
    status = rpc_status.from_call(error)  # pyright: ignore[reportArgumentType]
    resource = error_details_pb2.ResourceInfo()
    return status is not None and any(
        detail.Unpack(resource) and resource.resource_name == wanted for detail in status.details
    )


def _seconds(context: Context, route: Route) -> float:
    left = cast("float | None", context.time_remaining())  # None without a deadline
    return route.timeout_seconds if left is None else min(left, route.timeout_seconds)
