"""Who calls: bearer tokens, checked against the organization's auth index and remembered for seconds."""

import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import grpc
from branchline.organization.v1.organization_pb2 import AuthenticateRequest
from branchline.organization.v1.organization_pb2_grpc import OrganizationServiceStub
from branchline.resource.v1.user_pb2 import User
from cachetools import TTLCache
from limits import parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from services.runtime.errors import DomainError, Unauthenticated
from services.runtime.interceptors import AroundInterceptor, Call
from services.runtime.secrets import token_hash

CACHE_SECONDS = 5.0
"""How long a revoked token or a changed role may still count."""

_CACHED_TOKENS = 10_000

_current: ContextVar["Caller"] = ContextVar("caller")


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated user with roles by organization."""

    user: User
    roles: dict[str, int]
    token_hash: str
    role_limit: int = 0

    def held_to(self, role: int) -> int:
        """Return what a role is worth with the caller's token."""
        return min(role, self.role_limit) if self.role_limit else role


def current_caller() -> Caller:
    """Return the caller of the call being served."""
    return _current.get()


class TooManyCalls(DomainError):
    """The caller has used up what one minute allows."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED

    def __init__(self, limit: int, reset_seconds: float) -> None:
        super().__init__("RATE_LIMITED", f"more than {limit} calls in a minute; go on in {reset_seconds:.0f} s")


class Authenticator:
    """Knows whom tokens speak for."""

    def __init__(self, organization: OrganizationServiceStub) -> None:
        self._organization = organization
        self._known = TTLCache[str, Caller](_CACHED_TOKENS, CACHE_SECONDS)

    async def authenticate(self, hashed: str) -> Caller:
        """Return the caller with this token's hash; raise Unauthenticated (as the organization says it)."""
        caller = self._known.get(hashed)
        if caller is None:
            answer = await self._organization.Authenticate(AuthenticateRequest(token_hash=hashed))
            caller = Caller(answer.user, {}, hashed, answer.role_limit)
            caller.roles.update({member.organization_id: caller.held_to(member.role) for member in answer.memberships})
            self._known[hashed] = caller
        return caller


class CallerInterceptor(AroundInterceptor):
    """Lets in only callers with a valid bearer token, and those only so often."""

    def __init__(self, authenticator: Authenticator, calls_per_minute: int) -> None:
        self._authenticator = authenticator
        self._limit = parse(f"{calls_per_minute}/minute")
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    @asynccontextmanager
    async def around(self, call: Call) -> AsyncGenerator[None, None]:
        """Bind the caller for the length of the call."""
        if not call.is_open:
            scheme, _, token = call.metadata("authorization").partition(" ")
            if scheme.lower() != "bearer" or not token:
                raise Unauthenticated("TOKEN_MISSING", 'send the metadata "authorization: Bearer <token>"')
            caller = await self._authenticator.authenticate(token_hash(token.strip()))
            if not self._limiter.hit(self._limit, caller.user.id):
                window = self._limiter.get_window_stats(self._limit, caller.user.id)
                raise TooManyCalls(self._limit.amount, max(0.0, window.reset_time - time.time()))
            _current.set(caller)
        yield
