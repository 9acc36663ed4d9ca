"""The public commands and reads on organizations and their members."""

from dataclasses import dataclass

from branchline.v1 import organizations_pb2 as api
from branchline.v1 import organizations_pb2_grpc
from branchline.v1.organizations_pb2 import ROLE_ADMIN, ROLE_OWNER, Member, Organization
from branchline.v1.users_pb2 import User
from branchline.v1.vocabulary_pb2 import ENTITY_KIND_MEMBER, ENTITY_KIND_ORGANIZATION
from branchline_internal.user.v1.user_pb2 import CreateUserRequest
from branchline_internal.user.v1.user_pb2_grpc import UserServiceStub

from services.organization.github import status_of
from services.organization.members import MEMBERSHIPS_OF, member_id
from services.organization.organizations import ORGANIZATIONS, check_mask
from services.organization.people import USERS
from services.organization.reading import Context, Reading
from services.runtime.database import Reader, Tx
from services.runtime.principal import current_principal
from services.runtime.spine.commands import Commands
from services.runtime.spine.tokens import consistency_token, parse_consistency_token


@dataclass(frozen=True, slots=True)
class PublicOrganizationServicer(Reading, organizations_pb2_grpc.OrganizationServiceServicer):
    """Organizations and members."""

    commands: Commands
    user: UserServiceStub

    async def CreateOrganization(
        self, request: api.CreateOrganizationRequest, context: Context
    ) -> api.CreateOrganizationResponse:
        """Create an organization whose owner is the caller."""
        return await self.commands.run(request, api.CreateOrganizationResponse, self._create, request)

    def _create(self, tx: Tx, request: api.CreateOrganizationRequest) -> api.CreateOrganizationResponse:
        owner = USERS.get(tx, current_principal().user_id)
        organization = Organization(slug=request.slug, display_name=request.display_name, kind=request.kind)
        self.stores.organizations.found(tx, organization, owner)
        return api.CreateOrganizationResponse(organization=organization, consistency_token=_token(organization))

    async def GetOrganization(
        self, request: api.GetOrganizationRequest, context: Context
    ) -> api.GetOrganizationResponse:
        """Read one organization."""
        await self.caught_up(request.consistency_token, request.organization_id, context)
        return await self.database.read(_get, request.organization_id)

    async def ListOrganizations(
        self, request: api.ListOrganizationsRequest, context: Context
    ) -> api.ListOrganizationsResponse:
        """List the caller's organizations."""
        await self.caught_up(request.consistency_token, "", context)
        found = await self.database.read(_organizations_of, current_principal().user_id)
        return api.ListOrganizationsResponse(organizations=sorted(found, key=lambda one: one.slug))

    async def UpdateOrganization(
        self, request: api.UpdateOrganizationRequest, context: Context
    ) -> api.UpdateOrganizationResponse:
        """Change the fields that the mask names."""
        check_mask(request.update_mask.paths)
        return await self.commands.run(request, api.UpdateOrganizationResponse, self._update, request)

    def _update(self, tx: Tx, request: api.UpdateOrganizationRequest) -> api.UpdateOrganizationResponse:
        organization = self.stores.organizations.open(tx, request.organization_id, ROLE_ADMIN)
        self.stores.organizations.update(tx, organization, request.organization, request.update_mask)
        return api.UpdateOrganizationResponse(organization=organization, consistency_token=_token(organization))

    async def DeleteOrganization(
        self, request: api.DeleteOrganizationRequest, context: Context
    ) -> api.DeleteOrganizationResponse:
        """Close an organization and begin to tear it down."""
        return await self.commands.run(request, api.DeleteOrganizationResponse, self._delete, request)

    def _delete(self, tx: Tx, request: api.DeleteOrganizationRequest) -> api.DeleteOrganizationResponse:
        organization = self.stores.organizations.open(tx, request.organization_id, ROLE_OWNER)
        self.stores.organizations.begin_deletion(tx, organization)
        self.stores.teardown.advance(tx, organization.id)
        return api.DeleteOrganizationResponse(consistency_token=_token(organization))

    async def AddMember(self, request: api.AddMemberRequest, context: Context) -> api.AddMemberResponse:
        """Add a person; one who is new to Branchline is created first."""

        async def person() -> User:
            known = await self.database.read(self._person_to_add, request)
            return known or await self._create_user(request.email, request.display_name)

        def add(tx: Tx, user: User) -> api.AddMemberResponse:
            organization = self.stores.organizations.open(tx, request.organization_id, ROLE_ADMIN)
            member = self.stores.members.add(tx, organization.id, user, request.role)
            return api.AddMemberResponse(member=member, consistency_token=_member_token(member))

        return await self.commands.once(request, api.AddMemberResponse, person, add)

    def _person_to_add(self, tx: Reader, request: api.AddMemberRequest) -> User | None:
        """Return the person with the address, or None. Raise what the command would, before anybody is created."""
        self.stores.organizations.check_open(tx, request.organization_id, ROLE_ADMIN)
        if request.role == ROLE_OWNER:
            current_principal().require(ROLE_OWNER)
        return self.stores.people.of_email(tx, request.email)

    async def _create_user(self, email: str, display_name: str) -> User:
        """Have a person created, or found by the address; return them once they are indexed."""
        request = CreateUserRequest(
            user_id=self.stores.organizations.clock.new_id("usr"), display_name=display_name, email=email
        )
        created = await self.user.CreateUser(request)
        point = parse_consistency_token(created.consistency_token)
        await self.stores.index.await_point(point, "", created.user.id)
        return created.user

    async def UpdateMember(self, request: api.UpdateMemberRequest, context: Context) -> api.UpdateMemberResponse:
        """Change a member's role."""
        return await self.commands.run(request, api.UpdateMemberResponse, self._update_member, request)

    def _update_member(self, tx: Tx, request: api.UpdateMemberRequest) -> api.UpdateMemberResponse:
        organization = self.stores.organizations.open(tx, request.organization_id, ROLE_ADMIN)
        member = self.stores.members.change_role(tx, organization.id, request.user_id, request.role)
        return api.UpdateMemberResponse(member=member, consistency_token=_member_token(member))

    async def RemoveMember(self, request: api.RemoveMemberRequest, context: Context) -> api.RemoveMemberResponse:
        """Remove a member."""
        return await self.commands.run(request, api.RemoveMemberResponse, self._remove_member, request)

    def _remove_member(self, tx: Tx, request: api.RemoveMemberRequest) -> api.RemoveMemberResponse:
        organization = self.stores.organizations.open(tx, request.organization_id)
        member = self.stores.members.remove(tx, organization.id, request.user_id)
        return api.RemoveMemberResponse(consistency_token=_member_token(member))

    async def ListMembers(self, request: api.ListMembersRequest, context: Context) -> api.ListMembersResponse:
        """List the members."""
        await self.caught_up(request.consistency_token, request.organization_id, context)
        members = await self.database.read(self.stores.members.list_of, request.organization_id)
        return api.ListMembersResponse(members=members)


def _get(tx: Reader, organization_id: str) -> api.GetOrganizationResponse:
    return api.GetOrganizationResponse(
        organization=ORGANIZATIONS.get(tx, organization_id), github_status=status_of(tx, organization_id)
    )


def _organizations_of(tx: Reader, user_id: str) -> list[Organization]:
    memberships = MEMBERSHIPS_OF(tx, user_id=user_id)
    return ORGANIZATIONS.find_many(tx, [member.organization_id for member in memberships])


def _token(organization: Organization) -> str:
    return consistency_token([(ENTITY_KIND_ORGANIZATION, organization.id, organization.revision)])


def _member_token(member: Member) -> str:
    name = member_id(member.organization_id, member.user_id)
    return consistency_token([(ENTITY_KIND_MEMBER, name, member.revision)])
