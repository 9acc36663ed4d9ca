"""Builds the repository service."""

from pathlib import Path

from branchline.v1 import processes_pb2, repositories_pb2, sessions_pb2, tasks_pb2
from branchline_internal.organization.v1.organization_pb2_grpc import OrganizationServiceStub
from branchline_internal.repository.v1 import repository_pb2
from branchline_internal.task.v1.task_pb2_grpc import TaskServiceStub

from services.repository.creation import Creation
from services.repository.deletion import Deletion
from services.repository.downward import TO_TASK, Downward
from services.repository.ingest import RepositoryIngest
from services.repository.public import (
    PublicProcessReader,
    PublicRepositoryReader,
    PublicSessionReader,
    PublicTaskServicer,
    Reads,
)
from services.repository.servicer import RepositoryServicer
from services.repository.store import RepositoryStore
from services.repository.tables import WATCHED
from services.repository.workbench import Workbench
from services.runtime.config import ServiceConfig
from services.runtime.service import Chassis, Service
from services.runtime.spine.index import Index

_SWEEP_PAUSE_SECONDS = 0.5


class RepositoryConfig(ServiceConfig, frozen=True):
    """Configuration of the repository service."""

    sandbox_provider: str = "local"
    """Sandbox provider where neither a task nor its organization names one."""


def build(config: RepositoryConfig) -> Service:
    """Build the service."""
    chassis = Chassis("repository", config, Path(__file__).parent, callers=("gateway", "organization", "task"))
    database, outbox, clock = chassis.database, chassis.outbox, chassis.clock
    index = Index(database, WATCHED, clock)
    store, workbench = RepositoryStore(outbox, clock), Workbench(index)
    deletion = Deletion(database, outbox, clock, store, workbench)
    ingest = RepositoryIngest(outbox, clock, store, workbench, deletion)
    creation = Creation(outbox, clock, store, workbench, config.sandbox_provider)
    reads = Reads(database, index, store, workbench)
    organization = chassis.stub(OrganizationServiceStub, "organization")
    servicer = RepositoryServicer(database, index, store, workbench, deletion, organization)
    chassis.serve(servicer, repository_pb2.DESCRIPTOR, "RepositoryService")
    public_tasks = PublicTaskServicer(reads, chassis.commands, outbox, creation, organization)
    chassis.serve(public_tasks, tasks_pb2.DESCRIPTOR, "TaskService")
    chassis.serve(PublicSessionReader(reads), sessions_pb2.DESCRIPTOR, "SessionService")
    chassis.serve(PublicProcessReader(reads), processes_pb2.DESCRIPTOR, "ProcessService")
    chassis.serve(PublicRepositoryReader(reads), repositories_pb2.DESCRIPTOR, "RepositoryService")
    chassis.take_commands()
    chassis.coordinate(index, ingest.ingest(database))
    chassis.push_to("organization")
    downward = Downward(chassis.stub(TaskServiceStub, "task"), database, ingest.lost)
    chassis.courier(TO_TASK, downward.deliver)
    chassis.service.every(_SWEEP_PAUSE_SECONDS, "deletions", deletion.sweep)
    return chassis.service
