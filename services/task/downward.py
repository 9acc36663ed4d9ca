"""What the task carries down to its sandboxes, and to its own workflows: one row at a time, a lane per entity.

Whatever concerns a session travels in its lane, so a message that comes while its agent is started waits for that.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
from branchline.v1.common_pb2 import FAILURE_REASON_AGENT_NOT_STARTED, FAILURE_REASON_INTERNAL, Failure
from branchline.v1.errors_pb2 import ERROR_REASON_SESSION_WORKING
from branchline.v1.sessions_pb2 import SESSION_STATE_PENDING
from branchline_internal.sandbox.v1 import sandbox_pb2
from branchline_internal.sandbox.v1.sandbox_pb2_grpc import SandboxServiceStub
from branchline_internal.task.v1.task_pb2 import StartWorkflow

from services.runtime import faults
from services.runtime.database import Database, Reader, Tx
from services.runtime.errors import error_reason, is_permanent
from services.runtime.principal import Principal, bind_principal
from services.runtime.spine.courier import DEADLINE_SECONDS
from services.runtime.spine.outbox import OutboxRow
from services.task.failures import failure_of, is_late
from services.task.machine import Deadlines, opening, suppress_not_found
from services.task.standing import SESSION_WORKING
from services.task.store import TaskStore
from services.task.turns import Turns, is_ready
from services.task.workflows import TaskWorkflows


@dataclass(frozen=True, slots=True)
class Downward:
    """Carries turns and what else concerns agents to the sandbox service, and starts workflows."""

    database: Database
    store: TaskStore
    turns: Turns
    sandbox: SandboxServiceStub
    workflows: TaskWorkflows
    deadlines: Deadlines

    @property
    def deadline_seconds(self) -> float:
        """How long a delivery to the sandbox may take: one that starts an agent takes longest."""
        return self.deadlines.session_seconds + 2 * DEADLINE_SECONDS

    async def to_sandbox(self, row: OutboxRow) -> None:
        """Carry one request to the sandbox service. What concerns something that is gone there is done."""
        bind_principal(Principal(service="task"))
        if row.holds(sandbox_pb2.OpenSessionRequest):
            await self._open_session(row.entity_id)
        elif row.holds(sandbox_pb2.StartTurnRequest):
            await self._start_turn(sandbox_pb2.StartTurnRequest.FromString(row.payload))
        else:
            calls: dict[type[Any], Callable[[Any], Any]] = {
                sandbox_pb2.CancelTurnRequest: self.sandbox.CancelTurn,
                sandbox_pb2.AnswerInputRequest: self.sandbox.AnswerInput,
                sandbox_pb2.CloseSessionRequest: self.sandbox.CloseSession,
                sandbox_pb2.DestroySandboxRequest: self.sandbox.DestroySandbox,
                sandbox_pb2.ForgetTaskRequest: self.sandbox.ForgetTask,
            }
            message = next(message for message in calls if row.holds(message))
            with suppress_not_found():
                async with asyncio.timeout(DEADLINE_SECONDS):
                    await calls[message](message.FromString(row.payload))

    async def _open_session(self, session_id: str) -> None:
        """Have the agent of a new session started, unless nobody waits for it. One that does not start is FAILED."""
        request = await self.database.read(self._opening, session_id)
        if request is None:
            return
        faults.reached("session opening")
        failure = await self._open(request)
        faults.reached("session opened")
        if failure is None:
            await self.database.write(self._opened, session_id)
            faults.reached("session noted")
        else:
            await self.database.write(self.not_opened, session_id, failure)

    async def _open(self, request: sandbox_pb2.OpenSessionRequest) -> Failure | None:
        """Have an agent started; return why it will not be, or None. Raise what may pass."""
        try:
            await self.sandbox.OpenSession(request, timeout=self.deadlines.session_seconds)
        except grpc.aio.AioRpcError as error:
            if error_reason(error) == ERROR_REASON_SESSION_WORKING:  # it was opened before, and has a turn
                return None
            if not is_permanent(error) and not is_late(error):
                raise
            return failure_of(error, FAILURE_REASON_AGENT_NOT_STARTED, "the agent could not be started")
        return None

    def _opening(self, tx: Reader, session_id: str) -> sandbox_pb2.OpenSessionRequest | None:
        """Return the request that opens a session; None where that is not for a delivery to do."""
        task = self.store.find(tx, self.store.task_of_session(tx, session_id))
        if task is None or not is_ready(task):
            return None
        session = task.session(session_id)
        waits = session.state == SESSION_STATE_PENDING or session.state in SESSION_WORKING
        return opening(task.task.active_sandbox_id, session) if waits else None

    def _opened(self, tx: Tx, session_id: str) -> None:
        task_id = self.store.task_of_session(tx, session_id)
        if task_id:
            with self.store.open(tx, task_id) as task:
                self.turns.opened(task, task.session(session_id))

    def not_opened(self, tx: Tx, session_id: str, failure: Failure) -> None:
        """End the start of an agent in failure, unless the session stands elsewhere by now."""
        task_id = self.store.task_of_session(tx, session_id)
        if task_id:
            with self.store.open(tx, task_id) as task:
                self.turns.not_opened(task, task.session(session_id), failure)

    async def _start_turn(self, request: sandbox_pb2.StartTurnRequest) -> None:
        """Give a turn to the sandbox, unless it ended meanwhile. One that it will never take ends in failure."""
        if not await self.database.read(self._is_wanted, request):
            return
        try:
            failure = await self._give(request)
        except Exception as error:
            if not is_permanent(error):
                raise
            failure = failure_of(error, FAILURE_REASON_INTERNAL)
        if failure is not None:
            await self.database.write(self.end_turn, request.session_id, request.turn, failure)

    async def _give(self, request: sandbox_pb2.StartTurnRequest) -> Failure | None:
        """Give a turn to the sandbox. A session that it does not know is opened first; return why it cannot be.

        Such a one was closed before it was opened, or could not be.
        """
        try:
            await self.sandbox.StartTurn(request, timeout=DEADLINE_SECONDS)
        except grpc.aio.AioRpcError as error:
            opening_first = await self.database.read(self._opening, request.session_id)
            if error.code() != grpc.StatusCode.NOT_FOUND or opening_first is None:
                raise
            failure = await self._open(opening_first)
            if failure is None:
                await self.sandbox.StartTurn(request, timeout=DEADLINE_SECONDS)
            return failure
        return None

    def _is_wanted(self, tx: Reader, request: sandbox_pb2.StartTurnRequest) -> bool:
        session = self.store.session(tx, request.session_id)
        return session is not None and session.turn == request.turn and session.state in SESSION_WORKING

    def end_turn(self, tx: Tx, session_id: str, turn: int, failure: Failure) -> None:
        """End a turn in failure that the sandbox service does not take, or has not said to have taken."""
        task_id = self.store.task_of_session(tx, session_id)
        if task_id:
            with self.store.open(tx, task_id) as task:
                self.turns.give_up(task, task.session(session_id), turn, failure)

    async def to_workflow(self, row: OutboxRow) -> None:
        """Start a workflow; one that was started before is left alone."""
        bind_principal(Principal(service="task"))
        await self.workflows.start(StartWorkflow.FromString(row.payload))
