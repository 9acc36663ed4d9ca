"""Queries of the task service. Each change bumps the entity's revision and marks it for the repository."""

from dataclasses import dataclass

from branchline.resource.v1.history_pb2 import (
    ACTOR_KIND_AGENT,
    ACTOR_KIND_SYSTEM,
    ACTOR_KIND_USER,
    HistoryEvent,
)
from branchline.resource.v1.repository_pb2 import Repository
from branchline.resource.v1.sandbox_pb2 import Sandbox
from branchline.resource.v1.session_pb2 import Session, SessionSummary, TranscriptEntry
from branchline.resource.v1.task_pb2 import PROVISIONING_STAGE_UNSPECIFIED, Task
from branchline.task.v1.task_pb2 import CreateTaskRequest
from sqlalchemy import func, insert, select, update
from sqlalchemy.dialects.sqlite import insert as upsert

from services.runtime.database import Database, Reader, Transaction
from services.runtime.errors import NotFound
from services.runtime.principal import Principal, principal_or_none
from services.runtime.service import Chassis
from services.runtime.spine.outbox import Mark
from services.task.status import Status, check_transition, status_name
from services.task.tables import task_sandboxes, task_workbench_sessions, tasks, transcript_entries


@dataclass(slots=True)
class TaskRecord:
    """A task as its row holds it: its public state and what only this service needs."""

    task: Task
    repository: Repository
    git_name: str
    git_email: str
    hold_prompt: bool
    attempt: int
    provisioned: bool


@dataclass(frozen=True, slots=True)
class TaskStore:
    """Tasks, their sessions, transcripts and sandboxes."""

    chassis: Chassis

    @property
    def database(self) -> Database:
        """The service's database."""
        return self.chassis.database

    async def create(self, tx: Transaction, request: CreateTaskRequest) -> bool:
        """Store a task as its coordinator bore it; return False if it is there."""
        statement = upsert(tasks).values(
            id=request.task.id,
            organization_id=request.task.organization_id,
            payload=request.task.SerializeToString(),
            repository=request.repository.SerializeToString(),
            git_name=request.identity.name,
            git_email=request.identity.email,
            hold_prompt=request.hold_prompt,
            attempt=1,
            provisioned=False,
        )
        if not (await tx.execute(statement.on_conflict_do_nothing())).rowcount:
            return False
        await tx.execute(
            insert(task_workbench_sessions).values(
                session_id=request.session.id,
                task_id=request.task.id,
                agent_revision=0,
                payload=request.session.SerializeToString(),
            )
        )
        return True

    async def get(self, reader: Reader, task_id: str, principal: Principal | None = None) -> TaskRecord:
        """Return a task; raise NotFound if there is none or it is not the caller's to see."""
        row = (await reader.execute(select(tasks).where(tasks.c.id == task_id))).one_or_none()
        if row is None or (principal is not None and not principal.sees(row.organization_id)):
            raise NotFound("task", task_id)
        return TaskRecord(
            Task.FromString(row.payload),
            Repository.FromString(row.repository),
            row.git_name,
            row.git_email,
            row.hold_prompt,
            row.attempt,
            row.provisioned,
        )

    async def save(self, tx: Transaction, record: TaskRecord) -> None:
        """Store a new state of a task and push it up."""
        task = record.task
        task.revision += 1
        task.update_time.CopyFrom(self.chassis.clock.timestamp())
        values = {
            "payload": task.SerializeToString(),
            "attempt": record.attempt,
            "provisioned": record.provisioned,
        }
        await tx.execute(update(tasks).where(tasks.c.id == task.id).values(values))
        await self.chassis.outbox.mark(tx, [Mark(task.id, task.revision, task)])

    async def change_status(
        self, tx: Transaction, record: TaskRecord, status: Status, reason: str = "", session_id: str = ""
    ) -> None:
        """Move a task to another status, with a history event. Raise FailedPrecondition if that is not allowed.

        The caller saves the task.
        """
        task = record.task
        if task.status == status:
            task.status_reason = reason
            return
        check_transition(task.status, status)
        details = {"from": status_name(task.status), "to": status_name(status)}
        task.status = status
        task.status_reason = reason
        task.status_time.CopyFrom(self.chassis.clock.timestamp())
        task.stage = PROVISIONING_STAGE_UNSPECIFIED
        summary = f"{details['from']} → {details['to']}" + (f": {reason}" if reason else "")
        await self.record_event(tx, task, "task.status_changed", summary, session_id, details)

    async def record_event(
        self,
        tx: Transaction,
        task: Task,
        kind: str,
        summary: str,
        session_id: str = "",
        details: dict[str, str] | None = None,
        *,
        by_agent: bool = False,
    ) -> None:
        """Push an event for history; its actor is the caller, else Branchline itself or the agent."""
        principal = principal_or_none()
        user_id = principal.user_id if principal is not None else ""
        actor = ACTOR_KIND_AGENT if by_agent else ACTOR_KIND_USER if user_id else ACTOR_KIND_SYSTEM
        event = HistoryEvent(
            id=self.chassis.clock.new_id("evt"),
            organization_id=task.organization_id,
            event_time=self.chassis.clock.timestamp(),
            actor_kind=actor,
            actor_user_id=user_id,
            kind=kind,
            repository_id=task.repository_id,
            task_id=task.id,
            branch=task.branch,
            session_id=session_id,
            summary=summary[:500],
            details=details,
        )
        await self.chassis.outbox.mark(tx, [Mark(event.id, 1, event)])

    async def session(self, reader: Reader, task_id: str, session_id: str) -> Session:
        """Return a session of a task; raise NotFound."""
        table = task_workbench_sessions
        query = select(table.c.payload).where(table.c.session_id == session_id, table.c.task_id == task_id)
        payload = (await reader.execute(query)).scalar_one_or_none()
        if payload is None:
            raise NotFound("session", session_id)
        return Session.FromString(payload)

    async def sessions(self, reader: Reader, task_id: str) -> list[Session]:
        """Return a task's sessions, oldest first."""
        table = task_workbench_sessions
        query = select(table.c.payload).where(table.c.task_id == task_id).order_by(table.c.session_id)
        found = [Session.FromString(payload) for payload in (await reader.execute(query)).scalars()]
        return sorted(found, key=lambda session: session.create_time.ToNanoseconds())

    async def save_session(self, tx: Transaction, record: TaskRecord, session: Session) -> None:
        """Store a new state of a session, push it up, and show it in the task's summary (not yet saved)."""
        session.revision += 1
        values = {"payload": session.SerializeToString()}
        statement = upsert(task_workbench_sessions).values(
            session_id=session.id, task_id=session.task_id, agent_revision=0, **values
        )
        await tx.execute(statement.on_conflict_do_update(index_elements=["session_id"], set_=values))
        await self.chassis.outbox.mark(tx, [Mark(session.id, session.revision, session)])
        del record.task.sessions[:]
        for one in await self.sessions(tx, session.task_id):
            record.task.sessions.append(SessionSummary(id=one.id, name=one.name, status=one.status, agent=one.agent))

    async def newer_agent_state(self, tx: Transaction, session_id: str, revision: int) -> str | None:
        """Take note of an agent's state; return the session's task, or None if the state is not newer."""
        table = task_workbench_sessions
        taken = await tx.execute(
            update(table)
            .where(table.c.session_id == session_id, table.c.agent_revision < revision)
            .values(agent_revision=revision)
            .returning(table.c.task_id)
        )
        return taken.scalar_one_or_none()

    async def add_entry(self, tx: Transaction, entry: TranscriptEntry, *, queued: bool = False) -> None:
        """Give a new transcript entry its number, store it and push it up."""
        table = transcript_entries
        last = select(func.coalesce(func.max(table.c.position), 0)).where(table.c.session_id == entry.session_id)
        entry.position = (await tx.execute(last)).scalar_one() + 1
        await tx.execute(
            insert(table).values(
                id=entry.id,
                session_id=entry.session_id,
                position=entry.position,
                revision=entry.revision,
                queued=queued,
                payload=entry.SerializeToString(),
            )
        )
        await self.chassis.outbox.mark(tx, [Mark(entry.id, entry.revision, entry)])

    async def put_entry(self, tx: Transaction, entry: TranscriptEntry, *, queued: bool = False) -> None:
        """Store a state of a transcript entry, new or newer than what is held."""
        table = transcript_entries
        query = select(table.c.position, table.c.revision).where(table.c.id == entry.id)
        held = (await tx.execute(query)).one_or_none()
        if held is None:
            await self.add_entry(tx, entry, queued=queued)
        elif held.revision < entry.revision:
            entry.position = held.position
            values = {"revision": entry.revision, "queued": queued, "payload": entry.SerializeToString()}
            await tx.execute(update(table).where(table.c.id == entry.id).values(values))
            await self.chassis.outbox.mark(tx, [Mark(entry.id, entry.revision, entry)])

    async def entry(self, reader: Reader, session_id: str, entry_id: str) -> TranscriptEntry:
        """Return an entry of a session; raise NotFound."""
        table = transcript_entries
        query = select(table.c.payload).where(table.c.id == entry_id, table.c.session_id == session_id)
        payload = (await reader.execute(query)).scalar_one_or_none()
        if payload is None:
            raise NotFound("transcript_entry", entry_id)
        return TranscriptEntry.FromString(payload)

    async def next_queued(self, tx: Transaction, task_id: str) -> TranscriptEntry | None:
        """Return the message that has waited longest in any session of a task, or None."""
        table, sessions = transcript_entries, task_workbench_sessions
        query = (
            select(table.c.payload)
            .join(sessions, sessions.c.session_id == table.c.session_id)
            .where(sessions.c.task_id == task_id, table.c.queued.is_(True))
        )
        found = [TranscriptEntry.FromString(payload) for payload in (await tx.execute(query)).scalars()]
        return min(found, key=lambda entry: entry.create_time.ToNanoseconds(), default=None)

    async def put_sandbox(self, tx: Transaction, sandbox: Sandbox) -> bool:
        """Index a sandbox's state and push it on; say whether it was newer than what was held."""
        table = task_sandboxes
        values = {"revision": sandbox.revision, "payload": sandbox.SerializeToString()}
        statement = upsert(table).values(sandbox_id=sandbox.id, task_id=sandbox.task_id, **values)
        statement = statement.on_conflict_do_update(
            index_elements=["sandbox_id"], set_=values, where=table.c.revision < sandbox.revision
        )
        if not (await tx.execute(statement)).rowcount:
            return False
        await self.chassis.outbox.mark(tx, [Mark(sandbox.id, sandbox.revision, sandbox)])
        return True

    async def sandbox(self, reader: Reader, sandbox_id: str) -> Sandbox | None:
        """Return a sandbox as it is indexed, or None."""
        query = select(task_sandboxes.c.payload).where(task_sandboxes.c.sandbox_id == sandbox_id)
        payload = (await reader.execute(query)).scalar_one_or_none()
        return Sandbox.FromString(payload) if payload is not None else None
