"""Organization: the root coordinator. Coordinator of repositories and users, parent of history and github-data."""

from pathlib import Path

from branchline.gateway.v1 import (
    history_pb2_grpc,
    organizations_pb2_grpc,
    repositories_pb2_grpc,
    tasks_pb2_grpc,
    users_pb2_grpc,
)
from branchline.github_data.v1 import github_data_pb2_grpc
from branchline.history.v1 import history_pb2_grpc as internal_history_pb2_grpc
from branchline.organization.v1 import organization_pb2_grpc
from branchline.repository.v1 import repository_pb2_grpc
from branchline.spine.v1 import push_pb2_grpc
from branchline.user.v1 import user_pb2_grpc

from services.organization.ingest import OrganizationIngest
from services.organization.public import (
    PublicHistoryServicer,
    PublicOrganizationServicer,
    PublicRepositoryServicer,
    PublicTaskServicer,
    PublicUserReader,
)
from services.organization.push import Children
from services.organization.servicer import OrganizationServicer
from services.organization.store import OrganizationStore
from services.organization.tables import HISTORY, UNWATCHED, WATCHED, spine
from services.runtime.config import ServiceConfig
from services.runtime.service import Service, chassis
from services.runtime.spine.index import Index
from services.runtime.spine.ingest import PushServicer


class OrganizationConfig(ServiceConfig):
    """Configuration of the organization service: where its children are."""

    repository_address: str
    user_address: str
    history_address: str
    github_data_address: str


def build(config: OrganizationConfig) -> Service:
    """Build the service."""
    parts = chassis("organization", config, spine, Path(__file__).parent)
    index = Index(parts.database, spine, [*WATCHED, HISTORY], parts.clock, UNWATCHED)
    store = OrganizationStore(parts.database, index, parts.clock)
    ingest = OrganizationIngest(parts, store).ingest()
    user = user_pb2_grpc.UserServiceStub(parts.channel(config.user_address))
    children = Children(
        repository_pb2_grpc.RepositoryServiceStub(parts.channel(config.repository_address)),
        user,
        internal_history_pb2_grpc.HistoryServiceStub(parts.channel(config.history_address)),
        github_data_pb2_grpc.GithubDataServiceStub(parts.channel(config.github_data_address)),
    )
    service = parts.service
    internal = OrganizationServicer(parts, store, user)
    public = (parts, store, user)
    service.serves(
        "branchline.organization.v1.OrganizationService",
        lambda server: organization_pb2_grpc.add_OrganizationServiceServicer_to_server(internal, server),
    )
    service.serves(
        "branchline.spine.v1.PushService",
        lambda server: push_pb2_grpc.add_PushServiceServicer_to_server(PushServicer(ingest), server),
    )
    service.serves(
        "branchline.gateway.v1.OrganizationService",
        lambda server: organizations_pb2_grpc.add_OrganizationServiceServicer_to_server(
            PublicOrganizationServicer(*public), server
        ),
    )
    service.serves(
        "branchline.gateway.v1.RepositoryService",
        lambda server: repositories_pb2_grpc.add_RepositoryServiceServicer_to_server(
            PublicRepositoryServicer(*public), server
        ),
    )
    service.serves(
        "branchline.gateway.v1.TaskService",
        lambda server: tasks_pb2_grpc.add_TaskServiceServicer_to_server(PublicTaskServicer(*public), server),
    )
    service.serves(
        "branchline.gateway.v1.HistoryService",
        lambda server: history_pb2_grpc.add_HistoryServiceServicer_to_server(PublicHistoryServicer(*public), server),
    )
    service.serves(
        "branchline.gateway.v1.UserService",
        lambda server: users_pb2_grpc.add_UserServiceServicer_to_server(PublicUserReader(*public), server),
    )
    service.loops += [ingest.run, index.run_compaction, store.run_history_retention]
    service.loops += [*(courier.run for courier in children.couriers(parts.outbox))]
    return service
