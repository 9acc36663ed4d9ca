"""Finds the organization that a request is about, and makes the caller's principal in it."""

import asyncio
from time import monotonic

import grpc
from branchline.v1.common_pb2 import ENTITY_KIND_ORGANIZATION, ENTITY_KIND_REPOSITORY, ENTITY_KIND_TASK, Consistency
from branchline.v1.organizations_pb2 import OrganizationSettings
from branchline_internal.organization.v1 import organization_pb2
from branchline_internal.organization.v1.organization_pb2_grpc import OrganizationServiceStub
from cachetools import LRUCache

from gateway.caller import Caller
from services.runtime.errors import NotFound
from services.runtime.principal import Principal
from services.runtime.retry import Backoff
from services.runtime.spine.tokens import parse_consistency

_CACHED_ROUTES = 100_000
_TIMEOUT_SECONDS = 5.0
_KINDS = {
    "organization_id": ENTITY_KIND_ORGANIZATION,
    "repository_id": ENTITY_KIND_REPOSITORY,
    "task_id": ENTITY_KIND_TASK,
}
FOR_EVER = float("inf")

_NO_SETTINGS = OrganizationSettings()


class Placement:
    """Resolves ids through the organization's lookup index.

    An id never changes its organization, so it is kept; whether it is still there is asked again where that matters.
    """

    def __init__(self, organization: OrganizationServiceStub) -> None:
        self._organization = organization
        self._routes: LRUCache[tuple[str, str], tuple[str, float]] = LRUCache(_CACHED_ROUTES)

    async def place(
        self, caller: Caller, target: str, wanted: str, *, defaults: bool = False, at_most_seconds: float = FOR_EVER
    ) -> Principal:
        """Return the caller's principal in the organization of `wanted`, as known at most so long ago.

        Raise NotFound (as the organization says it) if there is no such id or the caller may not know of it.
        """
        if not target:
            return _principal(caller, "", 0, _NO_SETTINGS)
        if not defaults:
            organization_id = wanted
            if target != "organization_id":
                organization_id, resolved = self._routes.get((target, wanted), ("", 0.0))
                organization_id = organization_id if monotonic() - resolved <= at_most_seconds else ""
            role = caller.roles.get(organization_id)
            if role is not None:
                return _principal(caller, organization_id, role, _NO_SETTINGS)
        request = organization_pb2.ResolveRouteRequest(user_id=caller.user.id)
        setattr(request, target, wanted)
        asked = monotonic()
        route = await self._organization.ResolveRoute(request, timeout=_TIMEOUT_SECONDS)
        self._routes[(target, wanted)] = (route.organization_id, asked)
        role = caller.role_in(route.organization_id, route.role)
        if not role:
            raise NotFound(_KINDS[target], wanted)
        return _principal(caller, route.organization_id, role, route.settings)

    async def place_new(
        self, caller: Caller, target: str, wanted: str, consistency: Consistency, seconds: float
    ) -> Principal:
        """Like `place`, but wait a while for what a consistency token says was just made."""
        fresh = parse_consistency(consistency)
        named = {entity.id for entity in fresh.point.entities}
        deadline = monotonic() + min(seconds, fresh.wait_seconds)
        backoff = Backoff(first_seconds=0.02, most_seconds=0.5)
        while True:
            try:
                return await self.place(caller, target, wanted)
            except grpc.aio.AioRpcError as error:
                pause = backoff.next_seconds()
                unknown = error.code() == grpc.StatusCode.NOT_FOUND
                if not unknown or wanted not in named or monotonic() + pause > deadline:
                    raise
            await asyncio.sleep(pause)

    def forget(self, target: str, wanted: str) -> None:
        """Ask the organization again at the next call."""
        self._routes.pop((target, wanted), None)


def _principal(caller: Caller, organization_id: str, role: int, settings: OrganizationSettings) -> Principal:
    user = caller.user
    return Principal(
        user_id=user.id,
        organization_id=organization_id,
        role=role,
        display_name=user.display_name,
        email=user.email,
        default_agent=user.preferences.default_agent or settings.default_agent,
        default_model=user.preferences.default_model or settings.default_model,
        default_sandbox_provider=settings.default_sandbox_provider,
        most_role=caller.scope.role,
        organization_ids=tuple(caller.scope.organization_ids),
    )
