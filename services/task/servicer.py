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
    """Creation of tasks, and what their coordinator tells them."""

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

    async def SetPullRequest(
        self, request: task_pb2.SetPullRequestRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> task_pb2.SetPullRequestResponse:
        """Keep the branch's pull request."""
        async with self.chassis.database.transaction() as tx:
            record = await self.store.get(tx, request.task_id)
            known = record.task.pull_request if record.task.HasField("pull_request") else None
            told = request.pull_request if request.HasField("pull_request") else None
            if known != told:
                record.task.ClearField("pull_request")
                if told is not None:
                    record.task.pull_request.CopyFrom(told)
                await self.store.save(tx, record)
        return task_pb2.SetPullRequestResponse()
