"""The gRPC surface of the history service."""

from collections.abc import AsyncIterator
from dataclasses import dataclass

from branchline_internal.history.v1 import history_pb2, history_pb2_grpc

from services.history.store import HistoryStore
from services.runtime.database import Database
from services.runtime.serving import Context


@dataclass(frozen=True, slots=True)
class HistoryServicer(history_pb2_grpc.HistoryServiceServicer):
    """Takes events from organization and pushes them back numbered."""

    database: Database
    store: HistoryStore

    async def AppendEvents(
        self, request: history_pb2.AppendEventsRequest, context: Context
    ) -> history_pb2.AppendEventsResponse:
        """Give numbers to, store and push up the events that are new."""
        await self.database.write(self.store.append, request.events)
        return history_pb2.AppendEventsResponse()

    async def DeleteFeed(
        self, request: history_pb2.DeleteFeedRequest, context: Context
    ) -> history_pb2.DeleteFeedResponse:
        """Forget a feed."""
        await self.database.write(self.store.delete, request.organization_id)
        return history_pb2.DeleteFeedResponse()

    async def ExportEvents(
        self, request: history_pb2.ExportEventsRequest, context: Context
    ) -> AsyncIterator[history_pb2.ExportEventsResponse]:
        """Stream the whole feed, oldest first."""
        after = request.after_sequence
        while page := await self.database.read(self.store.page, request.organization_id, after):
            yield history_pb2.ExportEventsResponse(events=page)
            after = page[-1].sequence
