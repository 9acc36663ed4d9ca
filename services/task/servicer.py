"""The gRPC surface that the repository coordinator uses of the task."""

from dataclasses import dataclass
from typing import Any

import grpc
from branchline.task.v1 import task_pb2, task_pb2_grpc

from services.runtime.service import Chassis
from services.runtime.spine.outbox import Mark
from services.task.push import TO_WORKFLOW
from services.task.store import TaskStore
from services.task.workflows import PROVISION


@dataclass(frozen=True, slots=True)
class TaskServicer(task_pb2_grpc.TaskServiceServicer):
    """Creation of tasks."""

    chassis: Chassis
    store: TaskStore

    async def CreateTask(
        self, request: task_pb2.CreateTaskRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> task_pb2.CreateTaskResponse:
        """Store the task and have it provisioned, once."""
        async with self.chassis.database.transaction() as tx:
            if await self.store.create(tx, request):
                start = task_pb2.StartWorkflow(workflow=PROVISION, task_id=request.task.id, attempt=1)
                await self.chassis.outbox.mark(tx, [Mark(request.task.id, 1, start, TO_WORKFLOW)])
        return task_pb2.CreateTaskResponse()
