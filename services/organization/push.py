"""What the organization carries down to its children: repositories to create, events, unread marks, syncs."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from branchline.github_data.v1.github_data_pb2 import SyncOrganizationRequest
from branchline.github_data.v1.github_data_pb2_grpc import GithubDataServiceStub
from branchline.history.v1.history_pb2 import AppendEventsRequest
from branchline.history.v1.history_pb2_grpc import HistoryServiceStub
from branchline.repository.v1.repository_pb2 import EnsureRepositoryRequest
from branchline.repository.v1.repository_pb2_grpc import RepositoryServiceStub
from branchline.resource.v1.history_pb2 import HistoryEvent
from branchline.user.v1.user_pb2 import MarkUnreadRequest
from branchline.user.v1.user_pb2_grpc import UserServiceStub

from services.organization.ingest import TO_GITHUB_DATA, TO_HISTORY, TO_REPOSITORY, TO_USER
from services.runtime.spine.courier import Courier
from services.runtime.spine.outbox import Outbox, OutboxRow


@dataclass(frozen=True, slots=True)
class Children:
    """The organization's direct children."""

    repository: RepositoryServiceStub
    user: UserServiceStub
    history: HistoryServiceStub
    github_data: GithubDataServiceStub

    def couriers(self, outbox: Outbox) -> list[Courier]:
        """Return a courier for each child that something is handed to."""
        return [
            Courier(outbox, TO_REPOSITORY, self._ensure_repositories),
            Courier(outbox, TO_HISTORY, self._append_events),
            Courier(outbox, TO_USER, self._mark_unread),
            Courier(outbox, TO_GITHUB_DATA, self._sync),
        ]

    async def _ensure_repositories(self, rows: Sequence[OutboxRow]) -> None:
        await asyncio.gather(
            *(self.repository.EnsureRepository(EnsureRepositoryRequest.FromString(row.state.value)) for row in rows)
        )

    async def _append_events(self, rows: Sequence[OutboxRow]) -> None:
        events = [HistoryEvent.FromString(row.state.value) for row in rows]
        await self.history.AppendEvents(AppendEventsRequest(events=events))

    async def _mark_unread(self, rows: Sequence[OutboxRow]) -> None:
        for row in rows:
            await self.user.MarkUnread(MarkUnreadRequest.FromString(row.state.value))

    async def _sync(self, rows: Sequence[OutboxRow]) -> None:
        for row in rows:
            await self.github_data.SyncOrganization(SyncOrganizationRequest.FromString(row.state.value))
