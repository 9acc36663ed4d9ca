"""Tables of the repository service: its own, the caches of GitHub, and the index of its tasks."""

from branchline.resource.v1.sandbox_pb2 import Sandbox
from branchline.resource.v1.session_pb2 import Session, TranscriptEntry
from branchline.resource.v1.task_pb2 import Task
from sqlalchemy import Boolean, Column, Index, Integer, LargeBinary, MetaData, String, Table, text

from services.runtime.spine.index import IndexTable
from services.runtime.spine.tables import index_table, spine_tables

metadata = MetaData()
spine = spine_tables(metadata)

repositories = Table(
    "repositories",
    metadata,
    Column("id", String, primary_key=True),
    Column("organization_id", String, nullable=False),
    Column("github_revision", Integer, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    comment="Repositories, owned here",
)

branches = Table(
    "branches",
    metadata,
    Column("repository_id", String, primary_key=True),
    Column("name", String, primary_key=True),
    Column("payload", LargeBinary, nullable=False),
    comment="Cache of branches, as GitHub reported them through organization",
)

pull_requests = Table(
    "pull_requests",
    metadata,
    Column("repository_id", String, primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("payload", LargeBinary, nullable=False),
    comment="Cache of open pull requests, as GitHub reported them through organization",
)

task_index = Table(
    "task_index",
    metadata,
    Column("task_id", String, primary_key=True),
    Column("repository_id", String, nullable=False),
    Column("branch", String, nullable=False),
    Column("live", Boolean, nullable=False),
    Index("task_index_live_branch", "repository_id", "branch", unique=True, sqlite_where=text("live = 1")),
    comment="Coordinator index of task: task id to branch; at most one live task per branch",
)

task_details = index_table(
    "task_details",
    metadata,
    Column("repository_id", String, nullable=False),
    Column("organization_id", String, nullable=False),
    comment="Coordinator index of task: its workbench",
)

session_index = index_table("session_index", metadata, comment="Coordinator index of session: its metadata")

sandbox_index = index_table("sandbox_index", metadata, comment="Coordinator index of task: its sandboxes")

transcript_entries = index_table(
    "transcript_entries",
    metadata,
    Column("session_id", String, nullable=False),
    Column("position", Integer, nullable=False),
    Index("transcript_entries_position", "session_id", "position"),
    comment="Coordinator index of session: its transcript",
)

WATCHED = (
    IndexTable("task", task_details, Task),
    IndexTable("session", session_index, Session),
    IndexTable("sandbox", sandbox_index, Sandbox),
    IndexTable("transcript_entry", transcript_entries, TranscriptEntry),
)
