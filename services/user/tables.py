"""Tables of the user service."""

from sqlalchemy import Column, Float, Index, Integer, LargeBinary, MetaData, String, Table

from services.runtime.spine.tables import spine_tables

metadata = MetaData()
spine = spine_tables(metadata)

users = Table(
    "users",
    metadata,
    Column("id", String, primary_key=True),
    Column("revision", Integer, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    comment="People and what they prefer",
)

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

git_credentials = Table(
    "git_credentials",
    metadata,
    Column("user_id", String, primary_key=True),
    Column("host", String, primary_key=True),
    Column("username", String, nullable=False),
    Column("secret_encrypted", LargeBinary, nullable=False),
    comment="Git credentials, encrypted with the key file of the service",
)

user_task_states = Table(
    "user_task_states",
    metadata,
    Column("user_id", String, primary_key=True),
    Column("task_id", String, primary_key=True),
    Column("session_id", String, primary_key=True),
    Column("revision", Integer, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    comment="What each user has open, unread and half written",
)

applied_events = Table(
    "applied_events",
    metadata,
    Column("event_id", String, primary_key=True),
    Column("apply_time", Float, nullable=False),
    comment="Events that have marked tasks unread, so that each does so once",
)
