"""What the task carries down to its sandboxes, and to its own workflows: one row at a time, a lane per entity."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from branchline_internal.sandbox.v1 import sandbox_pb2
from branchline_internal.sandbox.v1.sandbox_pb2_grpc import SandboxServiceStub
from branchline_internal.task.v1.task_pb2 import StartWorkflow

from services.runtime.database import Database, Reader, Tx
from services.runtime.errors import is_permanent, reason_of
from services.runtime.principal import Principal, bind_principal
from services.runtime.spine.outbox import OutboxRow
from services.task.machine import suppress_not_found
from services.task.status import SESSION_WORKING
from services.task.store import TaskStore
from services.task.turns import Turns
from services.task.workflows import TaskWorkflows


@dataclass(frozen=True, slots=True)
class Downward:
    """Carries turns and what else concerns agents to the sandbox service, and starts workflows."""

    database: Database
    store: TaskStore
    turns: Turns
    sandbox: SandboxServiceStub
    workflows: TaskWorkflows

    async def to_sandbox(self, row: OutboxRow) -> None:
        """Carry one request to the sandbox service. What concerns something that is gone there is done."""
        bind_principal(Principal(service="task"))
        if row.holds(sandbox_pb2.StartTurnRequest):
            await self._start_turn(sandbox_pb2.StartTurnRequest.FromString(row.payload))
            return
        calls: dict[type[Any], Callable[[Any], Any]] = {
            sandbox_pb2.CancelTurnRequest: self.sandbox.CancelTurn,
            sandbox_pb2.AnswerPermissionRequest: self.sandbox.AnswerPermission,
            sandbox_pb2.CloseSessionRequest: self.sandbox.CloseSession,
            sandbox_pb2.DestroySandboxRequest: self.sandbox.DestroySandbox,
            sandbox_pb2.ForgetTaskRequest: self.sandbox.ForgetTask,
        }
        message = next(message for message in calls if row.holds(message))
        with suppress_not_found():
            await calls[message](message.FromString(row.payload))

    async def _start_turn(self, request: sandbox_pb2.StartTurnRequest) -> None:
        """Give a turn to the sandbox, unless it ended meanwhile. One that it will never take ends in error."""
        if not await self.database.read(self._is_wanted, request):
            return
        try:
            await self.sandbox.StartTurn(request)
        except Exception as error:
            if not is_permanent(error):
                raise
            await self.database.write(self.end_turn, request.session_id, request.turn, reason_of(error))

    def _is_wanted(self, tx: Reader, request: sandbox_pb2.StartTurnRequest) -> bool:
        session = self.store.session(tx, request.session_id)
        return session is not None and session.turn == request.turn and session.status in SESSION_WORKING

    def end_turn(self, tx: Tx, session_id: str, turn: int, reason: str) -> None:
        """End a turn in error that the sandbox service does not take, or has not said to have taken."""
        task_id = self.store.task_of_session(tx, session_id)
        if task_id:
            with self.store.open(tx, task_id) as task:
                self.turns.give_up(task, task.session(session_id), turn, reason)

    async def to_workflow(self, row: OutboxRow) -> None:
        """Start a workflow; one that was started before is left alone."""
        bind_principal(Principal(service="task"))
        await self.workflows.start(StartWorkflow.FromString(row.payload))
