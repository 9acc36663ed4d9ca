"""Tables of the sandbox service."""

from sqlalchemy import BigInteger, Boolean, Column, Float, Index, Integer, LargeBinary, MetaData, String, Table, false

from services.runtime.spine.tables import add_spine_tables

metadata = MetaData()
add_spine_tables(metadata, commands=True)

sandboxes = Table(
    "sandboxes",
    metadata,
    Column("id", String, primary_key=True),
    Column("task_id", String, nullable=False),
    Column("organization_id", String, nullable=False, server_default=""),
    Column("workspace", String, nullable=False, server_default=""),
    Column("remote_url", String, nullable=False, server_default=""),
    Column("state", Integer, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    Index("sandboxes_task", "task_id"),
    comment="Every sandbox there ever was, of tasks that are not deleted",
)

agent_sessions = Table(
    "agent_sessions",
    metadata,
    Column("session_id", String, primary_key=True),
    Column("sandbox_id", String, nullable=False),
    Column("task_id", String, nullable=False),
    Column("organization_id", String, nullable=False),
    Column("agent", String, nullable=False),
    Column("model", String, nullable=False),
    Column("mode", String, nullable=False),
    Column("generation", Integer, nullable=False),
    Column("acp_session_id", String, nullable=False),
    Column("process", String, nullable=False),
    Column("ending", Boolean, nullable=False),
    Column("closing", Boolean, nullable=False),
    Column("last_event", BigInteger, nullable=False),
    Column("entry_count", Integer, nullable=False),
    Column("turn", Integer, nullable=False),
    Column("turn_time", Float, nullable=False),
    Column("posts", Integer, nullable=False),
    Column("prompt_rpc_id", BigInteger, nullable=False),
    Column("mark", BigInteger, nullable=False),
    Column("accepted", Boolean, nullable=False),
    Column("cancel_turn", Integer, nullable=False),
    Column("state", Integer, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Index("agent_sessions_sandbox", "sandbox_id"),
    Index("agent_sessions_state", "state"),
    Index("agent_sessions_task", "task_id"),
    comment="Agent sessions: the ACP connection, how far its events are read, and the turn it works on",
)

prompts = Table(
    "prompts",
    metadata,
    Column("session_id", String, primary_key=True),
    Column("payload", LargeBinary, nullable=False),
    comment="What agents are working on; apart from their sessions, which change twenty times a second",
)

drafts = Table(
    "drafts",
    metadata,
    Column("id", String, primary_key=True),
    Column("session_id", String, nullable=False),
    Column("number", Integer, nullable=False),
    Column("key", String, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    Index("drafts_session", "session_id"),
    comment="Transcript entries that may still change; what is complete is the outbox's, then the task's",
)

offers = Table(
    "offers",
    metadata,
    Column("session_id", String, primary_key=True),
    Column("model", String, nullable=False),
    Column("mode", String, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    comment="What the agents of sessions offer, and the model and mode that each works with",
)

input_requests = Table(
    "input_requests",
    metadata,
    Column("id", String, primary_key=True),
    Column("session_id", String, nullable=False),
    Column("rpc_id", String, nullable=False),
    Column("answered", Boolean, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    Index("input_requests_session", "session_id"),
    comment="What agents wait for; one that is answered is so because the agent is not yet told",
)

agent_reports = Table(
    "agent_reports",
    metadata,
    Column("sandbox_id", String, primary_key=True),
    Column("task_id", String, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    Index("agent_reports_task", "task_id"),
    comment="The agents of each sandbox, as it and its sessions last told them",
)

processes = Table(
    "processes",
    metadata,
    Column("id", String, primary_key=True),
    Column("task_id", String, nullable=False),
    Column("sandbox_id", String, nullable=False),
    Column("organization_id", String, nullable=False, server_default=""),
    Column("state", Integer, nullable=False),
    Column("end_time", Float, nullable=False),
    Column("spec", LargeBinary, nullable=True),
    Column("watched", Boolean, nullable=False, server_default=false()),
    Column("revision", BigInteger, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    Index("processes_task", "task_id", "id"),
    Index("processes_state", "state", "end_time"),
    comment="Commands and terminals; what they run is kept whole until they have begun",
)
