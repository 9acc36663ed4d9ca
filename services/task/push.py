"""What the task carries down to its sandboxes, and to its own workflows."""

from collections.abc import Sequence
from dataclasses import dataclass

import structlog
from branchline.resource.v1 import session_pb2
from branchline.sandbox.v1.sandbox_pb2 import AgentSession, StartTurnRequest
from branchline.task.v1.task_pb2 import RefreshHeadCommit, StartWorkflow
from dbos import DBOS, SetWorkflowID

from services.runtime.errors import is_permanent, reason_of
from services.runtime.principal import Principal, bind_principal
from services.runtime.service import Chassis
from services.runtime.spine.courier import Courier
from services.runtime.spine.outbox import OutboxRow
from services.task.git import HEAD_COMMIT
from services.task.machine import Machine
from services.task.store import TaskStore
from services.task.tables import task_workbench_sessions
from services.task.turns import TO_SANDBOX, Turns
from services.task.workflows import END, TaskWorkflows

log = structlog.get_logger()

TO_WORKFLOW = "workflow"
_HEAD_SECONDS = 30


@dataclass(frozen=True, slots=True)
class Deliveries:
    """Carries turns to sandboxes and starts workflows."""

    chassis: Chassis
    store: TaskStore
    turns: Turns
    machine: Machine
    workflows: TaskWorkflows

    def couriers(self) -> list[Courier]:
        """Return the couriers."""
        outbox = self.chassis.outbox
        return [Courier(outbox, TO_SANDBOX, self._to_sandbox), Courier(outbox, TO_WORKFLOW, self._start_workflows)]

    async def _to_sandbox(self, rows: Sequence[OutboxRow]) -> None:
        for row in rows:
            if row.state.Is(StartTurnRequest.DESCRIPTOR):
                await self._start_turn(StartTurnRequest.FromString(row.state.value))
            else:
                await self._refresh(RefreshHeadCommit.FromString(row.state.value))

    async def _start_turn(self, request: StartTurnRequest) -> None:
        """Give a turn to the sandbox. One that it will never take ends the turn with its reason."""
        try:
            await self.machine.sandbox.StartTurn(request)
        except Exception as error:
            if not is_permanent(error):
                raise
            await self._turn_refused(request, reason_of(error))

    async def _turn_refused(self, request: StartTurnRequest, reason: str) -> None:
        table = task_workbench_sessions
        async with self.chassis.database.transaction() as tx:
            query = table.select().where(table.c.session_id == request.session_id)
            row = (await tx.execute(query)).one()
            record = await self.store.get(tx, row.task_id)
            session = await self.store.session(tx, row.task_id, request.session_id)
            state = AgentSession(
                session_id=request.session_id,
                turn=request.turn,
                status=session_pb2.SESSION_STATUS_ERROR,
                status_reason=reason,
            )
            await self.turns.apply(tx, record, session, state)

    async def _refresh(self, request: RefreshHeadCommit) -> None:
        """Read the tip of the branch. It is a courtesy: if the sandbox cannot say, the old value stays."""
        async with self.chassis.database.read() as connection:
            record = await self.store.get(connection, request.task_id)
        task = record.task
        if not task.active_sandbox_id:
            return
        bind_principal(Principal(service="task", organization_id=task.organization_id))
        try:
            output = await self.machine.run(task.active_sandbox_id, HEAD_COMMIT, "workspace", {}, _HEAD_SECONDS)
        except Exception as error:  # noqa: BLE001
            log.info("head commit not read", task=task.id, reason=reason_of(error))
            return
        async with self.chassis.database.transaction() as tx:
            record = await self.store.get(tx, request.task_id)
            commit = output.strip()
            if record.task.head_commit != commit:
                record.task.head_commit = commit
                await self.store.record_event(
                    tx, record.task, "branch.moved", f"{task.branch} is at {commit[:12]}", by_agent=True
                )
                await self.store.save(tx, record)

    async def _start_workflows(self, rows: Sequence[OutboxRow]) -> None:
        """Start workflows; one that was started before is left alone."""
        for row in rows:
            wanted = StartWorkflow.FromString(row.state.value)
            with SetWorkflowID(f"{wanted.workflow}/{wanted.task_id}/{wanted.attempt}"):
                if wanted.workflow == END:
                    await DBOS.start_workflow_async(self.workflows.end, wanted.task_id)
                else:
                    await DBOS.start_workflow_async(self.workflows.provision, wanted.task_id, wanted.attempt)
