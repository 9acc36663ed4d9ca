"""Who calls: bearer tokens, checked against the organization's auth index and remembered for seconds."""

import asyncio
import random
from collections.abc import Collection
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from time import monotonic

import grpc
from branchline.v1.errors_pb2 import ERROR_REASON_TOKEN_MISSING
from branchline.v1.users_pb2 import TokenScope, User
from branchline_internal.organization.v1.organization_pb2 import AuthenticateRequest
from branchline_internal.organization.v1.organization_pb2_grpc import OrganizationServiceStub
from cachetools import TTLCache

from gateway.allowance import Allowance
from services.runtime.errors import ResourceExhausted, Unauthenticated
from services.runtime.principal import worth
from services.runtime.secrets import token_hash
from services.runtime.serving import Call

CACHE_SECONDS = 5.0
"""How long a revoked token or a changed role may still count."""

_TIMEOUT_SECONDS = 5.0
_CACHED = 10_000

REFUSAL_SECONDS = 4.0
"""How long a refusal for too many calls is held back: the call keeps its place on its connection, which carries few."""

STRANGERS_PER_MINUTE = 60
"""Calls without a valid token that one address may make in a minute before their refusals are held back, too."""

_current: ContextVar["Caller"] = ContextVar("caller")


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated user with roles by organization."""

    user: User
    roles: dict[str, int]
    token_hash: str
    scope: TokenScope = field(default_factory=TokenScope)
    """What the token is held to; without a role whatever its user may do."""

    asked: float = 0.0
    """When the organization was asked, on the monotonic clock."""

    @property
    def limited(self) -> bool:
        """Whether the token may do less than its user."""
        return bool(self.scope.role)

    def role_in(self, organization_id: str, role: int) -> int:
        """Return what a role in an organization is worth with the caller's token; 0 is nothing."""
        return worth(role, organization_id, self.scope.role, self.scope.organization_ids)


NOBODY = Caller(User(), {}, "")
"""Who calls without a credential."""


def current_caller() -> Caller:
    """Return the caller of the call being served."""
    return _current.get()


class Authenticator:
    """Knows whom tokens speak for. However many ask at the same moment, the organization is asked once."""

    def __init__(self, organization: OrganizationServiceStub) -> None:
        self._organization = organization
        self._known = TTLCache[str, Caller](_CACHED, CACHE_SECONDS)
        self._changed = TTLCache[str, float](_CACHED, 2 * CACHE_SECONDS)
        self._asking: dict[str, asyncio.Task[None]] = {}

    async def authenticate(self, hashed: str, at_most_seconds: float = CACHE_SECONDS) -> Caller:
        """Return the caller with this token's hash, as known at most so long ago.

        Raise Unauthenticated, as the organization says it.
        """
        oldest = monotonic() - at_most_seconds
        while True:
            known = self._known.get(hashed)
            if known is not None and known.asked >= max(oldest, self._changed.get(known.user.id, 0.0)):
                return known
            asking = self._asking.get(hashed)
            if asking is None:
                asking = self._asking[hashed] = asyncio.create_task(self._ask(hashed))
                asking.add_done_callback(_heard)
            await asyncio.shield(asking)

    def forget(self, user_id: str) -> None:
        """Ask the organization again: something about the user has just changed."""
        self._changed[user_id] = monotonic()

    async def _ask(self, hashed: str) -> None:
        asked = monotonic()
        request = AuthenticateRequest(token_hash=hashed)
        try:
            answer = await self._organization.Authenticate(request, timeout=_TIMEOUT_SECONDS)
        finally:
            del self._asking[hashed]  # not in a callback: who found it ended would wait for it without ever waiting
        caller = Caller(answer.user, {}, hashed, answer.scope, asked)
        for member in answer.memberships:
            role = caller.role_in(member.organization_id, member.role)
            if role:
                caller.roles[member.organization_id] = role
        self._known[hashed] = caller


def _heard(asking: "asyncio.Task[None]") -> None:
    """Take note of an error: nobody may be left to hear of it."""
    if not asking.cancelled():
        asking.exception()


class Door:
    """Lets in only callers with a valid bearer token, but for a few methods, and those only so often."""

    def __init__(self, authenticator: Authenticator, calls_per_minute: int, anonymous: Collection[str] = ()) -> None:
        """`anonymous` are the full names of the methods that are taken without a token."""
        self._authenticator = authenticator
        self._anonymous = frozenset(anonymous)
        self._allowance = Allowance(calls_per_minute)
        self._strangers = Allowance(STRANGERS_PER_MINUTE)

    async def admit(self, call: Call) -> None:
        """Bind the caller for the length of the call."""
        if not call.metadata("authorization") and call.method in self._anonymous:
            self._allowance.take(call.address())
            _current.set(NOBODY)
            return
        try:
            caller = await self._identify(call)
        except (Unauthenticated, grpc.aio.AioRpcError) as error:
            if isinstance(error, Unauthenticated) or error.code() == grpc.StatusCode.UNAUTHENTICATED:
                with suppress(ResourceExhausted):
                    await _take(self._strangers, call.address())
            raise
        await _take(self._allowance, caller.user.id)
        _current.set(caller)

    async def _identify(self, call: Call) -> Caller:
        scheme, _, token = call.metadata("authorization").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Unauthenticated(ERROR_REASON_TOKEN_MISSING, 'send the metadata "authorization: Bearer <token>"')
        return await self._authenticator.authenticate(token_hash(token.strip()))


async def _take(allowance: Allowance, caller: str) -> None:
    """Take one call. Raise ResourceExhausted if there is none left, but not at once."""
    try:
        allowance.take(caller)
    except ResourceExhausted:
        await asyncio.sleep(random.uniform(0.5, 1.5) * REFUSAL_SECONDS)  # not all in the same moment
        raise
