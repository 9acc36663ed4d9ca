"""Task: one git branch each. Coordinator of its sessions and sandboxes, child of repository."""

from pathlib import Path

from branchline.gateway.v1 import sessions_pb2_grpc, tasks_pb2_grpc
from branchline.repository.v1 import repository_pb2_grpc
from branchline.sandbox.v1 import sandbox_pb2_grpc
from branchline.spine.v1 import push_pb2_grpc
from branchline.task.v1 import task_pb2_grpc

from services.runtime.config import ServiceConfig
from services.runtime.service import Service, chassis
from services.runtime.spine.ingest import PushServicer
from services.runtime.spine.push import PushClient
from services.runtime.workflows import WorkflowEngine
from services.task.ingest import TaskIngest
from services.task.machine import Machine
from services.task.public import PublicSessionServicer, PublicTaskServicer
from services.task.push import Deliveries
from services.task.servicer import TaskServicer
from services.task.store import TaskStore
from services.task.tables import spine
from services.task.turns import Turns
from services.task.workflows import TaskWorkflows


class TaskConfig(ServiceConfig):
    """Configuration of the task service."""

    repository_address: str
    sandbox_address: str


def build(config: TaskConfig) -> Service:
    """Build the service."""
    parts = chassis("task", config, spine, Path(__file__).parent)
    store = TaskStore(parts)
    turns = Turns(parts, store)
    ingest = TaskIngest(parts, store, turns).ingest()
    repository = parts.channel(config.repository_address)
    machine = Machine(
        sandbox_pb2_grpc.SandboxServiceStub(parts.channel(config.sandbox_address)),
        repository_pb2_grpc.RepositoryServiceStub(repository),
    )
    engine = WorkflowEngine(config.data_dir / "workflows.sqlite")
    deliveries = Deliveries(parts, store, turns, machine, TaskWorkflows(parts, store, turns, machine))
    service = parts.service
    service.serves(
        "branchline.task.v1.TaskService",
        lambda server: task_pb2_grpc.add_TaskServiceServicer_to_server(TaskServicer(parts, store), server),
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
            PublicSessionServicer(parts, store, turns, machine), server
        ),
    )
    push = PushClient(parts.outbox, lambda: push_pb2_grpc.PushServiceStub(repository), "task")
    service.before_start.append(engine.start)
    service.loops += [ingest.run, push.run, *(courier.run for courier in deliveries.couriers())]
    service.after_stop.insert(0, engine.stop)
    return service
