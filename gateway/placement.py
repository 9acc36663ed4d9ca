"""Finds the organization that a request is about, and makes the caller's principal in it."""

from branchline.organization.v1 import organization_pb2
from branchline.organization.v1.organization_pb2_grpc import OrganizationServiceStub
from branchline.resource.v1.organization_pb2 import OrganizationSettings
from cachetools import LRUCache

from gateway.caller import Caller
from services.runtime.principal import Principal

_CACHED_ROUTES = 100_000


class Placement:
    """Resolves ids through the organization's lookup index. An id never changes its organization, so it is kept."""

    def __init__(self, organization: OrganizationServiceStub) -> None:
        self._organization = organization
        self._routes: LRUCache[tuple[str, str], str] = LRUCache(_CACHED_ROUTES)

    async def place(
        self, caller: Caller, target: str, wanted: str, consistency_token: str = "", *, defaults: bool = False
    ) -> Principal:
        """Return the caller's principal in the organization of `wanted`.

        Raise NotFound (as the organization says it) if there is no such id or the caller may not know of it.
        """
        if not target:
            return self._principal(caller, "", 0, OrganizationSettings())
        organization_id = wanted if target == "organization_id" else self._routes.get((target, wanted), "")
        role = caller.roles.get(organization_id)
        if role is not None and not defaults:
            return self._principal(caller, organization_id, role, OrganizationSettings())
        if consistency_token:
            await self.await_consistency(consistency_token)
        request = organization_pb2.ResolveRouteRequest(user_id=caller.user.id)
        setattr(request, target, wanted)
        route = await self._organization.ResolveRoute(request)
        self._routes[(target, wanted)] = route.organization_id
        return self._principal(caller, route.organization_id, caller.held_to(route.role), route.settings)

    def forget(self, target: str, wanted: str) -> None:
        """Ask the organization again at the next call."""
        self._routes.pop((target, wanted), None)

    async def await_consistency(self, token: str) -> None:
        """Wait until the organization has indexed what a command made."""
        await self._organization.AwaitConsistency(organization_pb2.AwaitConsistencyRequest(consistency_token=token))

    def _principal(self, caller: Caller, organization_id: str, role: int, settings: OrganizationSettings) -> Principal:
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
        )
