"""The public commands and reads on organizations and their members."""

from dataclasses import dataclass

from branchline.v1 import organizations_pb2 as api
from branchline.v1 import organizations_pb2_grpc
from branchline.v1.common_pb2 import (
    ENTITY_KIND_INVITATION,
    ENTITY_KIND_MEMBER,
    ENTITY_KIND_ORGANIZATION,
    ENTITY_KIND_USER,
    Consistency,
)
from branchline.v1.errors_pb2 import ERROR_REASON_EMAIL_TAKEN
from branchline.v1.organizations_pb2 import Member, Organization
from branchline.v1.roles_pb2 import ROLE_ADMIN, ROLE_OWNER, ROLE_VIEWER
from branchline.v1.users_pb2 import User
from branchline_internal.user.v1.user_pb2 import CreateUserRequest
from branchline_internal.user.v1.user_pb2_grpc import UserServiceStub
from sqlalchemy import bindparam, select

from services.organization.github import status_of
from services.organization.invitations import INVITATIONS, invalid_invitation
from services.organization.listing import Listing
from services.organization.members import MEMBERS_BY_NAME, member_id
from services.organization.organizations import ORGANIZATIONS
from services.organization.people import FIRST_TOKEN, USERS
from services.organization.reading import Context, Reading
from services.organization.tables import members, organizations
from services.runtime.database import Reader, Tx
from services.runtime.errors import AlreadyExists, InvalidArgument
from services.runtime.principal import Principal, bind_principal, current_principal
from services.runtime.secrets import TOKEN_PREFIX, token_hash
from services.runtime.spine.commands import Commands
from services.runtime.spine.tokens import consistency_token, parse_consistency

_OF_USER = Listing(
    Organization,
    select(organizations.c.payload)
    .join(members, members.c.scope == organizations.c.scope)
    .where(members.c.user_id == bindparam("user"), members.c.deleted.is_(False), organizations.c.deleted.is_(False)),
    [organizations.c.slug],
    [str],
)


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
        await self.caught_up(request.consistency, request.organization_id, context)
        return await self.database.read(_get, request.organization_id)

    async def ListOrganizations(
        self, request: api.ListOrganizationsRequest, context: Context
    ) -> api.ListOrganizationsResponse:
        """List the caller's organizations."""
        await self.caught_up(request.consistency, "", context)
        after = _OF_USER.after(request, request.page_token)
        principal = current_principal()
        given = {"user": principal.user_id}
        page = await self.database.read(_OF_USER.page, given, after, request.page_size)
        found = [one for one in page.found if principal.role_in(one.id, ROLE_VIEWER)]
        return api.ListOrganizationsResponse(organizations=found, next_page_token=page.next_token(request))

    async def UpdateOrganization(
        self, request: api.UpdateOrganizationRequest, context: Context
    ) -> api.UpdateOrganizationResponse:
        """Change the fields that the mask names."""
        return await self.commands.run(request, api.UpdateOrganizationResponse, self._update, request)

    def _update(self, tx: Tx, request: api.UpdateOrganizationRequest) -> api.UpdateOrganizationResponse:
        organization = self.stores.organizations.open(tx, request.organization.id, ROLE_ADMIN)
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

    async def InviteMember(self, request: api.InviteMemberRequest, context: Context) -> api.InviteMemberResponse:
        """Make an invitation, and tell its code."""
        code = self.commands.secret(request)
        answer = await self.commands.run(request, api.InviteMemberResponse, self._invite, request, code)
        answer.code = code
        return answer

    def _invite(self, tx: Tx, request: api.InviteMemberRequest, code: str) -> api.InviteMemberResponse:
        self.stores.organizations.open(tx, request.organization_id, ROLE_ADMIN)
        invitation = self.stores.invitations.invite(tx, request, code)
        named = _invitation_token(invitation.id, invitation.revision)
        return api.InviteMemberResponse(invitation=invitation, consistency_token=named)

    async def ListInvitations(
        self, request: api.ListInvitationsRequest, context: Context
    ) -> api.ListInvitationsResponse:
        """List the open invitations, newest first."""
        current_principal().require(ROLE_ADMIN)
        await self.caught_up(request.consistency, request.organization_id, context)
        after = INVITATIONS.after(request, request.page_token)
        given = {"of": request.organization_id}
        page = await self.database.read(INVITATIONS.page, given, after, request.page_size)
        return api.ListInvitationsResponse(invitations=page.found, next_page_token=page.next_token(request))

    async def DeleteInvitation(
        self, request: api.DeleteInvitationRequest, context: Context
    ) -> api.DeleteInvitationResponse:
        """Withdraw an invitation."""
        return await self.commands.run(request, api.DeleteInvitationResponse, self._withdraw, request)

    def _withdraw(self, tx: Tx, request: api.DeleteInvitationRequest) -> api.DeleteInvitationResponse:
        self.stores.organizations.open(tx, request.organization_id, ROLE_ADMIN)
        left = self.stores.invitations.withdraw(tx, request.organization_id, request.invitation_id)
        return api.DeleteInvitationResponse(consistency_token=_invitation_token(request.invitation_id, left))

    async def AcceptInvitation(
        self, request: api.AcceptInvitationRequest, context: Context
    ) -> api.AcceptInvitationResponse:
        """Make the caller a member; without a credential, a new person."""
        user_id = current_principal().user_id
        secret = "" if user_id else TOKEN_PREFIX + self.commands.secret(request)

        async def person() -> User:
            if user_id:
                return await self.database.read(USERS.get, user_id)
            new = await self.database.read(self._newcomer, request)
            return await self._create_user(new, token_hash(secret))

        def accept(tx: Tx, user: User) -> api.AcceptInvitationResponse:
            organization = self._invited_to(tx, request.code)
            self.stores.organizations.take_turn(tx, organization.id)
            member = self.stores.invitations.accept(tx, request.code, user)
            named = consistency_token([(ENTITY_KIND_MEMBER, member_id(organization.id, user.id), member.revision)])
            return api.AcceptInvitationResponse(member=member, organization=organization, consistency_token=named)

        answer = await self.commands.once(request, api.AcceptInvitationResponse, person, accept)
        answer.secret = secret
        return answer

    def _invited_to(self, tx: Reader, code: str) -> Organization:
        """Return the organization of a code, which is of no use where that is gone or going."""
        invitation = self.stores.invitations.of_code(tx, code)
        organization = ORGANIZATIONS.find(tx, invitation.organization_id)
        if organization is None or organization.HasField("delete_time"):
            raise invalid_invitation()
        return organization

    def _newcomer(self, tx: Reader, request: api.AcceptInvitationRequest) -> User:
        """Return who will be made. The id follows from the code: it makes one person, however often it is tried."""
        self.stores.members.check_room(tx, self._invited_to(tx, request.code).id)
        if not request.display_name.strip():
            raise InvalidArgument("display_name", "must be given by who has no credential")
        email = (request.email or self.stores.invitations.of_code(tx, request.code).email).strip().lower()
        new = User(id=f"usr_{token_hash(request.code)[:26]}", display_name=request.display_name, email=email)
        holder = self.stores.people.of_email(tx, email)
        if holder is not None and holder.id != new.id:
            raise _email_taken(email)
        return new

    async def _create_user(self, new: User, first_token_hash: str) -> User:
        """Have a person created with a first token; return them once they are indexed."""
        request = CreateUserRequest(
            user_id=new.id,
            display_name=new.display_name,
            email=new.email,
            token_hash=first_token_hash,
            token_name=FIRST_TOKEN,
        )
        caller = current_principal()
        bind_principal(Principal(service="organization"))
        try:
            created = await self.user.CreateUser(request)
        finally:
            bind_principal(caller)
        if created.user.id != new.id:
            raise _email_taken(new.email)
        if created.user.email != new.email:  # the code is somebody else's by now
            raise invalid_invitation()
        point = parse_consistency(Consistency(at_least_as_fresh=[created.consistency_token])).point
        await self.stores.index.await_point(point, "", new.id)
        return created.user

    async def UpdateMember(self, request: api.UpdateMemberRequest, context: Context) -> api.UpdateMemberResponse:
        """Change a member's role."""
        return await self.commands.run(request, api.UpdateMemberResponse, self._update_member, request)

    def _update_member(self, tx: Tx, request: api.UpdateMemberRequest) -> api.UpdateMemberResponse:
        self.stores.organizations.open(tx, request.member.organization_id, ROLE_ADMIN)
        member = self.stores.members.change(tx, request.member, request.update_mask)
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
        await self.caught_up(request.consistency, request.organization_id, context)
        after = MEMBERS_BY_NAME.after(request, request.page_token)
        given = {"of": request.organization_id}
        page = await self.database.read(MEMBERS_BY_NAME.page, given, after, request.page_size)
        return api.ListMembersResponse(members=page.found, next_page_token=page.next_token(request))


def _get(tx: Reader, organization_id: str) -> api.GetOrganizationResponse:
    return api.GetOrganizationResponse(
        organization=ORGANIZATIONS.get(tx, organization_id), github_status=status_of(tx, organization_id)
    )


def _email_taken(email: str) -> AlreadyExists:
    return AlreadyExists(ENTITY_KIND_USER, email, f"{email} is a user's; sign in to accept", ERROR_REASON_EMAIL_TAKEN)


def _token(organization: Organization) -> str:
    return consistency_token([(ENTITY_KIND_ORGANIZATION, organization.id, organization.revision)])


def _invitation_token(invitation_id: str, revision: int) -> str:
    return consistency_token([(ENTITY_KIND_INVITATION, invitation_id, revision)])


def _member_token(member: Member) -> str:
    name = member_id(member.organization_id, member.user_id)
    return consistency_token([(ENTITY_KIND_MEMBER, name, member.revision)])
