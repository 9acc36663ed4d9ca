"""Tables of the organization service: its own, and the index of everything below it."""

from branchline.resource.v1.history_pb2 import HistoryEvent
from branchline.resource.v1.organization_pb2 import GithubStatus, Member, Organization
from branchline.resource.v1.repository_pb2 import Repository
from branchline.resource.v1.task_pb2 import Task
from branchline.resource.v1.user_pb2 import UserTaskState
from sqlalchemy import Boolean, Column, Float, Index, Integer, LargeBinary, MetaData, String, Table

from services.runtime.spine.index import IndexTable
from services.runtime.spine.tables import index_table, spine_tables

metadata = MetaData()
spine = spine_tables(metadata)

organizations = index_table(
    "organizations",
    metadata,
    Column("slug", String, nullable=False, unique=True),
    comment="Organizations, owned here; watched like an index",
)

members = index_table(
    "members",
    metadata,
    Column("role", Integer, nullable=False),
    Column("user_id", String, nullable=False),
    Index("members_user", "user_id"),
    comment="Members and their roles, owned here; watched like an index",
)

repositories = index_table(
    "repositories",
    metadata,
    Column("full_name", String, nullable=False),
    Column("remote_url", String, nullable=False),
    comment="Coordinator index of repository: the repository catalogue",
)

github_repositories = Table(
    "github_repositories",
    metadata,
    Column("organization_id", String, primary_key=True),
    Column("github_id", Integer, primary_key=True),
    Column("repository_id", String, nullable=False),
    comment="Coordinator index of github-data: GitHub's repository id to ours",
)

task_lookup = Table(
    "task_lookup",
    metadata,
    Column("task_id", String, primary_key=True),
    Column("organization_id", String, nullable=False),
    Column("repository_id", String, nullable=False),
    comment="Coordinator index of task: task id to repository id, for routing",
)

task_summaries = index_table(
    "task_summaries",
    metadata,
    Column("repository_id", String, nullable=False),
    Column("title", String, nullable=False),
    Column("branch", String, nullable=False),
    Column("status", Integer, nullable=False),
    Column("owner_user_id", String, nullable=False),
    Column("has_pull_request", Boolean, nullable=False),
    Column("create_time", Float, nullable=False),
    Column("update_time", Float, nullable=False),
    Index("task_summaries_recent", "scope", "status", "update_time"),
    comment="Coordinator index of task: the sidebar",
)

users = Table(
    "users",
    metadata,
    Column("user_id", String, primary_key=True),
    Column("revision", Integer, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    comment="Coordinator index of user: profiles and preferences",
)

auth_session_index = Table(
    "auth_session_index",
    metadata,
    Column("token_hash", String, primary_key=True),
    Column("token_id", String, nullable=False, unique=True),
    Column("user_id", String, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("expire_time", Float, nullable=True),
    Column("revoked", Boolean, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    Index("auth_session_index_user", "user_id"),
    comment="Coordinator index of user: token hash to user id",
)

auth_email_index = Table(
    "auth_email_index",
    metadata,
    Column("email", String, primary_key=True),
    Column("user_id", String, nullable=False),
    comment="Coordinator index of user: e-mail address to user id",
)

auth_account_index = Table(
    "auth_account_index",
    metadata,
    Column("provider", String, primary_key=True),
    Column("account_id", String, primary_key=True),
    Column("user_id", String, nullable=False),
    comment="Coordinator index of user: OAuth account to user id",
)

user_task_states = index_table(
    "user_task_states",
    metadata,
    comment="Coordinator index of user: each user's own drafts, unread marks and open tabs",
)

history_feed = index_table(
    "history_feed",
    metadata,
    Column("sequence", Integer, nullable=False),
    Column("event_time", Float, nullable=False),
    Column("event_kind", String, nullable=False),
    Column("actor_user_id", String, nullable=False),
    Column("repository_id", String, nullable=False),
    Column("branch", String, nullable=False),
    Index("history_feed_sequence", "scope", "sequence"),
    comment="Coordinator index of history: the feed within the retention window",
)

github_status = index_table(
    "github_status",
    metadata,
    comment="Coordinator index of github-data: connection and synchronisation",
)

HISTORY_SNAPSHOT_EVENTS = 200

WATCHED = (
    IndexTable("organization", organizations, Organization),
    IndexTable("member", members, Member),
    IndexTable("repository", repositories, Repository),
    IndexTable("task", task_summaries, Task),
    IndexTable("github_status", github_status, GithubStatus),
    IndexTable("user_task_state", user_task_states, UserTaskState),
)
HISTORY = IndexTable("history_event", history_feed, HistoryEvent, snapshot_limit=HISTORY_SNAPSHOT_EVENTS)

UNWATCHED = {"user": users.c.user_id, "api_token": auth_session_index.c.token_id}
"""Id columns of index tables that are not watched; consistency tokens may name what they hold."""
