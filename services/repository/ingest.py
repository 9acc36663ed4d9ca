"""How what tasks push becomes rows, and what of it goes on to the organization."""

from dataclasses import dataclass

from branchline.resource.v1.history_pb2 import HistoryEvent
from branchline.resource.v1.sandbox_pb2 import Sandbox
from branchline.resource.v1.session_pb2 import Session, TranscriptEntry
from branchline.resource.v1.task_pb2 import TASK_STATUS_ARCHIVED, TASK_STATUS_KILLED, Task

from services.repository.store import RepositoryStore
from services.runtime.database import Transaction
from services.runtime.service import Chassis
from services.runtime.spine.ingest import Handler, Ingest, Pushed, RejectedEntryError, handlers
from services.runtime.spine.outbox import Mark

ENDED = frozenset({TASK_STATUS_ARCHIVED, TASK_STATUS_KILLED})
"""Statuses in which a task no longer holds its branch."""


@dataclass(frozen=True, slots=True)
class RepositoryIngest:
    """Handlers for everything that tasks push."""

    chassis: Chassis
    store: RepositoryStore

    def ingest(self) -> Ingest:
        """Return the ingest with all handlers."""
        taken = handlers(
            Handler(Task, self.task),
            Handler(Session, self.session),
            Handler(Sandbox, self.sandbox),
            Handler(TranscriptEntry, self.transcript_entry),
            Handler(HistoryEvent, self.history_event),
        )
        return Ingest(self.chassis.database, taken)

    async def task(self, tx: Transaction, pushed: Pushed[Task]) -> None:
        """Index a task and push its summary on."""
        task = pushed.state
        held = await self.store.held_task(tx, task.id)
        if held is None:
            raise RejectedEntryError(f"task {task.id} was not created by this coordinator")
        if not await self.store.put_task(tx, task, live=task.status not in ENDED):
            return
        await self.chassis.outbox.mark(tx, [Mark(task.id, task.revision, task)])
        if held.status != task.status:
            await self.store.touch(tx, task.repository_id)

    async def session(self, tx: Transaction, pushed: Pushed[Session]) -> None:
        """Index a session."""
        await self.store.put_session(tx, pushed.state)

    async def sandbox(self, tx: Transaction, pushed: Pushed[Sandbox]) -> None:
        """Index a sandbox."""
        await self.store.put_sandbox(tx, pushed.state)

    async def transcript_entry(self, tx: Transaction, pushed: Pushed[TranscriptEntry]) -> None:
        """Index a transcript entry."""
        await self.store.put_transcript_entry(tx, pushed.state)

    async def history_event(self, tx: Transaction, pushed: Pushed[HistoryEvent]) -> None:
        """Pass an event on."""
        await self.chassis.outbox.mark(tx, [Mark(pushed.id, 1, pushed.state)])
