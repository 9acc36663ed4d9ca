import sqlite3
from pathlib import Path

import pytest
from sqlalchemy import Column, Index, MetaData, String, Table, create_engine, select

from services.runtime.database import Statement, is_in

notes = Table("notes", MetaData(), Column("id", String, primary_key=True), Column("title", String), Index("t", "title"))


@pytest.mark.parametrize("column", [notes.c.id, notes.c.title])
def test_a_list_of_values_is_looked_up_in_the_index(tmp_path: Path, column: Column[str]) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'notes.sqlite'}")
    notes.metadata.create_all(engine)
    statement = Statement(select(notes).where(is_in(column, "wanted"))).sqlite
    connection = sqlite3.connect(tmp_path / "notes.sqlite")

    plan = connection.execute(f"EXPLAIN QUERY PLAN {statement.text}", statement.values({"wanted": ["a", "b"]}))

    assert plan.fetchone()[3].startswith("SEARCH notes USING")
