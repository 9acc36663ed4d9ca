"""How what tasks push becomes rows, and what of it goes on to the organization.

Nothing that a task of ours pushes is refused: what does not fit is noted, and shown in the feed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from branchline.v1.history_pb2 import EVENT_KIND_BRANCH_MOVED, EVENT_KIND_TASK_DELETED, EventKind, HistoryEvent
from branchline.v1.tasks_pb2 import Task
from branchline_internal.sandbox.v1.sandbox_pb2 import AgentReport

from services.repository.deletion import Deletion
from services.repository.store import RepositoryStore
from services.repository.summary import summary_of
from services.repository.workbench import PARTS, Conflict, Part, Place, Workbench, stays
from services.runtime.actors import system_actor
from services.runtime.clock import Clock
from services.runtime.database import Database, Tx
from services.runtime.logging import get_logger
from services.runtime.spine.ingest import Handler, Ingest, Pushed, RejectedEntryError
from services.runtime.spine.outbox import Mark, Outbox

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class RepositoryIngest:
    """Handlers for everything that tasks push."""

    outbox: Outbox
    clock: Clock
    store: RepositoryStore
    workbench: Workbench
    deletion: Deletion

    def ingest(self, database: Database) -> Ingest:
        """Return the ingest with all handlers."""
        return Ingest(
            database,
            Handler((Task, *PARTS), self.tasks),
            Handler(AgentReport, self.pass_on),
            Handler(HistoryEvent, self.pass_on),
        )

    def tasks(self, tx: Tx, pushed: Sequence[Pushed[Task | Part]]) -> None:
        """Index tasks with their parts, have the branches follow, and push summaries on.

        What comes late, of a task that is gone, is ignored.
        """
        tasks = [cast("Pushed[Task]", one) for one in pushed if isinstance(one.state, Task)]
        parts = [cast("Pushed[Part]", one) for one in pushed if not isinstance(one.state, Task)]
        places = self.workbench.places(tx, [*(one.id for one in tasks), *(one.state.task_id for one in parts)])
        unknown = [one.id for one in tasks if one.id not in places]
        strange = set(unknown) - self.workbench.buried(tx, unknown)
        if strange:
            raise RejectedEntryError(f"not created by this coordinator: task {min(strange)}")
        here = {task_id: place for task_id, place in places.items() if not place.gone}
        known = [one for one in tasks if one.id in here]
        quiet = self.store.quiet({here[one.id].repository_id: here[one.id].active_time for one in known})
        self.store.lock(tx, quiet.union(here[one.id].repository_id for one in known if _moves(one, here[one.id])))
        changed, gone, asked = self.workbench.put(tx, known, [one for one in parts if one.state.task_id in here])
        conflicts = self.workbench.follow(tx, changed, places)
        self.workbench.leave(tx, gone)
        if gone:
            tx.after_commit(self.deletion.wanted.notify)
        events = [self._deleted(task) for task in gone] + [self._conflict(one) for one in conflicts]
        marks = [Mark(task.id, task.revision, summary_of(task)) for task in changed]
        marks += [Mark(task.id, task.revision, summary_of(task), deleted=True) for task in gone]
        marks += [Mark(one.id, one.revision, one, deleted=deleted) for one, deleted in asked]
        self.outbox.mark(tx, [*marks, *(Mark(event.id, 1, event) for event in events)])
        left = [task for task in changed if places[task.id].live and not stays(task, places[task.id])]
        counted = {places[task.id].repository_id for task in (*left, *gone)}
        active = {places[task.id].repository_id for task in changed}
        self.store.touch(tx, counted | (active & quiet))

    def pass_on(self, tx: Tx, pushed: Sequence[Pushed[HistoryEvent]] | Sequence[Pushed[AgentReport]]) -> None:
        """Pass on what the organization alone keeps."""
        self.outbox.mark(tx, [Mark(one.id, one.revision, one.state) for one in pushed])

    def lost(self, tx: Tx, task_id: str) -> None:
        """Take a task for deleted that its owner does not know: it was never born, or is gone already."""
        if self.workbench.places(tx, [task_id]):
            self.tasks(tx, [Pushed(task_id, 0, deleted=True, state=Task())])

    def _deleted(self, task: Task) -> HistoryEvent:
        return self._event(task, EVENT_KIND_TASK_DELETED, task.title)

    def _conflict(self, one: Conflict) -> HistoryEvent:
        """Show that a task works on the branch of another one."""
        log.warning("branch held twice", task=one.task.id, branch=one.task.branch, holder=one.holder_task_id)
        event = self._event(
            one.task, EVENT_KIND_BRANCH_MOVED, f'the branch "{one.task.branch}" belongs to task {one.holder_task_id}'
        )
        event.details.update({"from": one.kept, "to": one.task.branch, "holder_task_id": one.holder_task_id})
        return event

    def _event(self, task: Task, kind: EventKind.ValueType, summary: str) -> HistoryEvent:
        return HistoryEvent(
            id=self.clock.new_id("evt"),
            organization_id=task.organization_id,
            event_time=self.clock.timestamp(),
            actor=system_actor("repository"),
            kind=kind,
            repository_id=task.repository_id,
            task_id=task.id,
            branch=task.branch,
            summary=summary,
        )


def _moves(one: Pushed[Task], place: Place) -> bool:
    """Say whether a state of a task may change who holds which branch."""
    return one.deleted or (place.live and (place.branch != one.state.branch or not stays(one.state, place)))
