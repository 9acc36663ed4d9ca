"""Forwards public methods to the service that owns them: check, sign, call, pass the answer on as it is.

A method is defined once, in the public contract, and implemented where the state lives. The request is decoded once,
to be validated and placed; its bytes are what travels on. Answers are not decoded.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any, cast

import grpc
from branchline.v1.vocabulary_pb2 import ERROR_REASON_NOT_READY, ERROR_REASON_TOKEN_LIMITED
from branchline_internal.organization.v1.organization_pb2 import AwaitConsistencyRequest
from branchline_internal.organization.v1.organization_pb2_grpc import OrganizationServiceStub
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2

from gateway.allowance import CallersLanes
from gateway.caller import CACHE_SECONDS, Authenticator, current_caller
from gateway.placement import FOR_EVER, Placement
from gateway.routes import ORGANIZATION, USER, Route
from services.runtime.client import SigningChannel
from services.runtime.errors import PermissionDenied, Unavailable, detail_of, reason_of
from services.runtime.logging import get_logger
from services.runtime.principal import Principal, Signer
from services.runtime.retry import Backoff
from services.runtime.serving import Context, Given, Handler, Serving

log = get_logger(__name__)

_PATIENCE_SECONDS = 10.0
"""How long a call is repeated while its owner cannot be reached, or has not been born yet."""

_MARGIN_SECONDS = 0.5
"""What is left of a call's deadline, or a tenth of it, for the answer to arrive: who hears nothing learns no reason."""


class Forwarder:
    """Makes handlers that forward."""

    def __init__(
        self,
        channels: Mapping[str, SigningChannel],
        organization: OrganizationServiceStub,
        authenticator: Authenticator,
        placement: Placement,
        signer: Signer,
    ) -> None:
        self._channels = channels
        self._organization = organization
        self._authenticator = authenticator
        self._placement = placement
        self._signer = signer
        self._lanes = CallersLanes()

    def handler(self, serving: Serving, method: MethodDescriptor, route: Route) -> Handler:
        """Return the handler of one method."""
        channel = self._channels[route.owner].raw
        path = f"/{method.containing_service.full_name}/{method.name}"
        response_type = GetMessageClass(method.output_type)
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(path)
        call_stream: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(path)

        async def forward(given: Given, context: Context) -> bytes:
            deadline = asyncio.get_running_loop().time() + _seconds(context, route)
            async with self._lanes.hold(current_caller().user.id):
                answer, principal = await self._call(call, given, route, deadline)
            if route.settle:
                await self._settle(response_type.FromString(answer), principal, deadline)
            if route.people:
                self._authenticator.forget(principal.user_id)
                self._authenticator.forget(str(getattr(given.message, "user_id", "")))
            return answer

        async def forward_stream(given: Given, context: Context) -> AsyncIterator[bytes]:
            seconds = _seconds(context, route)
            principal = await self._admit(given.message, route, seconds)
            answers = call_stream(given.data, metadata=self._signer.metadata(principal), timeout=seconds)
            try:
                async for answer in answers:
                    yield answer
            finally:
                answers.cancel()

        return serving.handler(method, forward_stream if route.stream else forward, forwards=True)

    async def _admit(self, request: Message, route: Route, seconds: float) -> Principal:
        """Return the caller's principal, or raise if the caller may not do this."""
        caller = current_caller()
        if caller.role_limit and not route.target and not route.read:
            sentence = "this token is limited to a role; it cannot change its user"
            raise PermissionDenied(ERROR_REASON_TOKEN_LIMITED, sentence)
        token = str(getattr(request, "consistency_token", ""))
        wanted = _wanted(request, route)
        if token:
            principal = await self._placement.place_new(caller, route.target, wanted, token, seconds)
        else:
            known = FOR_EVER if route.owner != USER else CACHE_SECONDS  # the user service knows no tasks
            principal = await self._placement.place(
                caller, route.target, wanted, defaults=route.defaults, at_most_seconds=known
            )
        if route.target:
            principal.require(route.role)
        return principal

    async def _call(self, call: Any, given: Given, route: Route, deadline: float) -> tuple[bytes, Principal]:
        """Call the owner, again and again for a while if nothing can have happened there yet."""
        time = asyncio.get_running_loop().time
        patient_until = min(deadline, time() + _PATIENCE_SECONDS)
        backoff = Backoff(first_seconds=0.1, most_seconds=1.0)
        while True:
            principal = await self._admit(given.message, route, deadline - time())
            metadata = self._signer.metadata(principal)
            try:
                return await call(given.data, metadata=metadata, timeout=deadline - time()), principal
            except grpc.aio.AioRpcError as error:
                unborn = _is_missing(error, _wanted(given.message, route)) and route.owner != ORGANIZATION
                if not unborn and not (route.safe and error.code() == grpc.StatusCode.UNAVAILABLE):
                    raise
                pause = backoff.next_seconds()
                if time() + pause > patient_until:
                    if unborn:
                        sentence = "it is made, but its coordinator has not answered yet; try again"
                        raise Unavailable(ERROR_REASON_NOT_READY, sentence) from error
                    raise
            if unborn:
                self._placement.forget(route.target, _wanted(given.message, route))
            await asyncio.sleep(pause)

    async def _settle(self, answer: Message, principal: Principal, deadline: float) -> None:
        """Wait until the next call finds what this one made. It is made in any case, so a timeout is no error."""
        request = AwaitConsistencyRequest(
            consistency_token=str(getattr(answer, "consistency_token", "")), organization_id=principal.organization_id
        )
        left = deadline - asyncio.get_running_loop().time()
        if left <= 0 or not request.consistency_token:
            return
        metadata = self._signer.metadata(principal)
        try:
            await self._organization.AwaitConsistency(request, metadata=metadata, timeout=min(left, _PATIENCE_SECONDS))
        except grpc.aio.AioRpcError as error:
            log.info("index behind after a command", reason=reason_of(error))


def _wanted(request: Message, route: Route) -> str:
    return str(getattr(request, route.target)) if route.target else ""


def _is_missing(error: grpc.aio.AioRpcError, wanted: str) -> bool:
    """Say whether the owner does not know the very resource that the organization has just placed there."""
    if error.code() != grpc.StatusCode.NOT_FOUND or not wanted:
        return False
    return detail_of(error, error_details_pb2.ResourceInfo).resource_name == wanted


def _seconds(context: Context, route: Route) -> float:
    """Return how long a call may take inside."""
    left = cast("float | None", context.time_remaining())  # None without a deadline
    if left is None:
        return route.timeout_seconds
    return min(left - min(_MARGIN_SECONDS, left / 10), route.timeout_seconds)
