"""The gRPC surface that organization, gateway and task use of the repository."""

from collections.abc import AsyncIterator
from dataclasses import dataclass

from branchline.v1.repositories_pb2 import Repository
from branchline.v1.tasks_pb2 import Task
from branchline_internal.organization.v1.organization_pb2 import (
    GetGitCredentialRequest as OrganizationGitCredentialRequest,
)
from branchline_internal.organization.v1.organization_pb2_grpc import OrganizationServiceStub
from branchline_internal.repository.v1 import repository_pb2, repository_pb2_grpc

from services.repository.deletion import Deletion
from services.repository.store import RepositoryStore
from services.repository.tables import WATCHED
from services.repository.workbench import Workbench
from services.runtime.database import Database, Reader
from services.runtime.principal import current_principal
from services.runtime.remote import host_of
from services.runtime.serving import Context
from services.runtime.spine.index import Index
from services.runtime.spine.source import watch_index
from services.runtime.spine.tokens import parse_consistency_token

_KINDS = tuple(table.kind for table in WATCHED)


@dataclass(frozen=True, slots=True)
class RepositoryServicer(repository_pb2_grpc.RepositoryServiceServicer):
    """Creation and deletion by the organization, the upstream watch, and what tasks ask upward."""

    database: Database
    index: Index
    store: RepositoryStore
    workbench: Workbench
    deletion: Deletion
    organization: OrganizationServiceStub

    async def EnsureRepository(
        self, request: repository_pb2.EnsureRepositoryRequest, context: Context
    ) -> repository_pb2.EnsureRepositoryResponse:
        """Create the repository or bring it up to date."""
        await self.database.write(self.store.ensure, request)
        return repository_pb2.EnsureRepositoryResponse()

    async def DeleteRepository(
        self, request: repository_pb2.DeleteRepositoryRequest, context: Context
    ) -> repository_pb2.DeleteRepositoryResponse:
        """Record that the repository shall go; the sweep does the rest."""
        await self.database.write(self.deletion.begin, request.repository_id)
        return repository_pb2.DeleteRepositoryResponse()

    async def WatchIndex(
        self, request: repository_pb2.WatchIndexRequest, context: Context
    ) -> AsyncIterator[repository_pb2.WatchIndexResponse]:
        """Watch the index tables of one task."""
        selection, principal = request.selection, current_principal()
        point = parse_consistency_token(selection.consistency_token)
        task = await self.database.read(self.workbench.task, request.task_id, principal)
        await self.index.await_point(point, task.organization_id, principal.user_id, context.time_remaining())
        async for frame in watch_index(self.index, f"task/{task.id}", task.id, _KINDS, selection):
            yield repository_pb2.WatchIndexResponse(frame=frame)

    async def GetGitCredential(
        self, request: repository_pb2.GetGitCredentialRequest, context: Context
    ) -> repository_pb2.GetGitCredentialResponse:
        """Ask upward for the credential of a task's owner at the repository's host."""
        task, repository = await self.database.read(self._of_task, request.task_id)
        credential = await self.organization.GetGitCredential(
            OrganizationGitCredentialRequest(
                organization_id=task.organization_id,
                user_id=task.owner_user_id,
                host=host_of(repository.remote_url),
            )
        )
        return repository_pb2.GetGitCredentialResponse(username=credential.username, secret=credential.secret)

    def _of_task(self, tx: Reader, task_id: str) -> tuple[Task, Repository]:
        task = self.workbench.task(tx, task_id, current_principal())
        return task, self.store.visible(tx, task.repository_id, current_principal())
