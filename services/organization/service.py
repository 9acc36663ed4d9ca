"""Builds the organization service."""

from functools import partial
from pathlib import Path

from branchline.v1 import (
    agents_pb2,
    blobs_pb2,
    history_pb2,
    organizations_pb2,
    repositories_pb2,
    secrets_pb2,
    sessions_pb2,
    tasks_pb2,
    users_pb2,
)
from branchline_internal.github_data.v1.github_data_pb2_grpc import GithubDataServiceStub
from branchline_internal.history.v1.history_pb2_grpc import HistoryServiceStub
from branchline_internal.organization.v1 import organization_pb2
from branchline_internal.repository.v1.repository_pb2_grpc import RepositoryServiceStub
from branchline_internal.user.v1.user_pb2_grpc import UserServiceStub

from services.organization.blob_bytes import BlobsConfig, open_bytes
from services.organization.downward import Children
from services.organization.ingest import OrganizationIngest
from services.organization.public_blobs import PublicBlobServicer
from services.organization.public_organizations import PublicOrganizationServicer
from services.organization.public_reads import (
    PublicAgentReader,
    PublicHistoryReader,
    PublicSecretReader,
    PublicSessionReader,
    PublicTaskReader,
    PublicUserReader,
)
from services.organization.public_repositories import PublicRepositoryServicer
from services.organization.servicer import OrganizationServicer
from services.organization.stores import open_stores
from services.organization.uploads import Uploads
from services.runtime.config import ServiceConfig
from services.runtime.service import Chassis, Service

_RETENTION_SECONDS = 3600.0
_TEARDOWN_SECONDS = 15.0
_COLLECT_SECONDS = 600.0
_STRAYS_SECONDS = 24 * 3600.0


class OrganizationConfig(ServiceConfig, frozen=True):
    """Configuration of the organization service."""

    blobs: BlobsConfig = BlobsConfig()


def build(config: OrganizationConfig) -> Service:
    """Build the service."""
    chassis = Chassis(
        "organization",
        config,
        Path(__file__).parent,
        callers=("gateway", "user", "github_data", "history", "repository"),
    )
    database, commands, outbox = chassis.database, chassis.commands, chassis.outbox
    stores = open_stores(database, outbox, chassis.clock, config.blobs.quota_bytes)
    user = chassis.stub(UserServiceStub, "user")
    children = Children(
        chassis.stub(RepositoryServiceStub, "repository"),
        user,
        chassis.stub(HistoryServiceStub, "history"),
        chassis.stub(GithubDataServiceStub, "github_data"),
        database,
        stores,
    )
    kept = open_bytes(config.blobs, config.data_dir)
    uploads = Uploads(database, chassis.clock, stores.blobs, stores.claims, kept)
    chassis.service.after_stop.append(uploads.settle)
    internal = OrganizationServicer(database, chassis.clock, stores, user, uploads)
    organizations = PublicOrganizationServicer(database, stores, commands, user)
    repositories = PublicRepositoryServicer(database, stores, commands, outbox)
    chassis.serve(internal, organization_pb2.DESCRIPTOR, "OrganizationService")
    chassis.serve(organizations, organizations_pb2.DESCRIPTOR, "OrganizationService")
    chassis.serve(repositories, repositories_pb2.DESCRIPTOR, "RepositoryService")
    chassis.serve(PublicBlobServicer(database, stores, commands, uploads), blobs_pb2.DESCRIPTOR, "BlobService")
    chassis.serve(PublicTaskReader(database, stores), tasks_pb2.DESCRIPTOR, "TaskService")
    chassis.serve(PublicHistoryReader(database, stores), history_pb2.DESCRIPTOR, "HistoryService")
    chassis.serve(PublicUserReader(database, stores), users_pb2.DESCRIPTOR, "UserService")
    chassis.serve(PublicSessionReader(database, stores), sessions_pb2.DESCRIPTOR, "SessionService")
    chassis.serve(PublicAgentReader(database, stores), agents_pb2.DESCRIPTOR, "AgentService")
    chassis.serve(PublicSecretReader(database, stores), secrets_pb2.DESCRIPTOR, "SecretService")
    chassis.coordinate(stores.index, OrganizationIngest(outbox, stores).ingest(database))
    chassis.take_commands()
    children.carry(chassis)
    chassis.service.every(_RETENTION_SECONDS, "expire the feed", partial(stores.feed.expire, database))
    chassis.service.every(_RETENTION_SECONDS, "expire invitations", partial(database.write, stores.invitations.expire))
    chassis.service.every(_RETENTION_SECONDS, "prune secrets", partial(database.write, stores.people.prune))
    chassis.service.every(_RETENTION_SECONDS, "prune drafts", partial(database.write, stores.drafts.prune))
    chassis.service.every(_COLLECT_SECONDS, "collect blobs", uploads.collect)
    chassis.service.every(_STRAYS_SECONDS, "collect strays", uploads.collect_strays)
    chassis.service.every(_TEARDOWN_SECONDS, "tear down", partial(stores.teardown.sweep, database))
    return chassis.service
