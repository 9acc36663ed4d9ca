"""What these tests need runs on SQLite and on PostgreSQL."""

from tests.support.databases import database, databases, postgres

__all__ = ["database", "databases", "postgres"]
