"""Tables of the github-data service."""

from sqlalchemy import BigInteger, Column, LargeBinary, MetaData, String, Table

from services.runtime.spine.tables import add_spine_tables

metadata = MetaData()
add_spine_tables(metadata)

accounts = Table(
    "accounts",
    metadata,
    Column("organization_id", String, primary_key=True),
    Column("github_login", String, nullable=False),
    Column("wishes", BigInteger, nullable=False),
    Column("fulfilled", BigInteger, nullable=False),
    Column("status", LargeBinary, nullable=False),
    comment="GitHub account of each organization, how often it was wished to be read and which wish that was, and how "
    "its cache stands",
)

github_repositories = Table(
    "github_repositories",
    metadata,
    Column("organization_id", String, primary_key=True),
    Column("github_id", BigInteger, primary_key=True),
    Column("revision", BigInteger, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    comment="Repositories with branches and open pull requests, as GitHub last reported them",
)
