"""Tables of the task service: tasks, and the index of their sessions and sandboxes."""

from sqlalchemy import Boolean, Column, Index, Integer, LargeBinary, MetaData, String, Table, UniqueConstraint

from services.runtime.spine.tables import spine_tables

metadata = MetaData()
spine = spine_tables(metadata)

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
    Column("attempt", Integer, nullable=False),
    Column("provisioned", Boolean, nullable=False),
    comment="Tasks, owned here",
)

task_workbench_sessions = Table(
    "task_workbench_sessions",
    metadata,
    Column("session_id", String, primary_key=True),
    Column("task_id", String, nullable=False),
    Column("agent_revision", Integer, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    Index("task_workbench_sessions_task", "task_id"),
    comment="Coordinator index of session: metadata, status, model",
)

transcript_entries = Table(
    "transcript_entries",
    metadata,
    Column("id", String, primary_key=True),
    Column("session_id", String, nullable=False),
    Column("position", Integer, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("queued", Boolean, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    UniqueConstraint("session_id", "position"),
    comment="Coordinator index of session: its transcript, numbered",
)

task_sandboxes = Table(
    "task_sandboxes",
    metadata,
    Column("sandbox_id", String, primary_key=True),
    Column("task_id", String, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    Index("task_sandboxes_task", "task_id"),
    comment="Coordinator index of sandbox: every sandbox the task ever had",
)
