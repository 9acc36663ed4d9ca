"""Tables of the task service: tasks, and the index of their sessions and sandboxes."""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    text,
)
from sqlalchemy.schema import SchemaItem

from services.runtime.database.indexes import partial_index
from services.runtime.spine.tables import add_spine_tables

metadata = MetaData()
add_spine_tables(metadata, commands=True)


def _partial(name: str, column: str, where: str, sqlite_where: str = "") -> SchemaItem:
    return partial_index(name, column, where=text(where), sqlite_where=text(sqlite_where or where))


tasks = Table(
    "tasks",
    metadata,
    Column("id", String, primary_key=True),
    Column("organization_id", String, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    Column("repository", LargeBinary, nullable=False),
    Column("git_name", String, nullable=False),
    Column("git_email", String, nullable=False),
    Column("hold_prompt", Boolean, nullable=False),
    Column("branch_choice", String, nullable=False),
    Column("branch_base", String, nullable=False),
    Column("provisioned", Boolean, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("workflow", String, nullable=False),
    Column("workflow_time", Float, nullable=False),
    _partial("tasks_workflow", "workflow_time", "workflow <> ''"),
    comment="Tasks, owned here, with the workflow that each waits for",
)

task_workbench_sessions = Table(
    "task_workbench_sessions",
    metadata,
    Column("session_id", String, primary_key=True),
    Column("task_id", String, nullable=False),
    Column("agent_revision", BigInteger, nullable=False),
    Column("last_position", BigInteger, nullable=False),
    Column("cancelled_turn", Integer, nullable=False),
    Column("working_since", Float),
    Column("payload", LargeBinary, nullable=False),
    Index("task_workbench_sessions_task", "task_id"),
    _partial("task_workbench_sessions_working", "working_since", "working_since IS NOT NULL"),
    comment="Coordinator index of session: metadata, state, model",
)

transcript_entries = Table(
    "transcript_entries",
    metadata,
    Column("id", String, primary_key=True),
    Column("session_id", String, nullable=False),
    Column("task_id", String, nullable=False),
    Column("position", BigInteger, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("prompt_turn", Integer),
    Column("payload", LargeBinary, nullable=False),
    UniqueConstraint("session_id", "position"),
    partial_index("transcript_entries_prompts", "session_id", "prompt_turn", where=text("prompt_turn IS NOT NULL")),
    comment="Coordinator index of session: its transcript, numbered",
)

task_sandboxes = Table(
    "task_sandboxes",
    metadata,
    Column("id", String, primary_key=True),
    Column("task_id", String, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    Index("task_sandboxes_task", "task_id"),
    comment="Coordinator index of sandbox: every sandbox the task ever had",
)

queued_messages = Table(
    "queued_messages",
    metadata,
    Column("id", String, primary_key=True),
    Column("task_id", String, nullable=False),
    Column("place", Integer, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    Index("queued_messages_place", "task_id", "place"),
    comment="Messages that wait until the agents of their task are free, owned here",
)

input_requests = Table(
    "input_requests",
    metadata,
    Column("id", String, primary_key=True),
    Column("task_id", String, nullable=False),
    Column("pending", Boolean, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    Index("input_requests_task", "task_id"),
    _partial("input_requests_pending", "task_id", "pending", "pending = 1"),
    comment="What agents wait for, and who answered it first; asked by the sandbox, answered here",
)

agent_reports = Table(
    "agent_reports",
    metadata,
    Column("sandbox_id", String, primary_key=True),
    Column("task_id", String, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    Index("agent_reports_task", "task_id"),
    comment="The agents that each sandbox of a task knows, as it said last",
)
