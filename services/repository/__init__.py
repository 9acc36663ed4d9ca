"""Repository: coordinator of tasks. Holds the workbench index of its tasks and caches of branches and pull requests."""

from pathlib import Path

from branchline.gateway.v1 import repositories_pb2_grpc, sessions_pb2_grpc, tasks_pb2_grpc
from branchline.organization.v1 import organization_pb2_grpc
from branchline.repository.v1 import repository_pb2_grpc
from branchline.spine.v1 import push_pb2_grpc
from branchline.task.v1 import task_pb2_grpc

from services.repository.ingest import RepositoryIngest
from services.repository.public import PublicRepositoryReader, PublicSessionReader, PublicTaskServicer
from services.repository.push import Children
from services.repository.servicer import RepositoryServicer
from services.repository.store import RepositoryStore
from services.repository.tables import WATCHED, spine
from services.runtime.config import ServiceConfig
from services.runtime.service import Service, chassis
from services.runtime.spine.index import Index
from services.runtime.spine.ingest import PushServicer
from services.runtime.spine.push import PushClient


class RepositoryConfig(ServiceConfig):
    """Configuration of the repository service."""

    organization_address: str
    task_address: str


def build(config: RepositoryConfig) -> Service:
    """Build the service."""
    parts = chassis("repository", config, spine, Path(__file__).parent)
    index = Index(parts.database, spine, WATCHED, parts.clock)
    store = RepositoryStore(parts, index)
    ingest = RepositoryIngest(parts, store).ingest()
    organization = parts.channel(config.organization_address)
    internal = RepositoryServicer(parts, store, organization_pb2_grpc.OrganizationServiceStub(organization))
    service = parts.service
    service.serves(
        "branchline.repository.v1.RepositoryService",
        lambda server: repository_pb2_grpc.add_RepositoryServiceServicer_to_server(internal, server),
    )
    service.serves(
        "branchline.spine.v1.PushService",
        lambda server: push_pb2_grpc.add_PushServiceServicer_to_server(PushServicer(ingest), server),
    )
    service.serves(
        "branchline.gateway.v1.TaskService",
        lambda server: tasks_pb2_grpc.add_TaskServiceServicer_to_server(PublicTaskServicer(parts, store), server),
    )
    service.serves(
        "branchline.gateway.v1.SessionService",
        lambda server: sessions_pb2_grpc.add_SessionServiceServicer_to_server(
            PublicSessionReader(parts, store), server
        ),
    )
    service.serves(
        "branchline.gateway.v1.RepositoryService",
        lambda server: repositories_pb2_grpc.add_RepositoryServiceServicer_to_server(
            PublicRepositoryReader(parts, store), server
        ),
    )
    push = PushClient(parts.outbox, lambda: push_pb2_grpc.PushServiceStub(organization), "repository")
    courier = Children(task_pb2_grpc.TaskServiceStub(parts.channel(config.task_address))).courier(parts.outbox)
    service.loops += [ingest.run, index.run_compaction, push.run, courier.run]
    return service
