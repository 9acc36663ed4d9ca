"""Who a call is made for: a principal, signed by the caller and checked by every service.

The gateway makes it from a bearer token; services pass it on. It lives for a minute and travels as a JWT
(RFC 7519, HS256) in the metadata of each internal call.
"""

from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import jwt
from branchline.resource.v1 import organization_pb2

from services.runtime.errors import PermissionDenied, Unauthenticated

METADATA_KEY = "x-branchline-principal"
_LIFETIME = timedelta(seconds=60)
_LEEWAY = timedelta(seconds=30)

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

    @property
    def caller(self) -> str:
        """Name whose request ids are told apart."""
        return self.user_id or f"service/{self.service}"

    def require(self, role: organization_pb2.Role.ValueType) -> None:
        """Raise PermissionDenied unless the caller has this role; services may do everything."""
        if self.service or self.role >= role:
            return
        wanted = organization_pb2.Role.Name(role).removeprefix("ROLE_").lower()
        raise PermissionDenied("ROLE_REQUIRED", f"this needs the role {wanted}", required_role=wanted)

    def sees(self, organization_id: str) -> bool:
        """Say whether the organization's resources exist for the caller."""
        return bool(self.service) or self.organization_id == organization_id


class Signer:
    """Signs and checks principals with the key that all services of one installation share."""

    def __init__(self, key: str, service: str) -> None:
        self._key = key
        self._system = Principal(service=service)

    def sign(self, principal: Principal | None = None) -> str:
        """Return a token for the principal, or for the service itself."""
        claims: dict[str, Any] = asdict(principal or self._system)
        return jwt.encode({**claims, "exp": datetime.now(UTC) + _LIFETIME}, self._key, algorithm="HS256")

    def verify(self, token: str) -> Principal:
        """Return the principal of a token; raise Unauthenticated if it is not ours or too old."""
        try:
            claims = jwt.decode(token, self._key, algorithms=["HS256"], leeway=_LEEWAY)
            del claims["exp"]
            return Principal(**claims)
        except (jwt.InvalidTokenError, KeyError, TypeError) as error:
            raise Unauthenticated("PRINCIPAL_INVALID", "the call carries no valid principal") from error


def current_principal() -> Principal:
    """Return the principal of the call being served."""
    principal = _current.get()
    if principal is None:
        raise Unauthenticated("PRINCIPAL_MISSING", "the call carries no principal")
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
