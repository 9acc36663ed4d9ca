"""History: the one append-only feed of each organization. Child of organization, coordinator of nothing."""

from pathlib import Path

from branchline.history.v1 import history_pb2_grpc
from branchline.spine.v1 import push_pb2_grpc

from services.history.servicer import HistoryServicer
from services.history.store import HistoryStore
from services.history.tables import spine
from services.runtime.config import ServiceConfig
from services.runtime.service import Service, chassis
from services.runtime.spine.push import PushClient


class HistoryConfig(ServiceConfig):
    """Configuration of the history service."""

    organization_address: str


def build(config: HistoryConfig) -> Service:
    """Build the service."""
    parts = chassis("history", config, spine, Path(__file__).parent)
    servicer = HistoryServicer(parts, HistoryStore(parts.database))
    parts.service.serves(
        "branchline.history.v1.HistoryService",
        lambda server: history_pb2_grpc.add_HistoryServiceServicer_to_server(servicer, server),
    )
    organization = parts.channel(config.organization_address)
    push = PushClient(parts.outbox, lambda: push_pb2_grpc.PushServiceStub(organization), "history")
    parts.service.loops.append(push.run)
    return parts.service
