"""The gRPC surface of the github-data service."""

from dataclasses import dataclass

from branchline_internal.github_data.v1 import github_data_pb2, github_data_pb2_grpc

from services.github_data.store import GithubStore
from services.github_data.sync import GithubSync
from services.runtime.database import Database
from services.runtime.serving import Context


@dataclass(frozen=True, slots=True)
class GithubDataServicer(github_data_pb2_grpc.GithubDataServiceServicer):
    """Takes the organization's wishes."""

    database: Database
    store: GithubStore
    sync: GithubSync

    async def SyncOrganization(
        self, request: github_data_pb2.SyncOrganizationRequest, context: Context
    ) -> github_data_pb2.SyncOrganizationResponse:
        """Record the wish; the sync loop does the reading."""
        await self.database.write(self.store.want_sync, request.organization_id, request.github_login)
        self.sync.wanted.notify()
        return github_data_pb2.SyncOrganizationResponse()

    async def DeleteOrganization(
        self, request: github_data_pb2.DeleteOrganizationRequest, context: Context
    ) -> github_data_pb2.DeleteOrganizationResponse:
        """Forget an organization, and stop reading its account."""
        await self.database.write(self.store.forget, request.organization_id)
        self.sync.stop(request.organization_id)
        return github_data_pb2.DeleteOrganizationResponse()
