"""Queries of the sandbox service. Each change bumps the entity's revision and marks it for the task."""

from collections.abc import Sequence
from dataclasses import dataclass

from branchline.resource.v1 import sandbox_pb2, session_pb2
from branchline.resource.v1.sandbox_pb2 import Sandbox
from branchline.resource.v1.session_pb2 import TranscriptEntry
from branchline.sandbox.v1.sandbox_pb2 import AgentSession, StartTurnRequest
from google.protobuf.message import Message
from sqlalchemy import Row, select, update
from sqlalchemy.dialects.sqlite import insert as upsert

from services.runtime.database import Database, Reader, Transaction
from services.runtime.errors import NotFound
from services.runtime.service import Chassis
from services.runtime.spine.outbox import Mark
from services.sandbox.tables import agent_sessions, entries, permissions, sandboxes
from services.sandbox.transcript import Draft

WORKING = (session_pb2.SESSION_STATUS_RUNNING, session_pb2.SESSION_STATUS_WAITING)
GONE = (sandbox_pb2.SANDBOX_STATUS_DESTROYING, sandbox_pb2.SANDBOX_STATUS_DESTROYED)


@dataclass(slots=True)
class SessionRecord:
    """An agent session as its row holds it."""

    session_id: str
    sandbox_id: str
    task_id: str
    agent: str
    model: str
    generation: int
    acp_session_id: str
    last_event_id: int
    turn: int
    prompt: StartTurnRequest | None
    prompt_rpc_id: int
    prompt_event_id: int
    cancel_wanted: bool
    entry_count: int
    status: session_pb2.SessionStatus.ValueType
    revision: int

    @property
    def connection(self) -> str:
        """Id of the agent connection at the sandbox-agent server."""
        return f"{self.session_id}-{self.generation}"


@dataclass(frozen=True, slots=True)
class PermissionRecord:
    """A permission request, answered or not."""

    entry_id: str
    rpc_id: str
    option_id: str
    user_id: str


@dataclass(frozen=True, slots=True)
class SandboxStore:
    """Sandboxes, the agent sessions in them, and what the agents said."""

    chassis: Chassis

    @property
    def database(self) -> Database:
        """The service's database."""
        return self.chassis.database

    async def sandbox(self, reader: Reader, sandbox_id: str) -> Sandbox:
        """Return a sandbox; raise NotFound."""
        query = select(sandboxes.c.payload).where(sandboxes.c.id == sandbox_id)
        payload = (await reader.execute(query)).scalar_one_or_none()
        if payload is None:
            raise NotFound("sandbox", sandbox_id)
        return Sandbox.FromString(payload)

    async def active_sandbox(self, reader: Reader, task_id: str, organization_id: str) -> Sandbox | None:
        """Return the newest sandbox of a task that is not gone, or None."""
        query = (
            select(sandboxes.c.payload)
            .where(
                sandboxes.c.task_id == task_id,
                sandboxes.c.organization_id == organization_id,
                sandboxes.c.status.not_in(GONE),
            )
            .order_by(sandboxes.c.id.desc())
            .limit(1)
        )
        payload = (await reader.execute(query)).scalar_one_or_none()
        return Sandbox.FromString(payload) if payload is not None else None

    async def all_sandboxes(self, reader: Reader) -> list[Sandbox]:
        """Return every sandbox that is not destroyed."""
        query = select(sandboxes.c.payload).where(sandboxes.c.status != sandbox_pb2.SANDBOX_STATUS_DESTROYED)
        return [Sandbox.FromString(payload) for payload in (await reader.execute(query)).scalars()]

    async def add_sandbox(self, tx: Transaction, sandbox: Sandbox, organization_id: str) -> None:
        """Store a new sandbox; leave one that is there, whatever its state."""
        statement = upsert(sandboxes).values(
            id=sandbox.id,
            task_id=sandbox.task_id,
            organization_id=organization_id,
            status=sandbox.status,
            payload=b"",
        )
        if (await tx.execute(statement.on_conflict_do_nothing())).rowcount:
            await self.save_sandbox(tx, sandbox)

    async def bury(self, tx: Transaction, sandbox_id: str) -> bool:
        """Note that a sandbox is gone before it was made, so that a creation on its way is refused.

        Return False if it was made.
        """
        statement = upsert(sandboxes).values(
            id=sandbox_id,
            task_id="",
            organization_id="",
            status=sandbox_pb2.SANDBOX_STATUS_DESTROYED,
            payload=Sandbox(id=sandbox_id, status=sandbox_pb2.SANDBOX_STATUS_DESTROYED).SerializeToString(),
        )
        return (await tx.execute(statement.on_conflict_do_nothing())).rowcount > 0

    async def save_sandbox(self, tx: Transaction, sandbox: Sandbox) -> None:
        """Store a new state of a sandbox."""
        sandbox.revision += 1
        values = {"status": sandbox.status, "payload": sandbox.SerializeToString()}
        await tx.execute(update(sandboxes).where(sandboxes.c.id == sandbox.id).values(values))
        await self._mark(tx, sandbox.id, sandbox.revision, sandbox)

    async def change_sandbox(
        self, sandbox_id: str, status: sandbox_pb2.SandboxStatus.ValueType, reason: str = "", isolation: str = ""
    ) -> Sandbox:
        """Change where a sandbox stands."""
        async with self.database.transaction() as tx:
            sandbox = await self.sandbox(tx, sandbox_id)
            if sandbox.status == status and sandbox.status_reason == reason:
                return sandbox
            sandbox.status = status
            sandbox.status_reason = reason
            sandbox.isolation = isolation or sandbox.isolation
            sandbox.status_time.CopyFrom(self.chassis.clock.timestamp())
            await self.save_sandbox(tx, sandbox)
        return sandbox

    async def session(self, reader: Reader, session_id: str) -> SessionRecord:
        """Return an agent session; raise NotFound."""
        query = select(agent_sessions).where(agent_sessions.c.session_id == session_id)
        row = (await reader.execute(query)).one_or_none()
        if row is None:
            raise NotFound("session", session_id)
        return _record(row)

    async def working_sessions(self) -> list[str]:
        """Return the sessions whose agents have a turn to do."""
        query = select(agent_sessions.c.session_id).where(agent_sessions.c.status.in_(WORKING))
        async with self.database.read() as connection:
            return list((await connection.execute(query)).scalars())

    async def sessions_in(self, reader: Reader, sandbox_id: str) -> list[SessionRecord]:
        """Return the agent sessions of a sandbox."""
        query = select(agent_sessions).where(agent_sessions.c.sandbox_id == sandbox_id)
        return [_record(row) for row in (await reader.execute(query)).all()]

    async def add_session(self, tx: Transaction, record: SessionRecord) -> None:
        """Store a new agent session, or move a known one to another sandbox."""
        values = _values(record)
        statement = upsert(agent_sessions).values(values)
        del values["session_id"]
        await tx.execute(statement.on_conflict_do_update(index_elements=["session_id"], set_=values))

    async def save_session(self, tx: Transaction, record: SessionRecord) -> None:
        """Store an agent session without telling the task. The wish to cancel is not the follower's to change."""
        values = _values(record)
        del values["cancel_wanted"]
        await tx.execute(update(agent_sessions).where(agent_sessions.c.session_id == record.session_id).values(values))

    async def want_cancel(self, tx: Transaction, session_id: str, *, wanted: bool) -> None:
        """Record whether the turn shall be cancelled."""
        await tx.execute(
            update(agent_sessions).where(agent_sessions.c.session_id == session_id).values(cancel_wanted=wanted)
        )

    async def report_session(
        self,
        tx: Transaction,
        record: SessionRecord,
        status: session_pb2.SessionStatus.ValueType,
        reason: str = "",
    ) -> None:
        """Store an agent session and tell the task where it stands."""
        record.status = status
        record.revision += 1
        await self.save_session(tx, record)
        state = AgentSession(
            session_id=record.session_id,
            task_id=record.task_id,
            status=status,
            status_reason=reason,
            turn=record.turn,
            revision=record.revision,
        )
        await self._mark(tx, record.session_id, record.revision, state)

    async def save_entries(self, tx: Transaction, drafts: Sequence[Draft]) -> None:
        """Store changed transcript entries and push them."""
        for draft in drafts:
            values = {"streaming": draft.entry.streaming, "payload": draft.entry.SerializeToString()}
            statement = upsert(entries).values(
                id=draft.entry.id,
                session_id=draft.entry.session_id,
                number=draft.number,
                tool_call_id=draft.tool_call_id,
                **values,
            )
            await tx.execute(statement.on_conflict_do_update(index_elements=["id"], set_=values))
        marks = [Mark(draft.entry.id, draft.entry.revision, draft.entry) for draft in drafts]
        await self.chassis.outbox.mark(tx, marks)

    async def open_drafts(self, session_id: str) -> dict[str, Draft]:
        """Return the entries that may still change, as they were last stored."""
        query = (
            select(entries)
            .where(entries.c.session_id == session_id, entries.c.streaming.is_(True))
            .order_by(entries.c.number)
        )
        async with self.database.read() as connection:
            rows = (await connection.execute(query)).all()
        return {row.id: Draft(TranscriptEntry.FromString(row.payload), row.number, row.tool_call_id) for row in rows}

    async def entry(self, reader: Reader, entry_id: str) -> TranscriptEntry:
        """Return a transcript entry; raise NotFound."""
        query = select(entries.c.payload).where(entries.c.id == entry_id)
        payload = (await reader.execute(query)).scalar_one_or_none()
        if payload is None:
            raise NotFound("transcript_entry", entry_id)
        return TranscriptEntry.FromString(payload)

    async def ask_permission(self, tx: Transaction, session_id: str, entry_id: str, rpc_id: str) -> None:
        """Remember whom to answer."""
        values = {"session_id": session_id, "rpc_id": rpc_id, "option_id": "", "user_id": "", "delivered": False}
        await tx.execute(upsert(permissions).values(entry_id=entry_id, **values).on_conflict_do_nothing())

    async def permissions(self, session_id: str, *, answered: bool) -> list[PermissionRecord]:
        """Return the requests whose answers are to be delivered, or those not yet answered."""
        condition = permissions.c.option_id != "" if answered else permissions.c.option_id == ""
        query = select(permissions).where(
            permissions.c.session_id == session_id, permissions.c.delivered.is_(False), condition
        )
        async with self.database.read() as connection:
            rows = (await connection.execute(query)).all()
        return [PermissionRecord(row.entry_id, row.rpc_id, row.option_id, row.user_id) for row in rows]

    async def answer_permission(self, tx: Transaction, entry_id: str, option_id: str, user_id: str) -> bool:
        """Record the first answer; return False if there was one."""
        answered = await tx.execute(
            update(permissions)
            .where(
                permissions.c.entry_id == entry_id, permissions.c.option_id == "", permissions.c.delivered.is_(False)
            )
            .values(option_id=option_id, user_id=user_id)
        )
        return answered.rowcount > 0

    async def close_permissions(self, tx: Transaction, session_id: str, entry_ids: Sequence[str] | None = None) -> None:
        """Note that requests need nothing more: those given, or all of a session."""
        condition = [permissions.c.session_id == session_id]
        if entry_ids is not None:
            condition.append(permissions.c.entry_id.in_(entry_ids))
        await tx.execute(update(permissions).where(*condition).values(delivered=True))

    async def _mark(self, tx: Transaction, entity_id: str, revision: int, state: Message) -> None:
        await self.chassis.outbox.mark(tx, [Mark(entity_id, revision, state)])


def _record(row: Row[tuple[object, ...]]) -> SessionRecord:
    values = dict(row._mapping)  # pyright: ignore[reportPrivateUsage]
    prompt = values.pop("prompt")
    return SessionRecord(**values, prompt=StartTurnRequest.FromString(prompt) if prompt is not None else None)


def _values(record: SessionRecord) -> dict[str, object]:
    values: dict[str, object] = {name: getattr(record, name) for name in SessionRecord.__slots__}
    values["prompt"] = record.prompt.SerializeToString() if record.prompt is not None else None
    return values
