"""The public commands and reads that organization owns, as the gateway forwards them."""

from dataclasses import dataclass
from typing import Any

import grpc
from branchline.gateway.v1 import (
    history_pb2,
    history_pb2_grpc,
    organizations_pb2,
    organizations_pb2_grpc,
    repositories_pb2,
    repositories_pb2_grpc,
    tasks_pb2,
    tasks_pb2_grpc,
    users_pb2,
    users_pb2_grpc,
)
from branchline.github_data.v1.github_data_pb2 import SyncOrganizationRequest
from branchline.repository.v1.repository_pb2 import EnsureRepositoryRequest
from branchline.resource.v1 import repository_pb2
from branchline.resource.v1.organization_pb2 import ROLE_OWNER, Organization
from branchline.resource.v1.repository_pb2 import Repository
from branchline.resource.v1.user_pb2 import User
from branchline.user.v1.user_pb2 import CreateUserRequest
from branchline.user.v1.user_pb2_grpc import UserServiceStub

from services.organization.ingest import TO_GITHUB_DATA, TO_REPOSITORY
from services.organization.membership import FIRST_TOKEN, found_organization, join, record, refuse_taken_slug
from services.organization.remote import check_remote_url, name_from_url
from services.organization.store import OrganizationStore, member_id
from services.runtime.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from services.runtime.principal import current_principal
from services.runtime.service import Chassis
from services.runtime.spine.outbox import Mark
from services.runtime.spine.tokens import consistency_token, parse_consistency_token

Context = grpc.aio.ServicerContext[Any, Any]

CHILD_SECONDS = 2.0
"""Time that a creation waits for its child, so that the next command finds it. The child is made in any case."""

_UPDATABLE = frozenset({"display_name", "slug", "github_login", "settings"})


@dataclass(frozen=True, slots=True)
class _Public:
    chassis: Chassis
    store: OrganizationStore
    user: UserServiceStub

    async def caught_up(self, token: str, context: Context) -> None:
        """Wait until the index is as new as the token."""
        if token:
            await self.store.index.await_point(parse_consistency_token(token), context.time_remaining())


class PublicOrganizationServicer(_Public, organizations_pb2_grpc.OrganizationServiceServicer):
    """Organizations and members."""

    async def CreateOrganization(
        self, request: organizations_pb2.CreateOrganizationRequest, context: Context
    ) -> organizations_pb2.CreateOrganizationResponse:
        """Create an organization whose owner is the caller."""
        async with self.chassis.database.transaction() as tx:
            answer = await self.chassis.requests.recall(tx, request, organizations_pb2.CreateOrganizationResponse)
            if answer is not None:
                return answer
            owner = await self.store.user(tx, current_principal().user_id)
            assert owner is not None, "the gateway authenticates against the same index"
            organization = Organization(
                slug=request.slug,
                display_name=request.display_name,
                kind=request.kind,
                github_login=request.github_login,
                github_account_id=request.github_account_id,
            )
            await found_organization(tx, self.chassis, self.store, organization, owner)
            answer = organizations_pb2.CreateOrganizationResponse(
                organization=organization, consistency_token=_token(organization)
            )
            await self.chassis.requests.remember(tx, request, answer)
        return answer

    async def GetOrganization(
        self, request: organizations_pb2.GetOrganizationRequest, context: Context
    ) -> organizations_pb2.GetOrganizationResponse:
        """Read one organization."""
        await self.caught_up(request.consistency_token, context)
        async with self.chassis.database.read() as connection:
            return organizations_pb2.GetOrganizationResponse(
                organization=await self.store.organization(connection, request.organization_id),
                github_status=await self.store.github_status(connection, request.organization_id),
            )

    async def ListOrganizations(
        self, request: organizations_pb2.ListOrganizationsRequest, context: Context
    ) -> organizations_pb2.ListOrganizationsResponse:
        """List the caller's organizations."""
        await self.caught_up(request.consistency_token, context)
        async with self.chassis.database.read() as connection:
            memberships = await self.store.memberships(connection, current_principal().user_id)
            found = [await self.store.organization(connection, member.organization_id) for member in memberships]
        return organizations_pb2.ListOrganizationsResponse(organizations=sorted(found, key=lambda one: one.slug))

    async def UpdateOrganization(
        self, request: organizations_pb2.UpdateOrganizationRequest, context: Context
    ) -> organizations_pb2.UpdateOrganizationResponse:
        """Change the fields that the mask names."""
        for path in request.update_mask.paths:
            if path.partition(".")[0] not in _UPDATABLE or not _is_field(path):
                raise InvalidArgument("update_mask", f'"{path}" cannot be changed')
        async with self.chassis.database.transaction() as tx:
            answer = await self.chassis.requests.recall(tx, request, organizations_pb2.UpdateOrganizationResponse)
            if answer is not None:
                return answer
            organization = await self.store.organization(tx, request.organization_id)
            slug = organization.slug
            request.update_mask.MergeMessage(request.organization, organization, True, True)
            if organization.slug != slug:
                await refuse_taken_slug(tx, self.store, organization.slug)
            if not organization.slug or not organization.display_name:
                raise InvalidArgument("organization", "slug and display name must not be empty")
            await self.store.save_organization(tx, organization)
            changed = ", ".join(request.update_mask.paths)
            await record(
                tx, self.chassis, organization.id, "organization.updated", current_principal().user_id, changed
            )
            answer = organizations_pb2.UpdateOrganizationResponse(
                organization=organization, consistency_token=_token(organization)
            )
            await self.chassis.requests.remember(tx, request, answer)
        return answer

    async def AddMember(
        self, request: organizations_pb2.AddMemberRequest, context: Context
    ) -> organizations_pb2.AddMemberResponse:
        """Add a person; create the user if the address is new."""
        principal = current_principal()
        if request.role == ROLE_OWNER:
            principal.require(ROLE_OWNER)
        email = request.email.strip().lower()
        async with self.chassis.database.transaction() as tx:
            answer = await self.chassis.requests.recall(tx, request, organizations_pb2.AddMemberResponse)
            user_id = await self.store.user_id_by_email(tx, email)
            user = await self.store.user(tx, user_id) if user_id else None
        if answer is not None:
            return answer
        secret = ""
        if user is None:
            user, secret = await self._create_user(email, request.display_name)
        async with self.chassis.database.transaction() as tx:
            member = await join(tx, self.chassis, self.store, request.organization_id, user, request.role)
            words = f"{user.display_name} joined"
            await record(tx, self.chassis, request.organization_id, "member.added", principal.user_id, words)
            token = consistency_token([("member", member_id(member), member.revision)])
            answer = organizations_pb2.AddMemberResponse(member=member, consistency_token=token)
            await self.chassis.requests.remember(tx, request, answer)
        answer.api_token = secret  # never stored, so a repeated request gets it empty
        return answer

    async def _create_user(self, email: str, display_name: str) -> tuple[User, str]:
        user_id = self.chassis.clock.new_id("usr")
        created = await self.user.CreateUser(
            CreateUserRequest(user_id=user_id, display_name=display_name, email=email, token_name=FIRST_TOKEN)
        )
        await self.store.index.await_point(parse_consistency_token(created.consistency_token))
        return created.user, created.api_token

    async def ListMembers(
        self, request: organizations_pb2.ListMembersRequest, context: Context
    ) -> organizations_pb2.ListMembersResponse:
        """List the members."""
        await self.caught_up(request.consistency_token, context)
        async with self.chassis.database.read() as connection:
            members = await self.store.members_of(connection, request.organization_id)
        return organizations_pb2.ListMembersResponse(members=members)


class PublicRepositoryServicer(_Public, repositories_pb2_grpc.RepositoryServiceServicer):
    """The repository catalogue."""

    async def AddRepository(
        self, request: repositories_pb2.AddRepositoryRequest, context: Context
    ) -> repositories_pb2.AddRepositoryResponse:
        """Add a repository by URL: index it here, have the child created."""
        check_remote_url(request.remote_url)
        principal = current_principal()
        async with self.chassis.database.transaction() as tx:
            answer = await self.chassis.requests.recall(tx, request, repositories_pb2.AddRepositoryResponse)
            if answer is not None:
                return answer
            holder = await self.store.repository_by_url(tx, request.organization_id, request.remote_url)
            if holder is not None:
                words = f"{holder.full_name} has this URL"
                raise AlreadyExists("repository", holder.id, words, "REPOSITORY_EXISTS", repository_id=holder.id)
            now = self.chassis.clock.timestamp()
            repository = Repository(
                id=self.chassis.clock.new_id("repo"),
                organization_id=request.organization_id,
                full_name=request.full_name or name_from_url(request.remote_url),
                remote_url=request.remote_url,
                default_branch=request.default_branch,
                source=repository_pb2.REPOSITORY_SOURCE_URL,
                create_time=now,
                activity_time=now,
                revision=1,
            )
            await self.store.save_repository(tx, repository)
            create = EnsureRepositoryRequest(repository=repository)
            await self.chassis.outbox.mark(tx, [Mark(repository.id, 1, create, TO_REPOSITORY)])
            await record(
                tx,
                self.chassis,
                request.organization_id,
                "repository.added",
                principal.user_id,
                f"{repository.full_name} added",
                repository.id,
            )
            token = consistency_token([("repository", repository.id, repository.revision)])
            answer = repositories_pb2.AddRepositoryResponse(repository=repository, consistency_token=token)
            await self.chassis.requests.remember(tx, request, answer)
        await self.chassis.outbox.await_delivery(TO_REPOSITORY, repository.id, CHILD_SECONDS)
        return answer

    async def ListRepositories(
        self, request: repositories_pb2.ListRepositoriesRequest, context: Context
    ) -> repositories_pb2.ListRepositoriesResponse:
        """List the catalogue."""
        await self.caught_up(request.consistency_token, context)
        found, following = await self.store.list_repositories(
            request.organization_id, request.page_size or 100, request.page_token
        )
        return repositories_pb2.ListRepositoriesResponse(repositories=found, next_page_token=following)

    async def SyncGithub(
        self, request: repositories_pb2.SyncGithubRequest, context: Context
    ) -> repositories_pb2.SyncGithubResponse:
        """Have the GitHub cache read GitHub now."""
        async with self.chassis.database.transaction() as tx:
            organization = await self.store.organization(tx, request.organization_id)
            if not organization.github_login:
                raise FailedPrecondition("GITHUB_NOT_CONNECTED", "the organization has no GitHub login")
            sync = SyncOrganizationRequest(organization_id=organization.id, github_login=organization.github_login)
            await self.chassis.outbox.mark(tx, [Mark(organization.id, 1, sync, TO_GITHUB_DATA)])
        return repositories_pb2.SyncGithubResponse()


class PublicTaskServicer(_Public, tasks_pb2_grpc.TaskServiceServicer):
    """The sidebar."""

    async def ListTasks(self, request: tasks_pb2.ListTasksRequest, context: Context) -> tasks_pb2.ListTasksResponse:
        """List the tasks of all repositories."""
        await self.caught_up(request.consistency_token, context)
        found, following = await self.store.list_tasks(request)
        return tasks_pb2.ListTasksResponse(tasks=found, next_page_token=following)


class PublicHistoryServicer(_Public, history_pb2_grpc.HistoryServiceServicer):
    """The feed."""

    async def ListHistory(
        self, request: history_pb2.ListHistoryRequest, context: Context
    ) -> history_pb2.ListHistoryResponse:
        """List events."""
        found, following = await self.store.list_history(request)
        return history_pb2.ListHistoryResponse(events=found, next_page_token=following)


class PublicUserReader(_Public, users_pb2_grpc.UserServiceServicer):
    """What is read of the caller."""

    async def WhoAmI(self, request: users_pb2.WhoAmIRequest, context: Context) -> users_pb2.WhoAmIResponse:
        """Say who the caller is."""
        async with self.chassis.database.read() as connection:
            user_id = current_principal().user_id
            user = await self.store.user(connection, user_id)
            if user is None:
                raise NotFound("user", user_id)
            memberships = await self.store.memberships(connection, user_id)
        return users_pb2.WhoAmIResponse(user=user, memberships=memberships)

    async def ListApiTokens(
        self, request: users_pb2.ListApiTokensRequest, context: Context
    ) -> users_pb2.ListApiTokensResponse:
        """List the caller's tokens."""
        async with self.chassis.database.read() as connection:
            tokens = await self.store.api_tokens(connection, current_principal().user_id)
        return users_pb2.ListApiTokensResponse(api_tokens=tokens)


def _token(organization: Organization) -> str:
    return consistency_token([("organization", organization.id, organization.revision)])


def _is_field(path: str) -> bool:
    head, _, tail = path.partition(".")
    field = Organization.DESCRIPTOR.fields_by_name.get(head)
    if field is None:
        return False
    return not tail or (field.message_type is not None and tail in field.message_type.fields_by_name)
