"""How what tasks push becomes rows, and what of it goes on to the organization."""

from collections.abc import Sequence
from dataclasses import dataclass

from branchline.resource.v1.history_pb2 import HistoryEvent
from branchline.resource.v1.sandbox_pb2 import Sandbox
from branchline.resource.v1.session_pb2 import Session, TranscriptEntry
from branchline.resource.v1.task_pb2 import Task

from services.repository.store import RepositoryStore
from services.runtime.database import Transaction
from services.runtime.service import Chassis
from services.runtime.spine.ingest import Handler, Ingest, Pushed, RejectedEntryError, each, handlers
from services.runtime.spine.outbox import Mark


@dataclass(frozen=True, slots=True)
class RepositoryIngest:
    """Handlers for everything that tasks push."""

    chassis: Chassis
    store: RepositoryStore

    def ingest(self) -> Ingest:
        """Return the ingest with all handlers."""
        taken = handlers(
            Handler(Task, self.tasks),
            Handler(Session, each(self.session)),
            Handler(Sandbox, each(self.sandbox)),
            Handler(TranscriptEntry, each(self.transcript_entry)),
            Handler(HistoryEvent, each(self.history_event)),
        )
        return Ingest(self.chassis.database, taken)

    async def tasks(self, tx: Transaction, pushed: Sequence[Pushed[Task]]) -> None:
        """Index tasks and push their summaries on."""
        held = await self.store.held_tasks(tx, [one.state.id for one in pushed])
        for one in pushed:
            if one.state.id not in held:
                raise RejectedEntryError(f"task {one.state.id} was not created by this coordinator")
        fresh = await self.store.put_tasks(tx, [one.state for one in pushed])
        await self.chassis.outbox.mark(tx, [Mark(task.id, task.revision, task) for task in fresh])
        moved = {task.repository_id for task in fresh if held[task.id].status != task.status}
        for repository_id in sorted(moved):
            await self.store.touch(tx, repository_id)

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
