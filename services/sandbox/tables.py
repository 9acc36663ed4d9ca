"""Tables of the sandbox service."""

from sqlalchemy import Boolean, Column, Index, Integer, LargeBinary, MetaData, String, Table

from services.runtime.spine.tables import spine_tables

metadata = MetaData()
spine = spine_tables(metadata)

sandboxes = Table(
    "sandboxes",
    metadata,
    Column("id", String, primary_key=True),
    Column("task_id", String, nullable=False),
    Column("organization_id", String, nullable=False),
    Column("status", Integer, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    Index("sandboxes_task", "task_id"),
    comment="Every sandbox there ever was",
)

agent_sessions = Table(
    "agent_sessions",
    metadata,
    Column("session_id", String, primary_key=True),
    Column("sandbox_id", String, nullable=False),
    Column("task_id", String, nullable=False),
    Column("agent", String, nullable=False),
    Column("model", String, nullable=False),
    Column("generation", Integer, nullable=False),
    Column("acp_session_id", String, nullable=False),
    Column("last_event_id", Integer, nullable=False),
    Column("turn", Integer, nullable=False),
    Column("prompt", LargeBinary, nullable=True),
    Column("prompt_rpc_id", Integer, nullable=False),
    Column("prompt_event_id", Integer, nullable=False),
    Column("cancel_wanted", Boolean, nullable=False),
    Column("entry_count", Integer, nullable=False),
    Column("status", Integer, nullable=False),
    Column("revision", Integer, nullable=False),
    comment="Agent sessions: the ACP connection, how far its events are read, and the turn it works on",
)

entries = Table(
    "entries",
    metadata,
    Column("id", String, primary_key=True),
    Column("session_id", String, nullable=False),
    Column("number", Integer, nullable=False),
    Column("streaming", Boolean, nullable=False),
    Column("tool_call_id", String, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    Index("entries_streaming", "session_id", "streaming"),
    comment="Transcript entries read from agents; the task numbers them",
)

permissions = Table(
    "permissions",
    metadata,
    Column("entry_id", String, primary_key=True),
    Column("session_id", String, nullable=False),
    Column("rpc_id", String, nullable=False),
    Column("option_id", String, nullable=False),
    Column("user_id", String, nullable=False),
    Column("delivered", Boolean, nullable=False),
    comment="Permission requests of agents, with their answers",
)
