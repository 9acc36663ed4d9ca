"""How what sandboxes push becomes rows of the task. What concerns a task that is gone is ignored."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from branchline.v1 import sandboxes_pb2
from branchline.v1.common_pb2 import FAILURE_REASON_SANDBOX_LOST, Failure
from branchline.v1.processes_pb2 import Process
from branchline.v1.sandboxes_pb2 import Sandbox
from branchline.v1.transcripts_pb2 import InputRequest, TranscriptEntry
from branchline_internal.sandbox.v1.sandbox_pb2 import AgentReport, AgentSession
from sqlalchemy import bindparam, select, update

from services.runtime.database import Database, Statement, Tx, is_in
from services.runtime.failures import failed
from services.runtime.limits import ENTITY_BYTES
from services.runtime.spine.ingest import Handler, Ingest, Pushed, RejectedEntryError
from services.runtime.spine.outbox import Mark
from services.task import inputs
from services.task.store import ENTRIES, REPORTS, SANDBOXES, TaskStore
from services.task.tables import agent_reports, task_sandboxes, task_workbench_sessions, tasks, transcript_entries
from services.task.turns import Turns

_FAILED = frozenset({sandboxes_pb2.SANDBOX_STATE_FAILED, sandboxes_pb2.SANDBOX_STATE_DESTROYED})

_sessions = task_workbench_sessions
_KNOWN = Statement(
    select(tasks.c.id).where(is_in(tasks.c.id, "ids")).order_by(tasks.c.id).with_for_update(read=True, key_share=True)
)
"""Those tasks that there are; they stay until the transaction ends."""

_HELD_SANDBOXES = Statement(
    select(task_sandboxes.c.id, task_sandboxes.c.revision).where(is_in(task_sandboxes.c.id, "ids"))
)
_HELD_REPORTS = Statement(
    select(agent_reports.c.sandbox_id, agent_reports.c.revision).where(is_in(agent_reports.c.sandbox_id, "ids"))
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
            Handler(AgentReport, self.agent_reports),
            Handler(Process, self.processes),
            Handler(TranscriptEntry, self.transcript_entries),
            Handler((InputRequest, AgentSession), self.agents),
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
                if sandbox.state in _FAILED and sandbox.id == task.task.active_sandbox_id:
                    self.turns.fail_all(task, _lost(sandbox))
        SANDBOXES.put_many(tx, known)
        self.store.outbox.mark(tx, [Mark(one.id, one.revision, one) for one in known])

    def agent_reports(self, tx: Tx, pushed: Sequence[Pushed[AgentReport]]) -> None:
        """Keep which agents sandboxes know, and pass it on."""
        held = {row.sandbox_id: row.revision for row in tx.rows(_HELD_REPORTS, {"ids": [one.id for one in pushed]})}
        newest = {one.id: one.state for one in sorted(pushed, key=lambda one: one.revision)}
        known = self._known(tx, (one.task_id for one in newest.values()))
        newer = [one for one in newest.values() if one.task_id in known and one.revision > held.get(one.sandbox_id, 0)]
        REPORTS.put_many(tx, newer)
        self.store.outbox.mark(tx, [Mark(one.sandbox_id, one.revision, one) for one in newer])

    def processes(self, tx: Tx, pushed: Sequence[Pushed[Process]]) -> None:
        """Pass on how processes stand: the repository's index keeps it."""
        known = self._known(tx, (one.state.task_id for one in pushed))
        marks = [
            Mark(one.id, one.revision, one.state, deleted=one.deleted)
            for one in sorted(pushed, key=lambda one: one.revision)
            if one.state.task_id in known
        ]
        self.store.outbox.mark(tx, marks)

    def _known(self, tx: Tx, task_ids: Iterable[str]) -> set[str]:
        return {row.id for row in tx.rows(_KNOWN, {"ids": sorted(set(task_ids))})}

    def transcript_entries(self, tx: Tx, pushed: Sequence[Pushed[TranscriptEntry]]) -> None:
        """Give new entries their numbers, and store newer states of those that are there."""
        newest: dict[str, TranscriptEntry] = {}
        for one in pushed:
            _check_size(one.state)
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

    def agents(self, tx: Tx, pushed: Sequence[Pushed[InputRequest] | Pushed[AgentSession]]) -> None:
        """Follow what agents ask and where they stand; send what waited where one has become free."""
        with self.store.open_all(tx, [one.state.task_id for one in pushed]) as opened:
            known = [one for one in pushed if one.state.task_id in opened]
            asked: list[InputRequest] = []
            for one in known:
                if isinstance(one.state, InputRequest):
                    _check_size(one.state)
                    asked.append(one.state)
            if asked:
                inputs.take(tx, opened, asked)
            states = [one.state for one in known if isinstance(one.state, AgentSession)]
            free = [opened[state.task_id] for state in states if self.turns.follow(opened[state.task_id], state)]
            self.turns.begin_next(tx, free)


def _check_size(state: TranscriptEntry | InputRequest) -> None:
    if state.ByteSize() > ENTITY_BYTES:
        raise RejectedEntryError(f"it has more than {ENTITY_BYTES} bytes")


def _lost(sandbox: Sandbox) -> Failure:
    """Return why a task failed whose sandbox did."""
    words = f"the sandbox failed: {sandbox.failure.message or 'it is gone'}"
    return failed(FAILURE_REASON_SANDBOX_LOST, words, sandbox.failure.output_tail)
