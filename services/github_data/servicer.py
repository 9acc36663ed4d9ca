"""The gRPC surface of the github-data service."""

from dataclasses import dataclass
from typing import Any

import grpc
from branchline.github_data.v1 import github_data_pb2, github_data_pb2_grpc

from services.github_data.store import GithubStore
from services.github_data.sync import GithubSync


@dataclass(frozen=True, slots=True)
class GithubDataServicer(github_data_pb2_grpc.GithubDataServiceServicer):
    """Takes the organization's wish to read GitHub."""

    store: GithubStore
    sync: GithubSync

    async def SyncOrganization(
        self,
        request: github_data_pb2.SyncOrganizationRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> github_data_pb2.SyncOrganizationResponse:
        """Record the wish; the sync loop does the reading."""
        await self.store.want_sync(request.organization_id, request.github_login)
        self.sync.wanted.notify()
        return github_data_pb2.SyncOrganizationResponse()
