"""Who a call is made for: a principal, signed by the caller and checked by every service.

The gateway makes it from a bearer token; services pass it on. It lives for a minute and travels, signed with a key that
the installation shares, in the metadata of each internal call. It is good for the one service that is called.
"""

import hashlib
import time
from collections.abc import Collection
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace

from branchline.v1 import roles_pb2
from branchline.v1.errors_pb2 import (
    ERROR_REASON_OPERATOR_REQUIRED,
    ERROR_REASON_PRINCIPAL_INVALID,
    ERROR_REASON_PRINCIPAL_MISSING,
    ERROR_REASON_ROLE_REQUIRED,
)
from cachetools import LRUCache, TTLCache
from itsdangerous import BadData, URLSafeTimedSerializer

from services.runtime.errors import PermissionDenied, Unauthenticated

METADATA_KEY = "x-branchline-principal"
_LIFETIME_SECONDS = 60.0
_LEEWAY_SECONDS = 30.0
_REUSED_SECONDS = 20.0
_CACHED = 4096

Metadata = tuple[tuple[str, str], ...]

OPERATOR = "operator"
"""The service name under which an operator's commands are signed; no service has it."""

_current: ContextVar["Principal | None"] = ContextVar("principal", default=None)


@dataclass(frozen=True, slots=True)
class Principal:
    """The caller of a command: a user in one organization, or a service on its own account."""

    user_id: str = ""
    organization_id: str = ""
    role: int = 0
    display_name: str = ""
    email: str = ""
    default_agent: str = ""
    default_model: str = ""
    default_sandbox_provider: str = ""
    service: str = ""
    most_role: int = 0
    """Highest role that the caller's token has anywhere; 0 where it is not held to one."""

    organization_ids: tuple[str, ...] = ()
    """The organizations that the caller's token is good for; empty means all of the user's."""

    def role_in(self, organization_id: str, role: int) -> int:
        """Return what a role of the user's is worth with the caller's token; 0 is nothing."""
        return worth(role, organization_id, self.most_role, self.organization_ids)

    @property
    def caller(self) -> str:
        """Name whose request ids are told apart."""
        return self.user_id or f"service/{self.service}"

    def require(self, role: roles_pb2.Role.ValueType) -> None:
        """Raise PermissionDenied unless the caller has this role; services may do everything."""
        if self.service or self.role >= role:
            return
        roles = (roles_pb2.Role.ValueType(self.role), role)
        has, wanted = (roles_pb2.Role.Name(one).removeprefix("ROLE_").lower() for one in roles)
        words = f"this needs the role {wanted}"
        raise PermissionDenied(ERROR_REASON_ROLE_REQUIRED, words, role=has, required_role=wanted)

    def require_operator(self) -> None:
        """Raise PermissionDenied unless an operator of the installation asks."""
        if self.service != OPERATOR:
            raise PermissionDenied(ERROR_REASON_OPERATOR_REQUIRED, "only an operator of the installation may do this")

    def sees(self, organization_id: str) -> bool:
        """Say whether the organization's resources exist for the caller."""
        return bool(self.service) or self.organization_id == organization_id


def worth(role: int, organization_id: str, most_role: int, organization_ids: Collection[str]) -> int:
    """Return what a role in an organization is worth with a token held to a role, and to organizations if any."""
    if not most_role:
        return role
    return min(role, most_role) if not organization_ids or organization_id in organization_ids else 0


class Signer:
    """Signs and checks principals with the key that all services of one installation share.

    A signature is used again for some seconds, and one that was checked is known until it ends.
    """

    def __init__(self, key: str, service: str) -> None:
        """`service` is whose calls are signed, and whose audience is taken."""
        self._serializer = URLSafeTimedSerializer(key, "principal", signer_kwargs={"digest_method": hashlib.sha256})
        self._system = Principal(service=service)
        self._signed = TTLCache[tuple[str, Principal], Metadata](_CACHED, _REUSED_SECONDS)
        self._verified = LRUCache[str, tuple[float, Principal]](_CACHED)

    def metadata(self, audience: str, principal: Principal | None = None) -> Metadata:
        """Return the metadata of a call to a service for the principal, or for the calling service itself."""
        principal = principal or self._system
        metadata = self._signed.get((audience, principal))
        if metadata is None:
            claims = {"audience": audience, **asdict(principal)}
            metadata = ((METADATA_KEY, str(self._serializer.dumps(claims))),)
            self._signed[audience, principal] = metadata
        return metadata

    def verify(self, token: str) -> Principal:
        """Return the principal of a token; raise Unauthenticated if it is not ours, too old, or for another service."""
        now = time.time()
        known = self._verified.get(token)
        if known is not None and known[0] > now:
            return known[1]
        try:
            claims, signed = self._serializer.loads(token, return_timestamp=True)
            audience = claims.pop("audience", "")
            principal, made = Principal(**claims), signed.timestamp()
            principal = replace(principal, organization_ids=tuple(principal.organization_ids))
        except (BadData, TypeError, AttributeError) as error:
            raise Unauthenticated(ERROR_REASON_PRINCIPAL_INVALID, "the call carries no valid principal") from error
        if audience != self._system.service:
            words = f"the call's principal is for {audience or 'nobody'}, not for {self._system.service}"
            raise Unauthenticated(ERROR_REASON_PRINCIPAL_INVALID, words)
        if not made - _LEEWAY_SECONDS <= now <= made + _LIFETIME_SECONDS + _LEEWAY_SECONDS:
            raise Unauthenticated(ERROR_REASON_PRINCIPAL_INVALID, "the call's principal is too old")
        self._verified[token] = (made + _LIFETIME_SECONDS + _LEEWAY_SECONDS, principal)
        return principal


def current_principal() -> Principal:
    """Return the principal of the call being served."""
    principal = _current.get()
    if principal is None:
        raise Unauthenticated(ERROR_REASON_PRINCIPAL_MISSING, "the call carries no principal")
    return principal


def principal_or_none() -> Principal | None:
    """Return the principal of the call being served, or None in background work."""
    return _current.get()


def bind_principal(principal: Principal | None) -> None:
    """Make the principal that of the running call."""
    _current.set(principal)


def within(principal: Principal, organization_id: str) -> Principal:
    """Return the principal placed in an organization."""
    return replace(principal, organization_id=organization_id)
