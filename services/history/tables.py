"""Tables of the history service."""

from sqlalchemy import BigInteger, Column, LargeBinary, MetaData, String, Table, UniqueConstraint

from services.runtime.spine.tables import add_spine_tables

metadata = MetaData()
add_spine_tables(metadata)

events = Table(
    "events",
    metadata,
    Column("id", String, primary_key=True),
    Column("organization_id", String, nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    UniqueConstraint("organization_id", "sequence"),
    comment="The feed: append-only, numbered within the organization",
)

feeds = Table(
    "feeds",
    metadata,
    Column("organization_id", String, primary_key=True),
    Column("last_sequence", BigInteger, nullable=False),
    comment="Last number given in each organization's feed",
)
