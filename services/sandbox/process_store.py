"""Queries about processes. Each change bumps the revision and marks the process for the task."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from branchline.v1.common_pb2 import ENTITY_KIND_PROCESS, Actor
from branchline.v1.errors_pb2 import ERROR_REASON_QUOTA_EXCEEDED
from branchline.v1.processes_pb2 import (
    PROCESS_STATE_ENDED,
    PROCESS_STATE_RUNNING,
    PROCESS_STATE_STARTING,
    Process,
    ProcessEnd,
    ProcessSpec,
)
from sqlalchemy import bindparam, func, select, update

from services.runtime.clock import Clock, column_seconds
from services.runtime.database import Reader, Statement, Tx
from services.runtime.errors import NotFound, ResourceExhausted
from services.runtime.spine.outbox import Mark, Outbox
from services.runtime.spine.resources import Resources
from services.sandbox.tables import processes

MOST_RUNNING = 32
MOST_KEPT = 200
KEEP_SECONDS = 7 * 24 * 3600.0
TAIL_BYTES = 64 * 1024

PROCESSES = Resources(
    processes,
    Process,
    ENTITY_KIND_PROCESS,
    lambda process: {
        "id": process.id,
        "task_id": process.task_id,
        "sandbox_id": process.sandbox_id,
        "state": process.state,
        "end_time": column_seconds(process.end.end_time) if process.HasField("end") else 0.0,
    },
    own=("organization_id", "spec", "watched"),
)
_THIS = processes.c.id == bindparam("process")
_OWN = Statement(
    update(processes).where(_THIS).values(organization_id=bindparam("organization"), spec=bindparam("whole"))
)
_MINE = Statement(
    select(processes.c.payload).where(
        _THIS, processes.c.task_id == bindparam("task"), processes.c.organization_id == bindparam("organization")
    )
)
_SPEC = Statement(select(processes.c.spec, processes.c.watched).where(_THIS))
_DROP_SPEC = Statement(update(processes).where(_THIS).values(spec=None))
_WATCHED = Statement(update(processes).where(_THIS).values(watched=True))
_UNENDED = Statement(select(processes.c.id).where(processes.c.state != PROCESS_STATE_ENDED))
_COUNT = Statement(
    select(func.count()).where(processes.c.task_id == bindparam("task"), processes.c.state != PROCESS_STATE_ENDED)
)
_ENDED_OF_TASK = Statement(
    select(processes.c.payload)
    .where(processes.c.task_id == bindparam("task"), processes.c.state == PROCESS_STATE_ENDED)
    .order_by(processes.c.id.desc())
    .offset(bindparam("kept"))
)
_OLD = Statement(
    select(processes.c.payload)
    .where(processes.c.state == PROCESS_STATE_ENDED, processes.c.end_time < bindparam("before"))
    .limit(100)
)


class Output(NamedTuple):
    """What is known of a process's output."""

    output_bytes: int
    kept_offset: int
    tail: bytes


@dataclass(frozen=True, slots=True)
class ProcessStore:
    """The processes of this service's sandboxes."""

    outbox: Outbox
    clock: Clock

    def start(
        self, tx: Tx, task_id: str, sandbox_id: str, organization_id: str, spec: ProcessSpec, creator: Actor
    ) -> Process:
        """Store a process that is to be started. Raise ResourceExhausted if too many of the task run."""
        tx.take_turn("processes", task_id)
        if tx.value(_COUNT, {"task": task_id}) >= MOST_RUNNING:
            words = f"{MOST_RUNNING} processes of the task run; that is the most"
            raise ResourceExhausted(ERROR_REASON_QUOTA_EXCEEDED, words, limit="processes")
        process = Process(
            id=self.clock.new_id("proc"),
            task_id=task_id,
            sandbox_id=sandbox_id,
            spec=spec,
            state=PROCESS_STATE_STARTING,
            creator=creator,
            create_time=self.clock.timestamp(),
        )
        for name in spec.environment:
            process.spec.environment[name] = ""
        self._put(tx, process)
        whole = spec.SerializeToString()
        tx.change(_OWN, {"process": process.id, "organization": organization_id, "whole": whole})
        return process

    def get(self, tx: Reader, process_id: str) -> Process:
        """Return a process; raise NotFound."""
        return PROCESSES.get(tx, process_id)

    def mine(self, tx: Reader, process_id: str, task_id: str, organization_id: str) -> Process:
        """Return a process of a task; raise NotFound."""
        given = {"process": process_id, "task": task_id, "organization": organization_id}
        payload = tx.value(_MINE, given)
        if payload is None:
            raise NotFound(ENTITY_KIND_PROCESS, process_id)
        return Process.FromString(payload)

    def unended(self, tx: Reader) -> list[str]:
        """Return the ids of all processes that have not ended."""
        return [row.id for row in tx.rows(_UNENDED)]

    def whole(self, tx: Reader, process_id: str) -> tuple[ProcessSpec, bool]:
        """Return what shall be run, with all secrets until it has begun, and whether there was a watcher."""
        row = tx.row(_SPEC, {"process": process_id})
        if row is None:
            raise NotFound(ENTITY_KIND_PROCESS, process_id)
        return ProcessSpec.FromString(row.spec or b""), row.watched

    def watched(self, tx: Tx, process_id: str) -> None:
        """Note that there was a watcher."""
        tx.change(_WATCHED, {"process": process_id})

    def running(self, tx: Tx, process_id: str, output: Output) -> Process:
        """Note that a process runs, and what it wrote so far."""
        process = PROCESSES.take(tx, process_id)
        if process.state == PROCESS_STATE_ENDED:
            return process
        if process.state == PROCESS_STATE_STARTING:
            tx.change(_DROP_SPEC, {"process": process_id})
        process.state = PROCESS_STATE_RUNNING
        return self._wrote(tx, process, output)

    def ended(self, tx: Tx, process_id: str, end: ProcessEnd, output: Output | None) -> Process:
        """Note how a process ended, once; no output means that it is not known any better."""
        process = PROCESSES.take(tx, process_id)
        if process.state == PROCESS_STATE_ENDED:
            return process
        tx.change(_DROP_SPEC, {"process": process_id})
        process.state = PROCESS_STATE_ENDED
        process.end.CopyFrom(end)
        if not end.HasField("end_time"):
            process.end.end_time.CopyFrom(self.clock.timestamp())
        known = Output(process.output_bytes, process.kept_offset, process.output_tail)
        return self._wrote(tx, process, output or known)

    def excess(self, tx: Tx, task_id: str) -> list[Process]:
        """Forget the oldest ended processes of a task beyond what is kept, and return them."""
        rows = tx.rows(_ENDED_OF_TASK, {"task": task_id, "kept": MOST_KEPT - MOST_RUNNING})
        return self._forget(tx, [row.payload for row in rows])

    def old(self, tx: Tx) -> list[Process]:
        """Forget some processes that ended long ago, and return them."""
        rows = tx.rows(_OLD, {"before": self.clock.seconds() - KEEP_SECONDS})
        return self._forget(tx, [row.payload for row in rows])

    def _forget(self, tx: Tx, payloads: Sequence[bytes]) -> list[Process]:
        gone = [Process.FromString(payload) for payload in payloads]
        marks: list[Mark] = []
        for process in gone:
            PROCESSES.delete(tx, process.id)
            left = Process(id=process.id, task_id=process.task_id, sandbox_id=process.sandbox_id)
            left.revision = process.revision + 1
            marks.append(Mark(left.id, left.revision, left, deleted=True))
        self.outbox.mark(tx, marks)
        return gone

    def _wrote(self, tx: Tx, process: Process, output: Output) -> Process:
        process.output_bytes, process.kept_offset = output.output_bytes, output.kept_offset
        process.output_tail = output.tail[-TAIL_BYTES:]
        return self._put(tx, process)

    def _put(self, tx: Tx, process: Process) -> Process:
        process.revision += 1
        PROCESSES.save(tx, [process])
        self.outbox.mark(tx, [Mark(process.id, process.revision, process)])
        return process
