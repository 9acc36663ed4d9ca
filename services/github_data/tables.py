"""Tables of the github-data service."""

from sqlalchemy import Boolean, Column, Integer, LargeBinary, MetaData, String, Table

from services.runtime.spine.tables import spine_tables

metadata = MetaData()
spine = spine_tables(metadata)

accounts = Table(
    "accounts",
    metadata,
    Column("organization_id", String, primary_key=True),
    Column("github_login", String, nullable=False),
    Column("sync_wanted", Boolean, nullable=False),
    Column("status", LargeBinary, nullable=False),
    comment="GitHub account of each organization, and how its cache stands",
)

github_repositories = Table(
    "github_repositories",
    metadata,
    Column("organization_id", String, primary_key=True),
    Column("github_id", Integer, primary_key=True),
    Column("payload", LargeBinary, nullable=False),
    comment="Repositories with branches and open pull requests, as GitHub last reported them",
)
