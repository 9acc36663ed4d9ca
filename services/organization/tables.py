"""Tables of the organization service: its own, and the index of everything below it."""

from branchline.v1.history_pb2 import HistoryEvent
from branchline.v1.organizations_pb2 import GithubStatus, Member, Organization
from branchline.v1.repositories_pb2 import Repository
from branchline.v1.tasks_pb2 import TaskSummary
from branchline.v1.users_pb2 import UserTaskState
from branchline.v1.vocabulary_pb2 import (
    ENTITY_KIND_API_TOKEN,
    ENTITY_KIND_GITHUB_STATUS,
    ENTITY_KIND_HISTORY_EVENT,
    ENTITY_KIND_MEMBER,
    ENTITY_KIND_ORGANIZATION,
    ENTITY_KIND_REPOSITORY,
    ENTITY_KIND_TASK,
    ENTITY_KIND_USER,
    ENTITY_KIND_USER_TASK_STATE,
)
from sqlalchemy import (
    BigInteger,
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
)

from services.runtime.database.indexes import partial_index
from services.runtime.spine.index import IndexTable, UnwatchedIndex
from services.runtime.spine.tables import add_spine_tables, index_table

metadata = MetaData()
add_spine_tables(metadata, coordinator=True, commands=True)


def _partial(table: Table, name: str, *columns: str, where: ColumnElement[bool], unique: bool = False) -> None:
    """Add an index of some rows alone."""
    found = [table.c[column] for column in columns]
    partial_index(f"{table.name}_{name}", *found, unique=unique, where=where)


organizations = index_table(
    "organizations",
    metadata,
    Column("slug", String, nullable=False),
    Column("github_login", String, nullable=False),
    Column("deleting", Boolean, nullable=False),
    comment="Organizations, owned here; watched like an index. The GitHub login is in lower case",
)
_partial(organizations, "slug", "slug", where=organizations.c.deleted.is_(False), unique=True)
_partial(
    organizations,
    "github_login",
    "github_login",
    where=organizations.c.deleted.is_(False) & (organizations.c.github_login != ""),
    unique=True,
)
_partial(organizations, "deleting", "id", where=organizations.c.deleting.is_(True))

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
_partial(repositories, "url", "scope", "remote_url", where=repositories.c.deleted.is_(False), unique=True)
_partial(repositories, "name", "scope", "full_name", "id", where=repositories.c.deleted.is_(False))

repository_deletions = Table(
    "repository_deletions",
    metadata,
    Column("repository_id", String, primary_key=True),
    Column("organization_id", String, nullable=False),
    Column("request_time", Float, nullable=False),
    Column("gone", Boolean, nullable=False),
    Index("repository_deletions_gone", "gone"),
    comment="Repositories being deleted; gone once the repository says so, while what was indexed below it is removed",
)

teardowns = Table(
    "teardowns",
    metadata,
    Column("organization_id", String, primary_key=True),
    Column("child", String, primary_key=True),
    Column("done", Boolean, nullable=False),
    comment="What the children of an organization that is being deleted were told to forget, and whether they did",
)

github_repositories = Table(
    "github_repositories",
    metadata,
    Column("organization_id", String, primary_key=True),
    Column("github_id", BigInteger, primary_key=True),
    Column("repository_id", String, nullable=False),
    Index("github_repositories_repository", "repository_id"),
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
    Column("title", String().with_variant(String(collation="C"), "postgresql"), nullable=False),
    Column("branch", String, nullable=False),
    Column("status", Integer, nullable=False),
    Column("ended", Boolean, nullable=False),
    Column("owner_user_id", String, nullable=False),
    Column("has_pull_request", Boolean, nullable=False),
    Column("create_time", Float, nullable=False),
    Column("update_time", Float, nullable=False),
    comment="Coordinator index of task: the sidebar. Archived and killed tasks are flagged as ended",
)
_alive = task_summaries.c.deleted.is_(False)
for _order in ("update_time", "create_time", "title"):
    _partial(task_summaries, _order, "scope", "ended", _order, "id", where=_alive)
_partial(task_summaries, "repository", "scope", "repository_id", "ended", "update_time", "id", where=_alive)
_partial(task_summaries, "shown", "scope", "ended", "change_seq", where=_alive)

users = Table(
    "users",
    metadata,
    Column("id", String, primary_key=True),
    Column("revision", BigInteger, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    comment="Coordinator index of user: profiles and preferences",
)

auth_session_index = Table(
    "auth_session_index",
    metadata,
    Column("token_id", String, primary_key=True),
    Column("token_hash", String, nullable=False, unique=True),
    Column("user_id", String, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("expire_time", Float, nullable=True),
    Column("revoked", Boolean, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    Index("auth_session_index_user", "user_id", "token_id"),
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
    Column("sequence", BigInteger, nullable=False),
    Column("event_time", Float, nullable=False),
    Column("event_kind", Integer, nullable=False),
    Column("actor_user_id", String, nullable=False),
    Column("repository_id", String, nullable=False),
    Column("branch", String, nullable=False),
    Index("history_feed_sequence", "scope", "sequence"),
    Index("history_feed_task", "scope", "task_id", "sequence"),
    Index("history_feed_repository", "scope", "repository_id", "sequence"),
    Index("history_feed_time", "scope", "event_time"),
    comment="Coordinator index of history: the feed within the retention window",
)

github_status = index_table(
    "github_status",
    metadata,
    comment="Coordinator index of github-data: connection and synchronisation",
)

HISTORY_SNAPSHOT_EVENTS = 200

WATCHED = (
    IndexTable(ENTITY_KIND_ORGANIZATION, organizations, Organization),
    IndexTable(ENTITY_KIND_MEMBER, members, Member),
    IndexTable(ENTITY_KIND_REPOSITORY, repositories, Repository),
    IndexTable(
        ENTITY_KIND_TASK,
        task_summaries,
        TaskSummary,
        shown=task_summaries.c.ended.is_(False),
        moving=("branch", "status", "has_pull_request", "update_time"),
    ),
    IndexTable(ENTITY_KIND_GITHUB_STATUS, github_status, GithubStatus),
    IndexTable(ENTITY_KIND_USER_TASK_STATE, user_task_states, UserTaskState),
)
HISTORY = IndexTable(ENTITY_KIND_HISTORY_EVENT, history_feed, HistoryEvent, snapshot_limit=HISTORY_SNAPSHOT_EVENTS)

UNWATCHED = (
    UnwatchedIndex(ENTITY_KIND_USER, users.c.id, users.c.id),
    UnwatchedIndex(ENTITY_KIND_API_TOKEN, auth_session_index.c.token_id, auth_session_index.c.user_id),
)
"""Index tables that are not watched; consistency tokens may name what they hold."""
