"""Builds the task service."""

from pathlib import Path

from branchline.v1 import sessions_pb2, tasks_pb2
from branchline_internal.repository.v1.repository_pb2_grpc import RepositoryServiceStub
from branchline_internal.sandbox.v1.sandbox_pb2_grpc import SandboxServiceStub
from branchline_internal.task.v1 import task_pb2

from services.runtime.config import ServiceConfig
from services.runtime.service import Chassis, Service
from services.runtime.workflows import WorkflowEngine
from services.task.destinations import TO_SANDBOX, TO_WORKFLOW
from services.task.downward import Downward
from services.task.ingest import TaskIngest
from services.task.lifecycle import Lifecycle
from services.task.machine import Deadlines, Machine
from services.task.public import PublicSessionServicer, PublicTaskServicer
from services.task.servicer import TaskServicer
from services.task.sessions import Sessions
from services.task.store import TaskStore
from services.task.sweep import SWEEP_SECONDS, Sweep
from services.task.turns import Turns
from services.task.workflows import TaskWorkflows

_HOUR_SECONDS = 3600.0


class TaskConfig(ServiceConfig, frozen=True):
    """Configuration of the task service."""

    deadlines: Deadlines = Deadlines()


def build(config: TaskConfig) -> Service:
    """Build the service."""
    chassis = Chassis("task", config, Path(__file__).parent, callers=("gateway", "repository", "sandbox"))
    database, clock = chassis.database, chassis.clock
    store = TaskStore(chassis.outbox, clock)
    turns, lifecycle = Turns(store), Lifecycle()
    sandbox = chassis.stub(SandboxServiceStub, "sandbox")
    repository = chassis.stub(RepositoryServiceStub, "repository")
    machine = Machine(sandbox, repository, config.deadlines)
    engine = WorkflowEngine(chassis.database_url)
    workflows = TaskWorkflows(chassis, store, turns, machine)
    downward = Downward(database, store, turns, sandbox, workflows, config.deadlines)
    sweep = Sweep(database, store, chassis.outbox, turns, downward, workflows, engine, config.deadlines)
    sessions = PublicSessionServicer(chassis.commands, Sessions(clock, store, turns), machine)

    chassis.serve(TaskServicer(database, store, lifecycle, repository), task_pb2.DESCRIPTOR, "TaskService")
    chassis.serve(PublicTaskServicer(chassis.commands, store, lifecycle), tasks_pb2.DESCRIPTOR, "TaskService")
    chassis.serve(sessions, sessions_pb2.DESCRIPTOR, "SessionService")
    chassis.take_commands()
    chassis.coordinate(None, TaskIngest(store, turns).ingest(database))
    chassis.push_to("repository")
    chassis.courier(TO_SANDBOX, downward.to_sandbox, downward.deadline_seconds)
    chassis.courier(TO_WORKFLOW, downward.to_workflow)
    service = chassis.service
    service.before_start.append(engine.start)
    service.after_stop.append(engine.stop)
    service.every(SWEEP_SECONDS, "sweep", sweep.run)
    service.every(_HOUR_SECONDS, "forget what ended", sweep.forget_old)
    return service
