"""Tables of the user service."""

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
    UniqueConstraint,
    bindparam,
    or_,
)

from services.runtime.database.indexes import partial_index
from services.runtime.spine.tables import add_spine_tables

metadata = MetaData()
add_spine_tables(metadata, commands=True)

users = Table(
    "users",
    metadata,
    Column("id", String, primary_key=True),
    Column("email", String, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    comment="People and what they prefer",
)
partial_index("users_email", users.c.email, unique=True, where=users.c.email != "")

api_tokens = Table(
    "api_tokens",
    metadata,
    Column("id", String, primary_key=True),
    Column("user_id", String, nullable=False),
    Column("token_hash", String, nullable=False, unique=True),
    Column("revoke_time", Float, nullable=True),
    Column("payload", LargeBinary, nullable=False),
    Index("api_tokens_user", "user_id"),
    comment="API tokens: hashes only",
)

secrets = Table(
    "secrets",
    metadata,
    Column("id", String, primary_key=True),
    Column("user_id", String, nullable=False),
    Column("target", String, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("value_encrypted", LargeBinary, nullable=True),
    Column("payload", LargeBinary, nullable=False),
    UniqueConstraint("user_id", "target", name="secrets_target"),
    comment="Secrets of people; their values encrypted with the key file of the service",
)

task_states = Table(
    "user_task_states",
    metadata,
    Column("user_id", String, primary_key=True),
    Column("task_id", String, primary_key=True),
    Column("session_id", String, primary_key=True),
    Column("organization_id", String, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("deleted", Boolean, nullable=False),
    Column("change_time", Float, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    Index("user_task_states_organization", "organization_id", "task_id", "user_id"),
    comment="What each user has open and unread. A forgotten one stays for a week, for its revision",
)
partial_index("user_task_states_forgotten", task_states.c.change_time, where=task_states.c.deleted.is_(True))

drafts = Table(
    "drafts",
    metadata,
    Column("user_id", String, primary_key=True),
    Column("task_id", String, primary_key=True),
    Column("session_id", String, primary_key=True),
    Column("organization_id", String, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("size_bytes", Integer, nullable=False),
    Column("deleted", Boolean, nullable=False),
    Column("change_time", Float, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    Index("drafts_organization", "organization_id", "task_id", "user_id"),
    comment="What each user has half written. A forgotten one stays for a week, for its revision",
)
partial_index("drafts_forgotten", drafts.c.change_time, where=drafts.c.deleted.is_(True))

applied_events = Table(
    "applied_events",
    metadata,
    Column("event_id", String, primary_key=True),
    Column("apply_time", Float, nullable=False),
    Index("applied_events_apply_time", "apply_time"),
    comment="Events that have marked tasks unread, so that each does so once; for a week",
)


def any_or(column: Column[str], name: str) -> ColumnElement[bool]:
    """Say whether a column has a parameter's value; every one has where that is empty."""
    given = bindparam(name, type_=String)
    return or_(given == "", column == given)
