"""What the repository carries down to its tasks: to be created, to be deleted, and their branches' pull requests.

All of it travels under the task's id, so that it arrives in its order.
"""

from dataclasses import dataclass

import grpc
from branchline.task.v1.task_pb2 import CreateTaskRequest, DeleteTaskRequest, SetPullRequestRequest
from branchline.task.v1.task_pb2_grpc import TaskServiceStub

from services.runtime.spine.outbox import OutboxRow

TO_TASK = "task"


@dataclass(frozen=True, slots=True)
class Downward:
    """The repository's direct children."""

    task: TaskServiceStub

    async def deliver(self, row: OutboxRow) -> None:
        """Deliver one row."""
        if row.holds(CreateTaskRequest):
            await self.task.CreateTask(CreateTaskRequest.FromString(row.payload))
        elif row.holds(DeleteTaskRequest):
            await self.task.DeleteTask(DeleteTaskRequest.FromString(row.payload))
        else:
            await self._set_pull_request(SetPullRequestRequest.FromString(row.payload))

    async def _set_pull_request(self, request: SetPullRequestRequest) -> None:
        try:
            await self.task.SetPullRequest(request)
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.NOT_FOUND:  # it was deleted meanwhile
                raise
