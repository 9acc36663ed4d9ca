"""What the organization carries down to its children: births and deaths, events, unread marks, syncs."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from branchline.v1.history_pb2 import HistoryEvent
from branchline_internal.github_data.v1.github_data_pb2 import DeleteOrganizationRequest, SyncOrganizationRequest
from branchline_internal.github_data.v1.github_data_pb2_grpc import GithubDataServiceStub
from branchline_internal.history.v1.history_pb2 import AppendEventsRequest, DeleteFeedRequest
from branchline_internal.history.v1.history_pb2_grpc import HistoryServiceStub
from branchline_internal.repository.v1.repository_pb2 import DeleteRepositoryRequest, EnsureRepositoryRequest
from branchline_internal.repository.v1.repository_pb2_grpc import RepositoryServiceStub
from branchline_internal.user.v1.user_pb2 import ForgetTaskStatesRequest, MarkUnreadRequest
from branchline_internal.user.v1.user_pb2_grpc import UserServiceStub

from services.organization.destinations import TO_GITHUB_DATA, TO_HISTORY, TO_REPOSITORY, TO_USER
from services.organization.repositories import REPOSITORIES
from services.organization.stores import Stores
from services.runtime.database import Database
from services.runtime.principal import Principal, bind_principal
from services.runtime.service import Chassis
from services.runtime.spine.outbox import OutboxRow


@dataclass(frozen=True, slots=True)
class Children:
    """The organization's direct children."""

    repository: RepositoryServiceStub
    user: UserServiceStub
    history: HistoryServiceStub
    github_data: GithubDataServiceStub
    database: Database
    stores: Stores

    def carry(self, chassis: Chassis) -> None:
        """Carry to each child what is marked for it."""
        chassis.courier(TO_REPOSITORY, self.to_repository)
        chassis.courier(TO_USER, self.to_user)
        chassis.courier(TO_GITHUB_DATA, self.to_github_data)
        chassis.batch_courier(TO_HISTORY, self.to_history)

    async def to_repository(self, row: OutboxRow) -> None:
        """Create a repository, or have it deleted in the name of its organization."""
        if row.holds(EnsureRepositoryRequest):
            await self.repository.EnsureRepository(EnsureRepositoryRequest.FromString(row.payload))
            return
        repository = await self.database.read(REPOSITORIES.find, row.entity_id)
        if repository is not None:
            bind_principal(Principal(service="organization", organization_id=repository.organization_id))
        await self.repository.DeleteRepository(DeleteRepositoryRequest.FromString(row.payload))

    async def to_user(self, row: OutboxRow) -> None:
        """Mark tasks unread, or forget what people had open."""
        if row.holds(MarkUnreadRequest):
            await self.user.MarkUnread(MarkUnreadRequest.FromString(row.payload))
            return
        request = ForgetTaskStatesRequest.FromString(row.payload)
        await self.user.ForgetTaskStates(request)
        if row.entity_id == request.organization_id:
            await self._forgotten(request.organization_id, TO_USER)

    async def to_github_data(self, row: OutboxRow) -> None:
        """Have GitHub read, or what is cached of it forgotten."""
        if row.holds(SyncOrganizationRequest):
            await self.github_data.SyncOrganization(SyncOrganizationRequest.FromString(row.payload))
            return
        request = DeleteOrganizationRequest.FromString(row.payload)
        await self.github_data.DeleteOrganization(request)
        await self._forgotten(request.organization_id, TO_GITHUB_DATA)

    async def to_history(self, rows: Sequence[OutboxRow]) -> None:
        """Have events appended in their order, many at once, and feeds forgotten behind their last event."""
        for is_event, some in groupby(rows, lambda row: row.holds(HistoryEvent)):
            if is_event:
                events = [HistoryEvent.FromString(row.payload) for row in some]
                await self.history.AppendEvents(AppendEventsRequest(events=events))
                continue
            for row in some:
                request = DeleteFeedRequest.FromString(row.payload)
                await self.history.DeleteFeed(request)
                await self._forgotten(request.organization_id, TO_HISTORY)

    async def _forgotten(self, organization_id: str, child: str) -> None:
        await self.stores.teardown.forgotten(self.database, organization_id, child)
