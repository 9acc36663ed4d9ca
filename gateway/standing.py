"""Whether the caller of a long call may still have it: asked again and again while it runs."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

import grpc
from branchline.v1.roles_pb2 import ROLE_VIEWER, Role

from gateway.caller import Authenticator, current_caller
from gateway.placement import Placement

CHECK_SECONDS = 5.0
"""How often it is asked."""

_CHECK_AGE_SECONDS = 1.0
_TRUST_SECONDS = 60.0
"""How long the organization's last word counts while it does not answer."""

_NOT_ANSWERED = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED})

T = TypeVar("T")
Check = Callable[[], Awaitable[None]]


def standing_check(
    authenticator: Authenticator,
    placement: Placement,
    target: str,
    wanted: str,
    role: Role.ValueType = ROLE_VIEWER,
) -> Check:
    """Return what raises once the current caller may no longer do this, or what the call is about is gone."""
    caller, clock = current_caller(), asyncio.get_running_loop().time
    confirmed = clock()

    async def check() -> None:
        nonlocal confirmed
        try:
            now = await authenticator.authenticate(caller.token_hash, _CHECK_AGE_SECONDS)
            principal = await placement.place(now, target, wanted, at_most_seconds=CHECK_SECONDS)
        except grpc.aio.AioRpcError as error:
            if error.code() not in _NOT_ANSWERED or clock() - confirmed > _TRUST_SECONDS:
                raise
        else:
            principal.require(role)
            confirmed = clock()

    return check


async def while_allowed(answers: "grpc.aio.UnaryStreamCall[Any, T]", check: Check) -> AsyncGenerator[T, None]:
    """Pass on the answers of a call until it ends, or its caller may no longer have them; then raise why."""
    refusals: list[Exception] = []

    async def guard() -> None:
        while not refusals:
            await asyncio.sleep(CHECK_SECONDS)
            try:
                await check()
            except Exception as error:  # noqa: BLE001 - whatever it is: nobody goes on unchecked
                refusals.append(error)
        answers.cancel()

    guarding = asyncio.create_task(guard())
    try:
        async for answer in answers:
            if refusals:
                break
            yield answer
    except asyncio.CancelledError:  # also how it is told that the call was ended here
        if not refusals:
            raise
    finally:
        guarding.cancel()
        answers.cancel()
    if refusals:
        raise refusals[0]
