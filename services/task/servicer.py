"""The gRPC surface that the repository coordinator uses of the task."""

from dataclasses import dataclass

from branchline_internal.task.v1 import task_pb2, task_pb2_grpc

from services.runtime.database import Database, Tx
from services.runtime.serving import Context
from services.task.lifecycle import PROVISION, Lifecycle
from services.task.store import TaskStore


@dataclass(frozen=True, slots=True)
class TaskServicer(task_pb2_grpc.TaskServiceServicer):
    """Creation and deletion of tasks, and what their coordinator tells them."""

    database: Database
    store: TaskStore
    lifecycle: Lifecycle

    async def CreateTask(self, request: task_pb2.CreateTaskRequest, context: Context) -> task_pb2.CreateTaskResponse:
        """Store the task and have it provisioned, once."""
        await self.database.write(self.store.create, request, PROVISION)
        return task_pb2.CreateTaskResponse()

    async def SetPullRequest(
        self, request: task_pb2.SetPullRequestRequest, context: Context
    ) -> task_pb2.SetPullRequestResponse:
        """Keep the branch's pull request."""
        await self.database.write(self._set_pull_request, request)
        return task_pb2.SetPullRequestResponse()

    def _set_pull_request(self, tx: Tx, request: task_pb2.SetPullRequestRequest) -> None:
        with self.store.open(tx, request.task_id) as opened:
            task = opened.task
            known = task.pull_request if task.HasField("pull_request") else None
            told = request.pull_request if request.HasField("pull_request") else None
            if known == told:
                return
            task.ClearField("pull_request")
            if told is not None:
                task.pull_request.CopyFrom(told)
            opened.change()

    async def DeleteTask(self, request: task_pb2.DeleteTaskRequest, context: Context) -> task_pb2.DeleteTaskResponse:
        """Have nothing left of the task, sandbox and rows. Raise NotFound when it is gone."""
        await self.database.write(self._delete, request.task_id)
        return task_pb2.DeleteTaskResponse()

    def _delete(self, tx: Tx, task_id: str) -> None:
        with self.store.open(tx, task_id) as task:
            self.lifecycle.delete(tx, task)
