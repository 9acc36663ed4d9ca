"""How what sandboxes push becomes rows of the task. What concerns a task that is gone is ignored."""

from collections.abc import Sequence
from dataclasses import dataclass

from branchline.v1 import sandboxes_pb2
from branchline.v1.sandboxes_pb2 import Sandbox
from branchline.v1.sessions_pb2 import TranscriptEntry
from branchline_internal.sandbox.v1.sandbox_pb2 import AgentSession
from sqlalchemy import bindparam, select, update

from services.runtime.database import Database, Statement, Tx, is_in
from services.runtime.logging import get_logger
from services.runtime.spine.ingest import Handler, Ingest, Pushed, RejectedEntryError
from services.runtime.spine.outbox import Mark
from services.task.store import ENTRIES, SANDBOXES, TaskStore
from services.task.tables import task_sandboxes, task_workbench_sessions, transcript_entries
from services.task.turns import Turns

log = get_logger(__name__)

ENTRY_BYTES = 512 * 1024
"""Most that a transcript entry has."""

_FAILED = frozenset({sandboxes_pb2.SANDBOX_STATUS_ERROR, sandboxes_pb2.SANDBOX_STATUS_DESTROYED})

_sessions = task_workbench_sessions
_HELD_SANDBOXES = Statement(
    select(task_sandboxes.c.id, task_sandboxes.c.revision).where(is_in(task_sandboxes.c.id, "ids"))
)
_SESSIONS = Statement(
    select(_sessions.c.session_id, _sessions.c.task_id, _sessions.c.last_position)
    .where(is_in(_sessions.c.session_id, "ids"))
    .order_by(_sessions.c.session_id)
    .with_for_update()
)
_SAVE_POSITION = Statement(
    update(_sessions).where(_sessions.c.session_id == bindparam("this")).values(last_position=bindparam("last"))
)
_HELD_ENTRIES = Statement(
    select(transcript_entries.c.id, transcript_entries.c.position, transcript_entries.c.revision).where(
        is_in(transcript_entries.c.id, "ids")
    )
)


@dataclass(frozen=True, slots=True)
class TaskIngest:
    """Handlers for everything that sandboxes push."""

    store: TaskStore
    turns: Turns

    def ingest(self, database: Database) -> Ingest:
        """Return the ingest. The entries of a turn are stored before its end is followed."""
        return Ingest(
            database,
            Handler(Sandbox, self.sandboxes),
            Handler(TranscriptEntry, self.transcript_entries),
            Handler(AgentSession, self.agent_sessions),
        )

    def sandboxes(self, tx: Tx, pushed: Sequence[Pushed[Sandbox]]) -> None:
        """Index sandboxes. With the active sandbox of a task its turns fail, and the task."""
        newest = {one.state.id: one.state for one in sorted(pushed, key=lambda one: one.revision)}
        held = {row.id: row.revision for row in tx.rows(_HELD_SANDBOXES, {"ids": list(newest)})}
        newer = [one for one in newest.values() if one.revision > held.get(one.id, 0)]
        if not newer:
            return
        with self.store.open_all(tx, [one.task_id for one in newer]) as tasks:
            known = [one for one in newer if one.task_id in tasks]
            for sandbox in known:
                task = tasks[sandbox.task_id]
                if sandbox.status in _FAILED and sandbox.id == task.task.active_sandbox_id:
                    self.turns.fail_all(task, f"the sandbox failed: {sandbox.status_reason or 'it is gone'}")
        SANDBOXES.put_many(tx, known)
        self.store.outbox.mark(tx, [Mark(one.id, one.revision, one) for one in known])

    def transcript_entries(self, tx: Tx, pushed: Sequence[Pushed[TranscriptEntry]]) -> None:
        """Give new entries their numbers, and store newer states of those that are there."""
        newest: dict[str, TranscriptEntry] = {}
        for one in pushed:
            if one.state.ByteSize() > ENTRY_BYTES:
                raise RejectedEntryError(f"the entry has more than {ENTRY_BYTES} bytes")
            if one.id not in newest or newest[one.id].revision < one.revision:
                newest[one.id] = one.state
        ids = sorted({entry.session_id for entry in newest.values()})
        sessions = {row.session_id: row for row in tx.rows(_SESSIONS, {"ids": ids})}
        held = {row.id: row for row in tx.rows(_HELD_ENTRIES, {"ids": list(newest)})}
        last = {session_id: row.last_position for session_id, row in sessions.items()}
        newer: list[TranscriptEntry] = []
        for entry in newest.values():
            before = held.get(entry.id)
            if entry.session_id not in sessions or (before is not None and before.revision >= entry.revision):
                continue
            if before is None:
                last[entry.session_id] += 1
            entry.position = last[entry.session_id] if before is None else before.position
            entry.task_id = sessions[entry.session_id].task_id
            newer.append(entry)
        ENTRIES.put_many(tx, newer)
        moved = [{"this": one, "last": last[one]} for one, row in sessions.items() if last[one] != row.last_position]
        tx.change_many(_SAVE_POSITION, moved)
        self.store.outbox.mark(tx, [Mark(one.id, one.revision, one) for one in newer])

    def agent_sessions(self, tx: Tx, pushed: Sequence[Pushed[AgentSession]]) -> None:
        """Follow where sessions' agents stand; send what waited where one has become free."""
        with self.store.open_all(tx, [one.state.task_id for one in pushed]) as tasks:
            known = [one.state for one in pushed if one.state.task_id in tasks]
            free = [tasks[state.task_id] for state in known if self.turns.follow(tasks[state.task_id], state)]
            self.turns.begin_next(tx, free)
