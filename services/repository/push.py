"""What the repository carries down: tasks to create."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from branchline.task.v1.task_pb2 import CreateTaskRequest
from branchline.task.v1.task_pb2_grpc import TaskServiceStub

from services.runtime.spine.courier import Courier
from services.runtime.spine.outbox import Outbox, OutboxRow

TO_TASK = "task"


@dataclass(frozen=True, slots=True)
class Children:
    """The repository's direct children."""

    task: TaskServiceStub

    def courier(self, outbox: Outbox) -> Courier:
        """Return the courier that has tasks created."""
        return Courier(outbox, TO_TASK, self._create_tasks)

    async def _create_tasks(self, rows: Sequence[OutboxRow]) -> None:
        await asyncio.gather(*(self.task.CreateTask(CreateTaskRequest.FromString(row.state.value)) for row in rows))
