"""Builds the organization service."""

from functools import partial
from pathlib import Path

from branchline.v1 import history_pb2, organizations_pb2, repositories_pb2, tasks_pb2, users_pb2
from branchline_internal.github_data.v1.github_data_pb2_grpc import GithubDataServiceStub
from branchline_internal.history.v1.history_pb2_grpc import HistoryServiceStub
from branchline_internal.organization.v1 import organization_pb2
from branchline_internal.repository.v1.repository_pb2_grpc import RepositoryServiceStub
from branchline_internal.user.v1.user_pb2_grpc import UserServiceStub

from services.organization.downward import Children
from services.organization.ingest import OrganizationIngest
from services.organization.public_organizations import PublicOrganizationServicer
from services.organization.public_reads import PublicHistoryReader, PublicTaskReader, PublicUserReader
from services.organization.public_repositories import PublicRepositoryServicer
from services.organization.servicer import OrganizationServicer
from services.organization.stores import open_stores
from services.runtime.config import ServiceConfig
from services.runtime.service import Chassis, Service

_RETENTION_SECONDS = 3600.0
_TEARDOWN_SECONDS = 15.0


class OrganizationConfig(ServiceConfig, frozen=True):
    """Configuration of the organization service."""


def build(config: OrganizationConfig) -> Service:
    """Build the service."""
    chassis = Chassis("organization", config, Path(__file__).parent)
    database, commands, outbox = chassis.database, chassis.commands, chassis.outbox
    stores = open_stores(database, outbox, chassis.clock)
    user = chassis.stub(UserServiceStub, "user")
    children = Children(
        chassis.stub(RepositoryServiceStub, "repository"),
        user,
        chassis.stub(HistoryServiceStub, "history"),
        chassis.stub(GithubDataServiceStub, "github_data"),
        database,
        stores,
    )
    internal = OrganizationServicer(database, chassis.clock, stores, user)
    organizations = PublicOrganizationServicer(database, stores, commands, user)
    repositories = PublicRepositoryServicer(database, stores, commands, outbox)
    chassis.serve(internal, organization_pb2.DESCRIPTOR, "OrganizationService")
    chassis.serve(organizations, organizations_pb2.DESCRIPTOR, "OrganizationService")
    chassis.serve(repositories, repositories_pb2.DESCRIPTOR, "RepositoryService")
    chassis.serve(PublicTaskReader(database, stores), tasks_pb2.DESCRIPTOR, "TaskService")
    chassis.serve(PublicHistoryReader(database, stores), history_pb2.DESCRIPTOR, "HistoryService")
    chassis.serve(PublicUserReader(database, stores), users_pb2.DESCRIPTOR, "UserService")
    chassis.coordinate(stores.index, OrganizationIngest(outbox, stores).ingest(database))
    chassis.take_commands()
    children.carry(chassis)
    chassis.service.every(_RETENTION_SECONDS, "expire the feed", partial(stores.feed.expire, database))
    chassis.service.every(_TEARDOWN_SECONDS, "tear down", partial(stores.teardown.sweep, database))
    return chassis.service
