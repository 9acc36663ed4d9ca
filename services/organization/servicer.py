"""What the gateway, the children and the operator ask of the organization."""

from collections.abc import AsyncIterator
from dataclasses import dataclass

from branchline.v1.blobs_pb2 import BLOB_STATE_COMPLETE, Blob
from branchline.v1.common_pb2 import (
    ENTITY_KIND_ORGANIZATION,
    ENTITY_KIND_REPOSITORY,
    ENTITY_KIND_TASK,
    ENTITY_KIND_USER,
    BlobReference,
    Consistency,
)
from branchline.v1.errors_pb2 import ERROR_REASON_TOKEN_INVALID
from branchline.v1.organizations_pb2 import ORGANIZATION_KIND_TEAM, Member, Organization
from branchline.v1.roles_pb2 import ROLE_UNSPECIFIED
from branchline.v1.users_pb2 import User
from branchline_internal.organization.v1 import organization_pb2, organization_pb2_grpc
from branchline_internal.user.v1.user_pb2 import CreateUserRequest
from branchline_internal.user.v1.user_pb2 import GetGitCredentialRequest as UserGitCredentialRequest
from branchline_internal.user.v1.user_pb2 import IssueTokenRequest as UserIssueTokenRequest
from branchline_internal.user.v1.user_pb2_grpc import UserServiceStub

from services.organization.claims import reference_to
from services.organization.members import MEMBERSHIPS_OF
from services.organization.organizations import ORGANIZATIONS
from services.organization.people import FIRST_TOKEN, USERS
from services.organization.repositories import REPOSITORIES
from services.organization.stores import Stores
from services.organization.tables import HISTORY, WATCHED
from services.organization.uploads import Uploads
from services.runtime.clock import Clock
from services.runtime.database import Database, Reader, Tx
from services.runtime.errors import InvalidArgument, NotFound, Unauthenticated
from services.runtime.principal import current_principal
from services.runtime.serving import Context
from services.runtime.spine.index import Narrow
from services.runtime.spine.source import watch_index
from services.runtime.spine.tokens import parse_consistency

_WATCHED_KINDS = [table.kind for table in WATCHED]
_TARGETS = {
    "organization_id": ENTITY_KIND_ORGANIZATION,
    "repository_id": ENTITY_KIND_REPOSITORY,
    "task_id": ENTITY_KIND_TASK,
}


@dataclass(frozen=True, slots=True)
class OrganizationServicer(organization_pb2_grpc.OrganizationServiceServicer):
    """Routing, authentication, the upstream watch, and what children ask upward."""

    database: Database
    clock: Clock
    stores: Stores
    user: UserServiceStub
    uploads: Uploads

    async def Bootstrap(
        self, request: organization_pb2.BootstrapRequest, context: Context
    ) -> organization_pb2.BootstrapResponse:
        """Create the first organization with its owner and a token, once."""
        existing = await self.database.read(self.stores.organizations.of_slug, request.slug)
        if existing is not None:
            return organization_pb2.BootstrapResponse(organization=existing)
        created = await self.user.CreateUser(
            CreateUserRequest(
                user_id=self.clock.new_id("usr"), display_name=request.user_name, email=request.user_email
            )
        )
        secret = await self._issue(created.user.id, FIRST_TOKEN)  # before it is founded: it is the only way in
        organization = await self.database.write(self._bootstrap, request, created.user)
        return organization_pb2.BootstrapResponse(organization=organization, api_token=secret)

    def _bootstrap(self, tx: Tx, request: organization_pb2.BootstrapRequest, owner: User) -> Organization:
        existing = self.stores.organizations.of_slug(tx, request.slug)
        if existing is not None:
            return existing
        organization = Organization(
            slug=request.slug, display_name=request.organization_name, kind=ORGANIZATION_KIND_TEAM
        )
        organization.settings.default_agent = request.default_agent
        self.stores.organizations.found(tx, organization, owner)
        return organization

    async def Authenticate(
        self, request: organization_pb2.AuthenticateRequest, context: Context
    ) -> organization_pb2.AuthenticateResponse:
        """Say whom a token speaks for."""
        return await self.database.read(self._authenticate, request.token_hash)

    def _authenticate(self, tx: Reader, token_hash: str) -> organization_pb2.AuthenticateResponse:
        token = self.stores.people.valid_token(tx, token_hash, self.clock.seconds())
        user = USERS.find(tx, token.user_id) if token is not None else None
        if token is None or user is None:
            sentence = "the bearer token is unknown, expired or revoked"
            raise Unauthenticated(ERROR_REASON_TOKEN_INVALID, sentence)
        memberships = MEMBERSHIPS_OF(tx, user_id=user.id)
        return organization_pb2.AuthenticateResponse(
            user=user, memberships=memberships, scope=token.scope if token.HasField("scope") else None
        )

    async def ResolveRoute(
        self, request: organization_pb2.ResolveRouteRequest, context: Context
    ) -> organization_pb2.ResolveRouteResponse:
        """Find the organization and repository of an id that the user may know of."""
        return await self.database.read(self._resolve, request)

    def _resolve(
        self, tx: Reader, request: organization_pb2.ResolveRouteRequest
    ) -> organization_pb2.ResolveRouteResponse:
        target = request.WhichOneof("target") or ""
        wanted: str = getattr(request, target)
        organization_id, repository_id = self._place(tx, target, wanted)
        member = self.stores.members.find(tx, organization_id, request.user_id) if organization_id else None
        organization = ORGANIZATIONS.find(tx, organization_id) if member is not None else None
        if member is None or organization is None:
            raise NotFound(_TARGETS[target], wanted)
        return organization_pb2.ResolveRouteResponse(
            organization_id=organization_id,
            repository_id=repository_id,
            role=member.role,
            settings=organization.settings,
        )

    def _place(self, tx: Reader, target: str, wanted: str) -> tuple[str, str]:
        """Return the organization and the repository of an id, empty where there are none."""
        if target == "organization_id":
            return wanted, ""
        if target == "task_id":
            return self.stores.tasks.route(tx, wanted) or ("", "")
        repository = REPOSITORIES.find(tx, wanted)
        return (repository.organization_id, repository.id) if repository is not None else ("", "")

    async def WatchIndex(
        self, request: organization_pb2.WatchIndexRequest, context: Context
    ) -> AsyncIterator[organization_pb2.WatchIndexResponse]:
        """Watch an organization's index tables."""
        scope, selection = request.organization_id, request.selection
        if not current_principal().sees(scope):
            raise NotFound(ENTITY_KIND_ORGANIZATION, scope)
        freshness = parse_consistency(selection.consistency)
        user_id = current_principal().user_id or selection.viewer_id
        await self.stores.index.await_point(
            freshness.point, scope, user_id, context.time_remaining(), freshness.wait_seconds
        )
        topic = f"{'history' if request.history else 'organization'}/{scope}"
        kinds = [HISTORY.kind] if request.history else _WATCHED_KINDS
        if request.kinds:
            kinds = [kind for kind in kinds if kind in request.kinds]
        narrow: Narrow = {}
        if request.HasField("tasks") and ENTITY_KIND_TASK in kinds:
            narrow = {ENTITY_KIND_TASK: self.stores.tasks.narrowed(request.tasks)}
        async for frame in watch_index(self.stores.index, topic, scope, kinds, selection, narrow):
            yield organization_pb2.WatchIndexResponse(frame=frame)

    async def AwaitConsistency(
        self, request: organization_pb2.AwaitConsistencyRequest, context: Context
    ) -> organization_pb2.AwaitConsistencyResponse:
        """Wait until the index is as new as the token."""
        freshness = parse_consistency(request.consistency)
        user_id = current_principal().user_id
        await self.stores.index.await_point(
            freshness.point, request.organization_id, user_id, context.time_remaining(), freshness.wait_seconds
        )
        return organization_pb2.AwaitConsistencyResponse()

    async def CheckOptions(
        self, request: organization_pb2.CheckOptionsRequest, context: Context
    ) -> organization_pb2.CheckOptionsResponse:
        """Check that what a new task asks for is known."""
        await self.database.read(self.stores.catalogue.check, request)
        return organization_pb2.CheckOptionsResponse()

    async def ClaimBlobs(
        self, request: organization_pb2.ClaimBlobsRequest, context: Context
    ) -> organization_pb2.ClaimBlobsResponse:
        """Name blobs on behalf of a task, or say whether that could be done."""
        if request.validate_only:
            blobs = await self.database.read(self._check, request)
        else:
            blobs = await self.database.write(self._claim, request)
        return organization_pb2.ClaimBlobsResponse(blobs=blobs)

    def _check(self, tx: Reader, request: organization_pb2.ClaimBlobsRequest) -> list[BlobReference]:
        self.stores.organizations.check_open(tx, request.organization_id, ROLE_UNSPECIFIED)
        return self.stores.claims.check(tx, request.organization_id, request.blob_ids)

    def _claim(self, tx: Tx, request: organization_pb2.ClaimBlobsRequest) -> list[BlobReference]:
        if not request.task_id:
            raise InvalidArgument("task_id", "must say on whose behalf")
        self.stores.organizations.check_open(tx, request.organization_id, ROLE_UNSPECIFIED)
        return self.stores.claims.claim(tx, request.organization_id, request.task_id, request.blob_ids)

    async def FetchBlob(
        self, request: organization_pb2.FetchBlobRequest, context: Context
    ) -> organization_pb2.FetchBlobResponse:
        """Read part of a blob that a task has named."""
        named_by = self.stores.claims.named_by
        blob = await self.database.read(named_by, request.organization_id, request.task_id, request.blob_id)
        return organization_pb2.FetchBlobResponse(data=await self.uploads.read(blob, request.offset))

    async def StoreBlob(
        self, request: organization_pb2.StoreBlobRequest, context: Context
    ) -> organization_pb2.StoreBlobResponse:
        """Store the next part of what an agent has shown."""
        organization_id = request.organization_id
        await self.database.read(self.stores.organizations.check_open, organization_id, ROLE_UNSPECIFIED)
        shown = Blob(
            id=request.upload_id,
            organization_id=organization_id,
            display_name=request.display_name,
            media_type=request.media_type,
            size_bytes=request.size_bytes,
            sha256=request.sha256,
        )
        blob = await self.uploads.store(shown, request.task_id, request.offset, request.data)
        if blob.state != BLOB_STATE_COMPLETE:
            return organization_pb2.StoreBlobResponse(upload_id=blob.id, received_bytes=blob.received_bytes)
        return organization_pb2.StoreBlobResponse(blob=reference_to(blob))

    async def BindGithubLogin(
        self, request: organization_pb2.BindGithubLoginRequest, context: Context
    ) -> organization_pb2.BindGithubLoginResponse:
        """Bind a GitHub login to an organization, on the operator's word."""
        current_principal().require_operator()
        bind = self.stores.organizations.bind_login
        organization = await self.database.write(bind, request.slug, request.github_login)
        return organization_pb2.BindGithubLoginResponse(organization=organization)

    async def IssueToken(
        self, request: organization_pb2.IssueTokenRequest, context: Context
    ) -> organization_pb2.IssueTokenResponse:
        """Make a token for a person, on the operator's word."""
        current_principal().require_operator()
        person = await self.database.read(self.stores.people.of_email, request.email)
        if person is None:
            raise NotFound(ENTITY_KIND_USER, request.email)
        return organization_pb2.IssueTokenResponse(api_token=await self._issue(person.id, request.name))

    async def _issue(self, user_id: str, name: str) -> str:
        """Have a token made; return it once it works."""
        issued = await self.user.IssueToken(UserIssueTokenRequest(user_id=user_id, name=name))
        point = parse_consistency(Consistency(at_least_as_fresh=[issued.consistency_token])).point
        await self.stores.index.await_point(point, "", user_id)
        return issued.api_token

    async def GetGitCredential(
        self, request: organization_pb2.GetGitCredentialRequest, context: Context
    ) -> organization_pb2.GetGitCredentialResponse:
        """Ask the user child for a member's git credential."""
        member: Member | None = await self.database.read(
            self.stores.members.find, request.organization_id, request.user_id
        )
        if member is None:
            return organization_pb2.GetGitCredentialResponse()
        credential = await self.user.GetGitCredential(
            UserGitCredentialRequest(user_id=request.user_id, host=request.host)
        )
        return organization_pb2.GetGitCredentialResponse(username=credential.username, secret=credential.secret)
