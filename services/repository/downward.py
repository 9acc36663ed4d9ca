"""What the repository carries down to its tasks: to be created, to be deleted, and their branches' pull requests.

All of it travels under the task's id, so that it arrives in its order.
"""

from collections.abc import Callable
from dataclasses import dataclass

import grpc
from branchline_internal.task.v1.task_pb2 import CreateTaskRequest, DeleteTaskRequest, SetPullRequestRequest
from branchline_internal.task.v1.task_pb2_grpc import TaskServiceStub

from services.runtime.database import Database, Tx
from services.runtime.spine.outbox import OutboxRow

TO_TASK = "task"


@dataclass(frozen=True, slots=True)
class Downward:
    """The repository's direct children."""

    task: TaskServiceStub
    database: Database
    lost: Callable[[Tx, str], None]
    """Notes that a task is gone, or never was."""

    async def deliver(self, row: OutboxRow) -> None:
        """Deliver one row."""
        if row.holds(CreateTaskRequest):
            await self.task.CreateTask(CreateTaskRequest.FromString(row.payload))
            return
        try:
            if row.holds(DeleteTaskRequest):
                await self.task.DeleteTask(DeleteTaskRequest.FromString(row.payload))
            else:
                await self.task.SetPullRequest(SetPullRequestRequest.FromString(row.payload))
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.NOT_FOUND:
                raise
            if row.holds(DeleteTaskRequest):
                await self.database.write(self.lost, row.entity_id)
