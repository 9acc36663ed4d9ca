"""Indexes of some rows only, on both databases.

SQLAlchemy loads a dialect with the first index that has options of it: 6 MB for a process that never talks to such a
server. So PostgreSQL's condition is added where tables are made.
"""

from typing import Any

from sqlalchemy import Connection, Index, MetaData, event

_CONDITION = "where"


def partial_index(name: str, *columns: Any, where: Any, sqlite_where: Any = None, unique: bool = False) -> Index:
    """Return an index of the rows of which a condition is true; SQLite may need it in other words."""
    condition = where if sqlite_where is None else sqlite_where
    return Index(name, *columns, unique=unique, sqlite_where=condition, info={_CONDITION: where})


def add_conditions(metadata: MetaData) -> None:
    """Add PostgreSQL's conditions."""
    for table in metadata.tables.values():
        for index in table.indexes:
            if _CONDITION in index.info:
                index.dialect_kwargs["postgresql_where"] = index.info[_CONDITION]


def _before_create(metadata: MetaData, connection: Connection, **_: Any) -> None:
    if connection.dialect.name == "postgresql":
        add_conditions(metadata)


event.listen(MetaData, "before_create", _before_create)
