"""How what sandboxes push becomes rows of the task."""

from dataclasses import dataclass

from branchline.resource.v1 import sandbox_pb2, task_pb2
from branchline.resource.v1.sandbox_pb2 import Sandbox
from branchline.resource.v1.session_pb2 import TranscriptEntry
from branchline.sandbox.v1.sandbox_pb2 import AgentSession

from services.runtime.database import Transaction
from services.runtime.errors import NotFound
from services.runtime.service import Chassis
from services.runtime.spine.ingest import Handler, Ingest, Pushed, RejectedEntryError, each, handlers
from services.task.status import ENDING
from services.task.store import TaskRecord, TaskStore
from services.task.turns import Turns


@dataclass(frozen=True, slots=True)
class TaskIngest:
    """Handlers for everything that sandboxes push."""

    chassis: Chassis
    store: TaskStore
    turns: Turns

    def ingest(self) -> Ingest:
        """Return the ingest with all handlers."""
        taken = handlers(
            Handler(Sandbox, each(self.sandbox)),
            Handler(AgentSession, each(self.agent_session)),
            Handler(TranscriptEntry, each(self.transcript_entry)),
        )
        return Ingest(self.chassis.database, taken)

    async def sandbox(self, tx: Transaction, pushed: Pushed[Sandbox]) -> None:
        """Index a sandbox. If the active one fails after provisioning, the task fails."""
        sandbox = pushed.state
        record = await self._task(tx, sandbox.task_id)
        if not await self.store.put_sandbox(tx, sandbox):
            return
        failed = sandbox.status == sandbox_pb2.SANDBOX_STATUS_ERROR
        active = record.task.active_sandbox_id == sandbox.id
        if failed and active and record.provisioned and record.task.status not in ENDING:
            reason = f"the sandbox failed: {sandbox.status_reason}"
            await self.store.change_status(tx, record, task_pb2.TASK_STATUS_ERROR, reason)
            await self.store.save(tx, record)

    async def agent_session(self, tx: Transaction, pushed: Pushed[AgentSession]) -> None:
        """Follow where a session's agent stands."""
        task_id = await self.store.newer_agent_state(tx, pushed.state.session_id, pushed.state.revision)
        if task_id is None:
            return
        record = await self._task(tx, task_id)
        session = await self.store.session(tx, task_id, pushed.state.session_id)
        await self.turns.apply(tx, record, session, pushed.state)

    async def transcript_entry(self, tx: Transaction, pushed: Pushed[TranscriptEntry]) -> None:
        """Give a new entry its number, or store a newer state of one."""
        await self._task(tx, pushed.state.task_id)
        await self.store.put_entry(tx, pushed.state)

    async def _task(self, tx: Transaction, task_id: str) -> TaskRecord:
        try:
            return await self.store.get(tx, task_id)
        except NotFound as error:
            raise RejectedEntryError(error.message) from error
