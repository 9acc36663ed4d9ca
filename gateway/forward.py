"""Forwards public methods to the service that owns them: check, sign, call, pass the answer on as it is.

A method is defined once, in the public contract, and implemented where the state lives. The request is decoded once,
to be validated and placed; its bytes are what travels on. Answers are not decoded.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any, cast

import grpc
from branchline.v1.common_pb2 import Consistency
from branchline.v1.errors_pb2 import ERROR_REASON_INDEX_BEHIND, ERROR_REASON_NOT_READY, ERROR_REASON_TOKEN_LIMITED
from branchline_internal.organization.v1.organization_pb2 import AwaitConsistencyRequest
from branchline_internal.organization.v1.organization_pb2_grpc import OrganizationServiceStub
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2

from gateway.allowance import CallersLanes
from gateway.caller import CACHE_SECONDS, Authenticator, current_caller
from gateway.placement import FOR_EVER, Placement
from gateway.routes import ORGANIZATION, USER, Route
from gateway.standing import standing_check, while_allowed
from services.runtime.client import SigningChannel
from services.runtime.errors import PermissionDenied, Unavailable, detail_of, error_reason, reason_of
from services.runtime.logging import get_logger
from services.runtime.principal import Principal
from services.runtime.retry import Backoff
from services.runtime.serving import Context, Given, Handler, Serving

log = get_logger(__name__)

_PATIENCE_SECONDS = 10.0
"""How long a call is repeated while its owner cannot be reached, or has not been born yet."""

_MARGIN_SECONDS = 0.5
"""What is left of a call's deadline, or a tenth of it, for the answer to arrive: who hears nothing learns no reason."""

_ANY = Consistency()


class Forwarder:
    """Makes handlers that forward."""

    def __init__(
        self,
        channels: Mapping[str, SigningChannel],
        organization: OrganizationServiceStub,
        authenticator: Authenticator,
        placement: Placement,
    ) -> None:
        self._channels = channels
        self._organization = organization
        self._authenticator = authenticator
        self._placement = placement
        self._lanes = CallersLanes()

    def handler(self, serving: Serving, route: Route) -> Handler:
        """Return the handler of one method."""
        method = route.method
        channel = self._channels[route.owner]
        path = f"/{method.containing_service.full_name}/{method.name}"
        response_type = GetMessageClass(method.output_type)
        call, call_stream = channel.unary_unary(path), channel.unary_stream(path)

        async def forward(given: Given, context: Context) -> bytes:
            deadline = asyncio.get_running_loop().time() + seconds_left(context, route.seconds)
            async with self._lanes.hold(current_caller().user.id):
                answer, principal = await self._call(call, given, route, deadline)
            if route.settle:
                await self._settle(response_type.FromString(answer), principal, deadline)
            if route.people:
                self._authenticator.forget(principal.user_id)
                self._authenticator.forget(_named_user(given.message))
            return answer

        async def forward_stream(given: Given, context: Context) -> AsyncIterator[bytes]:
            seconds = seconds_left(context, route.seconds)
            principal = await self._admit(given.message, route, seconds)
            check = standing_check(
                self._authenticator, self._placement, route.target, route.wanted(given.message), route.role
            )
            answers = call_stream(given.data, metadata=channel.metadata(principal), timeout=seconds)
            async with aclosing(while_allowed(answers, check)) as allowed:
                async for answer in allowed:
                    yield answer

        return serving.handler(method, forward_stream if route.stream else forward, forwards=True)

    async def _admit(self, request: Message, route: Route, seconds: float) -> Principal:
        """Return the caller's principal, or raise if the caller may not do this."""
        caller = current_caller()
        if caller.limited and not route.target and not route.read:
            raise PermissionDenied(ERROR_REASON_TOKEN_LIMITED, "this token has a scope; it cannot change its user")
        wanted = route.wanted(request)
        consistency: Consistency = getattr(request, "consistency", _ANY)
        if consistency.at_least_as_fresh:
            principal = await self._placement.place_new(caller, route.target, wanted, consistency, seconds)
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
        repeatable = route.repeatable(given.message)
        while True:
            principal = await self._admit(given.message, route, deadline - time())
            metadata = self._channels[route.owner].metadata(principal)
            try:
                return await call(given.data, metadata=metadata, timeout=deadline - time()), principal
            except grpc.aio.AioRpcError as error:
                unborn = _is_missing(error, route.wanted(given.message)) and route.owner != ORGANIZATION
                if not unborn and not (repeatable and _is_passing(error)):
                    raise
                pause = backoff.next_seconds()
                if time() + pause > patient_until:
                    if unborn:
                        sentence = "it is made, but its coordinator has not answered yet; try again"
                        raise Unavailable(ERROR_REASON_NOT_READY, sentence) from error
                    raise
            if unborn:
                self._placement.forget(route.target, route.wanted(given.message))
            await asyncio.sleep(pause)

    async def _settle(self, answer: Message, principal: Principal, deadline: float) -> None:
        """Wait until the next call finds what this one made. It is made in any case, so a timeout is no error."""
        token = str(getattr(answer, "consistency_token", ""))
        left = deadline - asyncio.get_running_loop().time()
        if left <= 0 or not token:
            return
        request = AwaitConsistencyRequest(
            consistency=Consistency(at_least_as_fresh=[token]), organization_id=principal.organization_id
        )
        metadata = self._channels[ORGANIZATION].metadata(principal)
        try:
            await self._organization.AwaitConsistency(request, metadata=metadata, timeout=min(left, _PATIENCE_SECONDS))
        except grpc.aio.AioRpcError as error:
            log.info("index behind after a command", reason=reason_of(error))


def _is_passing(error: grpc.aio.AioRpcError) -> bool:
    """Say whether the owner may answer in a moment. An index that is behind was waited for as long as was asked."""
    return error.code() == grpc.StatusCode.UNAVAILABLE and error_reason(error) != ERROR_REASON_INDEX_BEHIND


def _is_missing(error: grpc.aio.AioRpcError, wanted: str) -> bool:
    """Say whether the owner does not know the very resource that the organization has just placed there."""
    if error.code() != grpc.StatusCode.NOT_FOUND or not wanted:
        return False
    return detail_of(error, error_details_pb2.ResourceInfo).resource_name == wanted


def seconds_left(context: Context, most_seconds: float) -> float:
    """Return how long a call may take inside, so that what became of it is told before its caller gives up."""
    left = cast("float | None", context.time_remaining())  # None without a deadline
    if left is None:
        return most_seconds
    return min(left - min(_MARGIN_SECONDS, left / 10), most_seconds)


def _named_user(request: Message) -> str:
    """Return the user whom a request is about, if it names one."""
    member = getattr(request, "member", None)
    return str(getattr(member if member is not None else request, "user_id", ""))
