"""Tables of the history service."""

from sqlalchemy import Column, Integer, LargeBinary, MetaData, String, Table, UniqueConstraint

from services.runtime.spine.tables import spine_tables

metadata = MetaData()
spine = spine_tables(metadata)

events = Table(
    "events",
    metadata,
    Column("id", String, primary_key=True),
    Column("organization_id", String, nullable=False),
    Column("sequence", Integer, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    UniqueConstraint("organization_id", "sequence"),
    comment="The feed: append-only, numbered within the organization",
)

feeds = Table(
    "feeds",
    metadata,
    Column("organization_id", String, primary_key=True),
    Column("last_sequence", Integer, nullable=False),
    comment="Last number given in each organization's feed",
)
