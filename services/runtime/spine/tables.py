"""The tables that every service has for the spine."""

from dataclasses import dataclass

from sqlalchemy import (
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
)
from sqlalchemy.schema import SchemaItem


@dataclass(frozen=True, slots=True)
class SpineTables:
    """Outbox, change sequences and request memory of one service."""

    outbox: Table
    change_sequences: Table
    requests: Table


def spine_tables(metadata: MetaData) -> SpineTables:
    """Define the spine's tables in a service's metadata."""
    outbox = Table(
        "outbox",
        metadata,
        Column("seq", Integer, primary_key=True, autoincrement=True),
        Column("destination", String, nullable=False),
        Column("type_url", String, nullable=False),
        Column("entity_id", String, nullable=False),
        Column("revision", Integer, nullable=False),
        Column("deleted", Boolean, nullable=False),
        Column("payload", LargeBinary, nullable=False),
        Column("mark_time", Float, nullable=False),
        Column("parked_reason", String, nullable=True),
        UniqueConstraint("destination", "type_url", "entity_id"),
        Index("outbox_pending", "destination", "seq"),
        sqlite_autoincrement=True,
        comment="What must leave the service: the newest state of each changed entity, once per destination",
    )
    change_sequences = Table(
        "change_sequences",
        metadata,
        Column("scope", String, primary_key=True),
        Column("value", Integer, nullable=False),
        Column("horizon", Integer, nullable=False),
        Column("epoch", String, nullable=False),
        comment="Last change number of each scope; taking it first makes the scope's writers take turns",
    )
    requests = Table(
        "requests",
        metadata,
        Column("caller", String, primary_key=True),
        Column("method", String, primary_key=True),
        Column("request_id", String, primary_key=True),
        Column("fingerprint", String, nullable=False),
        Column("response", LargeBinary, nullable=False),
        Column("create_time", Float, nullable=False),
        comment="First answers of commands, by the client's request id",
    )
    return SpineTables(outbox, change_sequences, requests)


def index_table(name: str, metadata: MetaData, *columns: SchemaItem, comment: str) -> Table:
    """Define a watched index table: the standard columns of the spine, then those that reads filter by.

    `scope` is what is watched as a whole (an organization, a task), `payload` the entity as its owner pushed it,
    `revision` the owner's number of that state, `change_seq` the scope's number of the change, `viewer_id` the one
    user who may see it (empty: everybody).
    """
    return Table(
        name,
        metadata,
        Column("id", String, primary_key=True),
        Column("scope", String, primary_key=True),
        Column("revision", Integer, nullable=False),
        Column("change_seq", Integer, nullable=False),
        Column("change_time", Float, nullable=False),
        Column("deleted", Boolean, nullable=False),
        Column("payload", LargeBinary, nullable=False),
        Column("viewer_id", String, nullable=False),
        Column("task_id", String, nullable=False),
        *columns,
        Index(f"{name}_changes", "scope", "change_seq"),
        comment=comment,
    )
