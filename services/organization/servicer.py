"""The gRPC surface that the gateway and the children use of the organization."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
from branchline.organization.v1 import organization_pb2, organization_pb2_grpc
from branchline.resource.v1.organization_pb2 import ORGANIZATION_KIND_TEAM, Organization
from branchline.user.v1.user_pb2 import CreateUserRequest
from branchline.user.v1.user_pb2 import GetGitCredentialRequest as UserGitCredentialRequest
from branchline.user.v1.user_pb2_grpc import UserServiceStub

from services.organization.membership import FIRST_TOKEN, found_organization
from services.organization.store import OrganizationStore
from services.organization.tables import HISTORY, WATCHED
from services.runtime.errors import NotFound, Unauthenticated
from services.runtime.service import Chassis
from services.runtime.spine.tokens import parse_consistency_token
from services.runtime.spine.watch import watch

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class OrganizationServicer(organization_pb2_grpc.OrganizationServiceServicer):
    """Routing, authentication, the upstream watch, and what children ask upward."""

    chassis: Chassis
    store: OrganizationStore
    user: UserServiceStub

    async def Bootstrap(
        self, request: organization_pb2.BootstrapRequest, context: Context
    ) -> organization_pb2.BootstrapResponse:
        """Create the first organization with its owner, once."""
        async with self.chassis.database.read() as connection:
            existing = await self.store.organization_by_slug(connection, request.slug)
            user_id = await self.store.user_id_by_email(connection, request.user_email)
        if existing is not None:
            return organization_pb2.BootstrapResponse(organization=existing)
        created = await self.user.CreateUser(
            CreateUserRequest(
                user_id=user_id or self.chassis.clock.new_id("usr"),
                display_name=request.user_name,
                email=request.user_email,
                token_name=FIRST_TOKEN,
            )
        )
        if created.consistency_token:  # the token works once this answers
            await self.store.index.await_point(parse_consistency_token(created.consistency_token))
        async with self.chassis.database.transaction() as tx:
            organization = Organization(
                slug=request.slug, display_name=request.organization_name, kind=ORGANIZATION_KIND_TEAM
            )
            organization.settings.default_agent = request.default_agent
            await found_organization(tx, self.chassis, self.store, organization, created.user)
        return organization_pb2.BootstrapResponse(organization=organization, api_token=created.api_token)

    async def Authenticate(
        self, request: organization_pb2.AuthenticateRequest, context: Context
    ) -> organization_pb2.AuthenticateResponse:
        """Say whom a token speaks for."""
        async with self.chassis.database.read() as connection:
            now = self.chassis.clock.seconds()
            token = await self.store.valid_token(connection, request.token_hash, now)
            user = await self.store.user(connection, token.user_id) if token else None
            if token is None or user is None:
                raise Unauthenticated("TOKEN_INVALID", "the bearer token is unknown, expired or revoked")
            memberships = await self.store.memberships(connection, user.id)
        return organization_pb2.AuthenticateResponse(user=user, memberships=memberships, role_limit=token.role_limit)

    async def ResolveRoute(
        self, request: organization_pb2.ResolveRouteRequest, context: Context
    ) -> organization_pb2.ResolveRouteResponse:
        """Find the organization and repository of an id that the user may know of."""
        target = request.WhichOneof("target") or ""
        wanted = getattr(request, target)
        missing = NotFound(target.removesuffix("_id"), wanted)
        async with self.chassis.database.read() as connection:
            organization_id, repository_id = wanted, ""
            if target == "repository_id":
                repository = await self.store.repository(connection, wanted)
                if repository is None:
                    raise missing
                organization_id, repository_id = repository.organization_id, repository.id
            if target == "task_id":
                route = await self.store.task_route(connection, wanted)
                if route is None:
                    raise missing
                organization_id, repository_id = route
            member = await self.store.member(connection, organization_id, request.user_id)
            if member is None:
                raise missing
            organization = await self.store.organization(connection, organization_id)
        return organization_pb2.ResolveRouteResponse(
            organization_id=organization_id,
            repository_id=repository_id,
            role=member.role,
            settings=organization.settings,
        )

    async def WatchIndex(
        self, request: organization_pb2.WatchIndexRequest, context: Context
    ) -> AsyncIterator[organization_pb2.WatchIndexResponse]:
        """Watch an organization's index tables."""
        scope = request.organization_id
        topic, kinds = f"organization/{scope}", [table.kind for table in WATCHED]
        if request.history:
            topic, kinds = f"history/{scope}", [HISTORY.kind]
        async for frame in watch(self.store.index, scope, topic, kinds, request.resume_token):
            yield organization_pb2.WatchIndexResponse(frame=frame.frame, horizon_seq=frame.horizon)

    async def AwaitConsistency(
        self, request: organization_pb2.AwaitConsistencyRequest, context: Context
    ) -> organization_pb2.AwaitConsistencyResponse:
        """Wait until the index is as new as the token."""
        point = parse_consistency_token(request.consistency_token)
        await self.store.index.await_point(point, context.time_remaining())
        return organization_pb2.AwaitConsistencyResponse()

    async def GetGitCredential(
        self, request: organization_pb2.GetGitCredentialRequest, context: Context
    ) -> organization_pb2.GetGitCredentialResponse:
        """Ask the user child for a member's git credential."""
        async with self.chassis.database.read() as connection:
            member = await self.store.member(connection, request.organization_id, request.user_id)
        if member is None:
            return organization_pb2.GetGitCredentialResponse()
        credential = await self.user.GetGitCredential(
            UserGitCredentialRequest(user_id=request.user_id, host=request.host)
        )
        return organization_pb2.GetGitCredentialResponse(username=credential.username, secret=credential.secret)
