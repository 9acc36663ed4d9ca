"""Tables of the organization service: its own, and the index of everything below it."""

from branchline.v1.agents_pb2 import Agent
from branchline.v1.common_pb2 import (
    ENTITY_KIND_AGENT,
    ENTITY_KIND_API_TOKEN,
    ENTITY_KIND_DRAFT,
    ENTITY_KIND_GITHUB_STATUS,
    ENTITY_KIND_HISTORY_EVENT,
    ENTITY_KIND_INPUT_REQUEST,
    ENTITY_KIND_MEMBER,
    ENTITY_KIND_ORGANIZATION,
    ENTITY_KIND_REPOSITORY,
    ENTITY_KIND_SECRET,
    ENTITY_KIND_TASK,
    ENTITY_KIND_USER,
    ENTITY_KIND_USER_TASK_STATE,
)
from branchline.v1.history_pb2 import HistoryEvent
from branchline.v1.organizations_pb2 import GithubStatus, Member, Organization
from branchline.v1.repositories_pb2 import Repository
from branchline.v1.tasks_pb2 import TaskSummary
from branchline.v1.transcripts_pb2 import INPUT_REQUEST_STATE_PENDING, InputRequest
from branchline.v1.users_pb2 import UserTaskState
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

ORDERED = String().with_variant(String(collation="C"), "postgresql")
"""A text by which lists are ordered, the same way in every database."""


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
    Column("name_key", ORDERED, nullable=False),
    Index("members_user", "user_id"),
    comment="Members and their roles, owned here; watched like an index",
)

_partial(members, "name", "scope", "name_key", "user_id", where=members.c.deleted.is_(False))

repositories = index_table(
    "repositories",
    metadata,
    Column("display_name", String, nullable=False),
    Column("remote_url", String, nullable=False),
    comment="Coordinator index of repository: the repository catalogue",
)
_partial(repositories, "url", "scope", "remote_url", where=repositories.c.deleted.is_(False), unique=True)
_partial(repositories, "name", "scope", "display_name", "id", where=repositories.c.deleted.is_(False))

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
    Column("title", ORDERED, nullable=False),
    Column("search", String, nullable=False),
    Column("state", Integer, nullable=False),
    Column("activity", Integer, nullable=False),
    Column("ended", Boolean, nullable=False),
    Column("owner_user_id", String, nullable=False),
    Column("has_pull_request", Boolean, nullable=False),
    Column("create_time", Float, nullable=False),
    Column("update_time", Float, nullable=False),
    comment="Coordinator index of task: the sidebar. The ended are flagged, `search` is in no case",
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
    comment="Coordinator index of user: each user's own unread marks and open tabs",
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

agents = index_table(
    "agents",
    metadata,
    comment="Catalogue of agents, owned here, merged from what sandboxes report; watched like an index",
)

sandbox_providers = Table(
    "sandbox_providers",
    metadata,
    Column("organization_id", String, primary_key=True),
    Column("names", String, nullable=False),
    comment="Providers of sandboxes as they were last reported, with spaces between",
)

input_requests = index_table(
    "input_requests",
    metadata,
    Column("session_id", String, nullable=False),
    Column("state", Integer, nullable=False),
    Column("create_time", Float, nullable=False),
    Index("input_requests_task", "task_id"),
    comment="Coordinator index of task: what agents wait for",
)
_partial(input_requests, "order", "scope", "state", "create_time", "id", where=input_requests.c.deleted.is_(False))

invitations = Table(
    "invitations",
    metadata,
    Column("id", String, primary_key=True),
    Column("organization_id", String, nullable=False),
    Column("code_hash", String, nullable=False, unique=True),
    Column("expire_time", Float, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    Index("invitations_organization", "organization_id", "id"),
    Index("invitations_expire_time", "expire_time"),
    comment="Invitations that were neither accepted nor withdrawn: hashes of their codes only",
)

secrets = Table(
    "secrets",
    metadata,
    Column("id", String, primary_key=True),
    Column("user_id", String, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("deleted", Boolean, nullable=False),
    Column("change_time", Float, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    Index("secrets_user", "user_id", "id"),
    comment="Coordinator index of user: secrets without their values",
)
_partial(secrets, "deleted", "change_time", where=secrets.c.deleted.is_(True))

drafts = Table(
    "drafts",
    metadata,
    Column("id", String, primary_key=True),
    Column("user_id", String, nullable=False),
    Column("task_id", String, nullable=False),
    Column("organization_id", String, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("deleted", Boolean, nullable=False),
    Column("change_time", Float, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    Index("drafts_task", "task_id"),
    Index("drafts_organization", "organization_id"),
    comment="Coordinator index of user: what each user has half written",
)
_partial(drafts, "deleted", "change_time", where=drafts.c.deleted.is_(True))

blobs = Table(
    "blobs",
    metadata,
    Column("id", String, primary_key=True),
    Column("organization_id", String, nullable=False),
    Column("creator_id", String, nullable=False),
    Column("sha256", String, nullable=False),
    Column("charged_bytes", BigInteger, nullable=False),
    Column("complete", Boolean, nullable=False),
    Column("named", Boolean, nullable=False),
    Column("deleted", Boolean, nullable=False),
    Column("touch_time", Float, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    comment="Blobs, owned here; their bytes are in the object store, and go before the row of a deleted one does",
)
_partial(blobs, "digest", "organization_id", "sha256", where=blobs.c.deleted.is_(False))
_partial(blobs, "uploading", "organization_id", "creator_id", where=blobs.c.complete.is_(False))
_partial(blobs, "unnamed", "touch_time", "id", where=blobs.c.named.is_(False))

blob_claims = Table(
    "blob_claims",
    metadata,
    Column("task_id", String, primary_key=True),
    Column("draft_id", String, primary_key=True),
    Column("blob_id", String, primary_key=True),
    Column("organization_id", String, nullable=False),
    Column("claim_time", Float, nullable=False),
    Column("confirmed", Boolean, nullable=False),
    Index("blob_claims_blob", "blob_id"),
    Index("blob_claims_organization", "organization_id"),
    comment="Which tasks, and which drafts of them, name which blobs. Unconfirmed: the task was not heard of yet",
)
_partial(blob_claims, "unconfirmed", "claim_time", where=blob_claims.c.confirmed.is_(False))

blob_releases = Table(
    "blob_releases",
    metadata,
    Column("task_id", String, primary_key=True),
    comment="Tasks that are gone, and whose claims are still to be dropped",
)

blob_usage = Table(
    "blob_usage",
    metadata,
    Column("organization_id", String, primary_key=True),
    Column("charged_bytes", BigInteger, nullable=False),
    comment="What the blobs of an organization count against its quota",
)

HISTORY_SNAPSHOT_EVENTS = 200

TASKS = IndexTable(
    ENTITY_KIND_TASK,
    task_summaries,
    TaskSummary,
    identity=("id", "organization_id", "repository_id"),
    shown=(task_summaries.c.ended, False),
    moving=("search", "state", "activity", "has_pull_request", "update_time"),
)

WATCHED = (
    IndexTable(ENTITY_KIND_ORGANIZATION, organizations, Organization),
    IndexTable(ENTITY_KIND_MEMBER, members, Member, identity=("organization_id", "user_id")),
    IndexTable(ENTITY_KIND_REPOSITORY, repositories, Repository, identity=("id", "organization_id")),
    TASKS,
    IndexTable(ENTITY_KIND_AGENT, agents, Agent, identity=("organization_id", "id")),
    IndexTable(
        ENTITY_KIND_INPUT_REQUEST,
        input_requests,
        InputRequest,
        identity=("id", "organization_id", "task_id", "session_id"),
        shown=(input_requests.c.state, INPUT_REQUEST_STATE_PENDING),
    ),
    IndexTable(ENTITY_KIND_GITHUB_STATUS, github_status, GithubStatus, identity=("organization_id",)),
    IndexTable(
        ENTITY_KIND_USER_TASK_STATE,
        user_task_states,
        UserTaskState,
        identity=("organization_id", "user_id", "task_id", "session_id"),
    ),
)
HISTORY = IndexTable(ENTITY_KIND_HISTORY_EVENT, history_feed, HistoryEvent, snapshot_limit=HISTORY_SNAPSHOT_EVENTS)

UNWATCHED = (
    UnwatchedIndex(ENTITY_KIND_USER, users.c.id, users.c.id),
    UnwatchedIndex(ENTITY_KIND_API_TOKEN, auth_session_index.c.token_id, auth_session_index.c.user_id),
    UnwatchedIndex(ENTITY_KIND_SECRET, secrets.c.id, secrets.c.user_id),
    UnwatchedIndex(ENTITY_KIND_DRAFT, drafts.c.id, drafts.c.user_id),
)
"""Index tables that are not watched; consistency tokens may name what they hold."""
