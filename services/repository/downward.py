"""What the repository carries down to its tasks: to be created, to be deleted, and their branches' pull requests.

All of it travels under the task's id, so that it arrives in its order.
"""

from collections.abc import Callable
from dataclasses import dataclass

import grpc
from branchline.task.v1.task_pb2 import CreateTaskRequest, DeleteTaskRequest, SetPullRequestRequest
from branchline.task.v1.task_pb2_grpc import TaskServiceStub

from services.runtime.database import Database, Tx
from services.runtime.spine.outbox import OutboxRow

TO_TASK = "task"


@dataclass(frozen=True, slots=True)
class Downward:
    """The repository's direct children."""

    task: TaskServiceStub
    database: Database
    lost: Callable[[Tx, str], None]
    """Takes note of a task that its owner does not know."""

    async def deliver(self, row: OutboxRow) -> None:
        """Deliver one row."""
        if row.holds(CreateTaskRequest):
            await self.task.CreateTask(CreateTaskRequest.FromString(row.payload))
        elif row.holds(SetPullRequestRequest):
            await self._set_pull_request(SetPullRequestRequest.FromString(row.payload))
        else:
            await self._delete(DeleteTaskRequest.FromString(row.payload))

    async def _set_pull_request(self, request: SetPullRequestRequest) -> None:
        try:
            await self.task.SetPullRequest(request)
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.NOT_FOUND:  # it was deleted meanwhile
                raise

    async def _delete(self, request: DeleteTaskRequest) -> None:
        try:
            await self.task.DeleteTask(request)
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.NOT_FOUND:
                raise
            # It was never born, so nobody will say that it is gone.
            await self.database.write(self.lost, request.task_id)
