"""The tables that services have for the spine: each takes those it uses."""

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
)
from sqlalchemy.schema import SchemaItem

_metadata = MetaData()

outbox = Table(
    "outbox",
    _metadata,
    Column("destination", String, primary_key=True),
    Column("entity_id", String, primary_key=True),
    Column("type_url", String, primary_key=True),
    Column("seq", BigInteger, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("deleted", Boolean, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    Column("mark_time", Float, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("parked_reason", String, nullable=False),
    Index("outbox_pending", "destination", "parked_reason", "seq"),
    comment="What must leave the service: the newest state of each changed entity, once per destination",
)

change_sequences = Table(
    "change_sequences",
    _metadata,
    Column("scope", String, primary_key=True),
    Column("value", BigInteger, nullable=False),
    Column("horizon", BigInteger, nullable=False),
    comment="Last change number of each scope; taking it first makes the scope's writers take turns",
)

incarnations = Table(
    "incarnations",
    _metadata,
    Column("number", Integer, primary_key=True),
    Column("epoch", String, nullable=False),
    comment="Identity of this database: a rebuilt one has another, and its change numbers mean something else",
)

requests = Table(
    "requests",
    _metadata,
    Column("caller", String, primary_key=True),
    Column("method", String, primary_key=True),
    Column("request_id", String, primary_key=True),
    Column("fingerprint", String, nullable=False),
    Column("response", LargeBinary, nullable=False),
    Column("create_time", Float, nullable=False),
    Index("requests_create_time", "create_time"),
    comment="First answers of commands, by the client's request id, for a week",
)


def add_spine_tables(metadata: MetaData, *, coordinator: bool = False, commands: bool = False) -> None:
    """Add the spine's tables to a service's metadata: the outbox, and what its role needs."""
    wanted = [outbox]
    wanted += [change_sequences, incarnations] if coordinator else []
    wanted += [requests] if commands else []
    for table in wanted:
        table.to_metadata(metadata)


def index_table(name: str, metadata: MetaData, *columns: SchemaItem, comment: str) -> Table:
    """Define a watched index table: the standard columns of the spine, then those that reads filter by.

    `scope` is what is watched as a whole (an organization, a task), `payload` the entity as its owner pushed it,
    `revision` the owner's number of that state, `change_seq` the scope's number of the change, `viewer_id` the one
    user who may see it (empty: everybody).
    """
    return Table(
        name,
        metadata,
        Column("scope", String, primary_key=True),
        Column("id", String, primary_key=True),
        Column("revision", BigInteger, nullable=False),
        Column("change_seq", BigInteger, nullable=False),
        Column("change_time", Float, nullable=False),
        Column("deleted", Boolean, nullable=False),
        Column("payload", LargeBinary, nullable=False),
        Column("viewer_id", String, nullable=False),
        Column("task_id", String, nullable=False),
        *columns,
        Index(f"{name}_changes", "scope", "change_seq"),
        Index(f"{name}_id", "id"),
        comment=comment,
    )
