"""Who did something, as resources and events tell it."""

from branchline.v1.common_pb2 import Actor

from services.runtime.principal import principal_or_none


def user_actor(user_id: str) -> Actor:
    """Return a member."""
    return Actor(user_id=user_id)


def agent_actor(session_id: str, on_behalf_of: str = "") -> Actor:
    """Return the agent of a session."""
    return Actor(session_id=session_id, on_behalf_of_user_id=on_behalf_of)


def system_actor(part: str) -> Actor:
    """Return Branchline itself."""
    return Actor(system=part)


def current_actor() -> Actor:
    """Return who the running call is made for: a member, or a service on its own account."""
    principal = principal_or_none()
    if principal is not None and principal.user_id:
        return user_actor(principal.user_id)
    return system_actor(principal.service if principal is not None else "branchline")
