"""The public commands and reads on the catalogue of repositories."""

import asyncio
from dataclasses import dataclass

from branchline.v1 import repositories_pb2 as api
from branchline.v1 import repositories_pb2_grpc
from branchline.v1.common_pb2 import ENTITY_KIND_REPOSITORY
from branchline.v1.errors_pb2 import ERROR_REASON_GITHUB_NOT_CONNECTED
from branchline.v1.repositories_pb2 import REPOSITORY_SOURCE_URL, Repository
from branchline.v1.roles_pb2 import ROLE_ADMIN
from branchline_internal.github_data.v1.github_data_pb2 import SyncOrganizationRequest

from services.organization.destinations import TO_GITHUB_DATA, TO_REPOSITORY
from services.organization.reading import Context, Reading
from services.organization.remote import check_remote_url, name_from_url
from services.organization.repositories import REPOSITORIES
from services.runtime.branches import check_branch
from services.runtime.database import Tx
from services.runtime.errors import FailedPrecondition, NotFound
from services.runtime.principal import current_principal
from services.runtime.spine.commands import Commands
from services.runtime.spine.outbox import Mark, Outbox
from services.runtime.spine.pages import page_size
from services.runtime.spine.tokens import consistency_token, parse_page_token

CHILD_SECONDS = 2.0
"""Time that a creation waits for its child, so that the next command finds it. The child is made in any case."""


@dataclass(frozen=True, slots=True)
class PublicRepositoryServicer(Reading, repositories_pb2_grpc.RepositoryServiceServicer):
    """The repository catalogue."""

    commands: Commands
    outbox: Outbox

    async def CreateRepository(
        self, request: api.CreateRepositoryRequest, context: Context
    ) -> api.CreateRepositoryResponse:
        """Add a repository by URL: index it here, have the child created."""
        check_remote_url(request.remote_url)
        if request.default_branch:
            check_branch(request.default_branch, "default_branch")
        added = asyncio.Event()
        answer = await self.commands.run(request, api.CreateRepositoryResponse, self._add, request, added)
        if added.is_set():  # now, and not when the request came first
            await self.outbox.await_delivery(TO_REPOSITORY, answer.repository.id, CHILD_SECONDS)
        return answer

    def _add(self, tx: Tx, request: api.CreateRepositoryRequest, added: asyncio.Event) -> api.CreateRepositoryResponse:
        organization = self.stores.organizations.open(tx, request.organization_id, ROLE_ADMIN)
        repository = Repository(
            organization_id=organization.id,
            display_name=request.display_name or name_from_url(request.remote_url),
            remote_url=request.remote_url,
            default_branch=request.default_branch,
            source=REPOSITORY_SOURCE_URL,
        )
        self.stores.repositories.add(tx, repository)
        tx.after_commit(added.set)
        return api.CreateRepositoryResponse(repository=repository, consistency_token=_token(repository))

    async def DeleteRepository(
        self, request: api.DeleteRepositoryRequest, context: Context
    ) -> api.DeleteRepositoryResponse:
        """Have a repository deleted with its tasks."""
        return await self.commands.run(request, api.DeleteRepositoryResponse, self._delete, request)

    def _delete(self, tx: Tx, request: api.DeleteRepositoryRequest) -> api.DeleteRepositoryResponse:
        principal = current_principal()
        repository = REPOSITORIES.get(tx, request.repository_id)
        if not principal.sees(repository.organization_id):
            raise NotFound(ENTITY_KIND_REPOSITORY, request.repository_id)
        self.stores.organizations.open(tx, repository.organization_id, ROLE_ADMIN)
        self.stores.repositories.begin_deletion(tx, repository)
        return api.DeleteRepositoryResponse(consistency_token=_token(repository))

    async def GetRepository(self, request: api.GetRepositoryRequest, context: Context) -> api.GetRepositoryResponse:
        """Read one repository."""
        await self.caught_up(request.consistency, current_principal().organization_id, context)
        repository = await self.database.read(REPOSITORIES.get, request.repository_id)
        if not current_principal().sees(repository.organization_id):
            raise NotFound(ENTITY_KIND_REPOSITORY, request.repository_id)
        return api.GetRepositoryResponse(repository=repository)

    async def ListRepositories(
        self, request: api.ListRepositoriesRequest, context: Context
    ) -> api.ListRepositoriesResponse:
        """List the catalogue."""
        await self.caught_up(request.consistency, request.organization_id, context)
        after = parse_page_token(request, request.page_token, str, str)
        most = page_size(request.page_size)
        page = await self.database.read(self.stores.repositories.page, request.organization_id, after, most)
        return api.ListRepositoriesResponse(repositories=page.found, next_page_token=page.next_token(request))

    async def SyncGithub(self, request: api.SyncGithubRequest, context: Context) -> api.SyncGithubResponse:
        """Have the GitHub cache read GitHub now."""
        return await self.commands.run(request, api.SyncGithubResponse, self._sync, request)

    def _sync(self, tx: Tx, request: api.SyncGithubRequest) -> api.SyncGithubResponse:
        organization = self.stores.organizations.open(tx, request.organization_id, ROLE_ADMIN)
        if not organization.github_login:
            sentence = "no GitHub login is bound to the organization; an operator does that"
            raise FailedPrecondition(ERROR_REASON_GITHUB_NOT_CONNECTED, sentence)
        sync = SyncOrganizationRequest(organization_id=organization.id, github_login=organization.github_login)
        self.outbox.mark(tx, [Mark(organization.id, 1, sync, TO_GITHUB_DATA)])
        return api.SyncGithubResponse()


def _token(repository: Repository) -> str:
    return consistency_token([(ENTITY_KIND_REPOSITORY, repository.id, repository.revision)])
