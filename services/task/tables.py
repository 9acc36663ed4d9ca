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
    Column("derived_branch", Boolean, nullable=False),
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
    Column("working_since", Float),
    Column("payload", LargeBinary, nullable=False),
    Index("task_workbench_sessions_task", "task_id"),
    _partial("task_workbench_sessions_working", "working_since", "working_since IS NOT NULL"),
    comment="Coordinator index of session: metadata, status, model",
)

transcript_entries = Table(
    "transcript_entries",
    metadata,
    Column("id", String, primary_key=True),
    Column("session_id", String, nullable=False),
    Column("task_id", String, nullable=False),
    Column("position", BigInteger, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("queued", Boolean, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    UniqueConstraint("session_id", "position"),
    _partial("transcript_entries_queued", "task_id", "queued", "queued = 1"),
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

permission_answers = Table(
    "permission_answers",
    metadata,
    Column("entry_id", String, primary_key=True),
    Column("task_id", String, nullable=False),
    Column("option_id", String, nullable=False),
    Column("user_id", String, nullable=False),
    Column("answer_time", Float, nullable=False),
    Index("permission_answers_task", "task_id"),
    Index("permission_answers_time", "answer_time"),
    comment="Who answered an agent's request first, and how, until its entry shows it",
)
