"""Tables of the repository service: its own, the caches of GitHub, and the index of its tasks."""

from collections.abc import Sequence

from branchline.v1.common_pb2 import (
    ENTITY_KIND_INPUT_REQUEST,
    ENTITY_KIND_PROCESS,
    ENTITY_KIND_QUEUED_MESSAGE,
    ENTITY_KIND_SANDBOX,
    ENTITY_KIND_SESSION,
    ENTITY_KIND_TASK,
    ENTITY_KIND_TRANSCRIPT_ENTRY,
)
from branchline.v1.processes_pb2 import Process
from branchline.v1.sandboxes_pb2 import Sandbox
from branchline.v1.sessions_pb2 import QueuedMessage, Session
from branchline.v1.tasks_pb2 import Task
from branchline.v1.transcripts_pb2 import InputRequest, TranscriptEntry
from google.protobuf.message import Message
from sqlalchemy import (
    BigInteger,
    BindParameter,
    Boolean,
    Column,
    ColumnElement,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    bindparam,
    exists,
    func,
    or_,
    select,
    text,
)

from services.runtime.database import is_in
from services.runtime.database.indexes import partial_index
from services.runtime.spine.hub import Kind
from services.runtime.spine.index import IndexTable
from services.runtime.spine.tables import add_spine_tables, index_table

metadata = MetaData()
add_spine_tables(metadata, coordinator=True, commands=True)

repositories = Table(
    "repositories",
    metadata,
    Column("id", String, primary_key=True),
    Column("organization_id", String, nullable=False),
    Column("deleting", Boolean, nullable=False),
    Column("activity_time", Float, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("github_revision", BigInteger, nullable=False, server_default="0"),
    Column("payload", LargeBinary, nullable=False),
    partial_index("repositories_deleting", "id", where=text("deleting")),
    comment="Repositories, owned here",
)

deleted_repositories = Table(
    "deleted_repositories",
    metadata,
    Column("id", String, primary_key=True),
    Column("delete_time", Float, nullable=False),
    Index("deleted_repositories_time", "delete_time"),
    comment="Repositories that are gone, for a week: what was sent before and comes late does not bear them again",
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
    Column("gone", Boolean, nullable=False),
    Column("told_time", Float, nullable=False),
    Index("task_index_repository", "repository_id"),
    partial_index("task_index_live_branch", "repository_id", "branch", unique=True, where=text("live")),
    partial_index("task_index_gone", "task_id", where=text("gone")),
    comment="Coordinator index of task: task id to branch; at most one live task per branch. `live`: it holds the "
    "branch; `gone`: its owner deleted it, its details are being buried; `told_time`: when it was told to go",
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

queued_message_index = index_table(
    "queued_message_index",
    metadata,
    Column("place", Integer, nullable=False),
    comment="Coordinator index of task: messages that wait",
)

input_request_index = index_table(
    "input_request_index", metadata, comment="Coordinator index of session: what its agent waits for"
)

process_index = index_table("process_index", metadata, comment="Coordinator index of process: state and last output")

transcript_entries = index_table(
    "transcript_entries",
    metadata,
    Column("session_id", String, nullable=False),
    Column("position", BigInteger, nullable=False),
    Index("transcript_entries_position", "session_id", "position"),
    comment="Coordinator index of session: its transcript",
)


def _of_organizations_task(table: Table, organization_id: BindParameter[str]) -> ColumnElement[bool]:
    """Say whether a row, whose scope is its task, is an organization's."""
    tasks = task_details.alias("owner")
    return exists().where(tasks.c.id == table.c.scope, tasks.c.organization_id == organization_id)


TASKS = IndexTable(ENTITY_KIND_TASK, task_details, Task, within=_of_organizations_task)


def _part(kind: Kind, table: Table, resource: type[Message], identity: Sequence[str] = ("id", "task_id")) -> IndexTable:
    return IndexTable(kind, table, resource, within=_of_organizations_task, identity=identity)


SESSIONS = _part(ENTITY_KIND_SESSION, session_index, Session)
SANDBOXES = _part(ENTITY_KIND_SANDBOX, sandbox_index, Sandbox)
QUEUED = _part(ENTITY_KIND_QUEUED_MESSAGE, queued_message_index, QueuedMessage, ("id", "task_id", "session_id"))
INPUT_REQUESTS = _part(ENTITY_KIND_INPUT_REQUEST, input_request_index, InputRequest, ("id", "task_id", "session_id"))
PROCESSES = _part(ENTITY_KIND_PROCESS, process_index, Process)
TRANSCRIPT = _part(
    ENTITY_KIND_TRANSCRIPT_ENTRY, transcript_entries, TranscriptEntry, ("id", "task_id", "session_id", "position")
)
WATCHED = (TASKS, SESSIONS, SANDBOXES, QUEUED, INPUT_REQUESTS, PROCESSES, TRANSCRIPT)

_newer = transcript_entries.alias("newer")
TAIL = TRANSCRIPT.narrowed(
    or_(bindparam("any_session", type_=Boolean), is_in(transcript_entries.c.session_id, "sessions")),
    transcript_entries.c.position
    > select(func.max(_newer.c.position))
    .where(_newer.c.session_id == transcript_entries.c.session_id)
    .scalar_subquery()
    - bindparam("tail", type_=Integer),
)
"""A snapshot of transcripts: the newest `tail` entries of each session, of all or of some sessions."""
