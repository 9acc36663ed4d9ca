"""The gRPC surface that organization, gateway and task use of the repository."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
from branchline.organization.v1.organization_pb2 import GetGitCredentialRequest as OrganizationGitCredentialRequest
from branchline.organization.v1.organization_pb2_grpc import OrganizationServiceStub
from branchline.repository.v1 import repository_pb2, repository_pb2_grpc

from services.repository.store import RepositoryStore
from services.repository.tables import WATCHED
from services.runtime.principal import current_principal
from services.runtime.remote import host_of
from services.runtime.service import Chassis
from services.runtime.spine.watch import watch

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class RepositoryServicer(repository_pb2_grpc.RepositoryServiceServicer):
    """Creation by the organization, the upstream watch, and what tasks ask upward."""

    chassis: Chassis
    store: RepositoryStore
    organization: OrganizationServiceStub

    async def EnsureRepository(
        self, request: repository_pb2.EnsureRepositoryRequest, context: Context
    ) -> repository_pb2.EnsureRepositoryResponse:
        """Create the repository or bring it up to date."""
        async with self.chassis.database.transaction() as tx:
            await self.store.ensure(tx, request)
        return repository_pb2.EnsureRepositoryResponse()

    async def WatchIndex(
        self, request: repository_pb2.WatchIndexRequest, context: Context
    ) -> AsyncIterator[repository_pb2.WatchIndexResponse]:
        """Watch the index tables of one task."""
        topic, kinds = f"task/{request.task_id}", [table.kind for table in WATCHED]
        async for frame in watch(self.store.index, request.task_id, topic, kinds, request.resume_token):
            yield repository_pb2.WatchIndexResponse(frame=frame.frame, horizon_seq=frame.horizon)

    async def GetGitCredential(
        self, request: repository_pb2.GetGitCredentialRequest, context: Context
    ) -> repository_pb2.GetGitCredentialResponse:
        """Ask upward for the credential of a task's owner at the repository's host."""
        principal = current_principal()
        async with self.chassis.database.read() as connection:
            task = await self.store.task(connection, request.task_id, principal)
            repository = await self.store.repository(connection, task.repository_id, principal)
        credential = await self.organization.GetGitCredential(
            OrganizationGitCredentialRequest(
                organization_id=task.organization_id,
                user_id=task.owner_user_id,
                host=host_of(repository.remote_url),
            )
        )
        return repository_pb2.GetGitCredentialResponse(username=credential.username, secret=credential.secret)
