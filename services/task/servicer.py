"""The gRPC surface that the repository coordinator uses of the task, and what its sandboxes ask upward."""

from dataclasses import dataclass

from branchline.v1.common_pb2 import ENTITY_KIND_TASK
from branchline_internal.repository.v1 import repository_pb2
from branchline_internal.repository.v1.repository_pb2_grpc import RepositoryServiceStub
from branchline_internal.task.v1 import task_pb2, task_pb2_grpc

from services.runtime.database import Database, Tx
from services.runtime.errors import NotFound
from services.runtime.principal import current_principal
from services.runtime.serving import Context
from services.task.lifecycle import PROVISION, Lifecycle
from services.task.store import TaskStore


@dataclass(frozen=True, slots=True)
class TaskServicer(task_pb2_grpc.TaskServiceServicer):
    """Creation and deletion of tasks, what their coordinator tells them, and the blobs of their sandboxes."""

    database: Database
    store: TaskStore
    lifecycle: Lifecycle
    repository: RepositoryServiceStub

    async def CreateTask(self, request: task_pb2.CreateTaskRequest, context: Context) -> task_pb2.CreateTaskResponse:
        """Store the task and have it provisioned, once."""
        await self.database.write(self.store.create, request, PROVISION)
        return task_pb2.CreateTaskResponse()

    async def FetchBlob(self, request: task_pb2.FetchBlobRequest, context: Context) -> task_pb2.FetchBlobResponse:
        """Ask upward: read part of a blob that the task has named."""
        await self._check(request.task_id)
        fetch = repository_pb2.FetchBlobRequest(task_id=request.task_id, blob_id=request.blob_id, offset=request.offset)
        answer = await self.repository.FetchBlob(fetch, timeout=context.time_remaining())
        return task_pb2.FetchBlobResponse(data=answer.data)

    async def StoreBlob(self, request: task_pb2.StoreBlobRequest, context: Context) -> task_pb2.StoreBlobResponse:
        """Ask upward: store the next part of what an agent has shown."""
        await self._check(request.task_id)
        store = repository_pb2.StoreBlobRequest(
            task_id=request.task_id,
            display_name=request.display_name,
            media_type=request.media_type,
            size_bytes=request.size_bytes,
            sha256=request.sha256,
            upload_id=request.upload_id,
            offset=request.offset,
            data=request.data,
        )
        answer = await self.repository.StoreBlob(store, timeout=context.time_remaining())
        return task_pb2.StoreBlobResponse(
            blob=answer.blob, upload_id=answer.upload_id, received_bytes=answer.received_bytes
        )

    async def _check(self, task_id: str) -> None:
        """Raise NotFound unless the task is one of the caller's organization."""
        task = await self.database.read(self.store.read, task_id)
        if not current_principal().sees(task.task.organization_id):
            raise NotFound(ENTITY_KIND_TASK, task_id)

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
