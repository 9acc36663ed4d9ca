"""What the repository carries down: tasks to create, and the pull requests of their branches."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from branchline.task.v1.task_pb2 import CreateTaskRequest, SetPullRequestRequest
from branchline.task.v1.task_pb2_grpc import TaskServiceStub
from google.protobuf.message import Message

from services.runtime.spine.courier import Courier
from services.runtime.spine.outbox import Outbox, OutboxRow

TO_TASK = "task"

M = TypeVar("M", bound=Message)


@dataclass(frozen=True, slots=True)
class Children:
    """The repository's direct children."""

    task: TaskServiceStub

    def courier(self, outbox: Outbox) -> Courier:
        """Return the courier to the tasks."""
        return Courier(outbox, TO_TASK, self._deliver)

    async def _deliver(self, rows: Sequence[OutboxRow]) -> None:
        born = [_read(row, CreateTaskRequest) for row in rows if row.state.Is(CreateTaskRequest.DESCRIPTOR)]
        told = [_read(row, SetPullRequestRequest) for row in rows if row.state.Is(SetPullRequestRequest.DESCRIPTOR)]
        await asyncio.gather(*(self.task.CreateTask(request) for request in born))
        await asyncio.gather(*(self.task.SetPullRequest(request) for request in told))


def _read(row: OutboxRow, request: type[M]) -> M:
    return request.FromString(row.state.value)
