"""The gRPC surface of the history service."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
from branchline.history.v1 import history_pb2, history_pb2_grpc

from services.history.store import HistoryStore
from services.runtime.service import Chassis
from services.runtime.spine.outbox import Mark


@dataclass(frozen=True, slots=True)
class HistoryServicer(history_pb2_grpc.HistoryServiceServicer):
    """Takes events from organization and pushes them back numbered."""

    chassis: Chassis
    store: HistoryStore

    async def AppendEvents(
        self, request: history_pb2.AppendEventsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> history_pb2.AppendEventsResponse:
        """Give numbers to, store and push up the events that are new."""
        async with self.chassis.database.transaction() as tx:
            numbered = await self.store.append(tx, request.events)
            await self.chassis.outbox.mark(tx, [Mark(event.id, 1, event) for event in numbered])
        return history_pb2.AppendEventsResponse()

    async def ExportEvents(
        self, request: history_pb2.ExportEventsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[history_pb2.ExportEventsResponse]:
        """Stream the whole feed, oldest first."""
        async for page in self.store.pages(request.organization_id, request.after_sequence):
            yield history_pb2.ExportEventsResponse(events=page)
