"""The migrations of every service lead to the tables that its code expects."""

import importlib
from pathlib import Path

import pytest
from alembic import command

from services.runtime.migrations import migrate, migration_config

SERVICES = ["organization", "user", "github_data", "history", "repository", "task", "sandbox"]
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("service", SERVICES)
def test_migrations_lead_to_the_tables(service: str, tmp_path: Path) -> None:
    scripts, path = ROOT / "services" / service / "migrations", tmp_path / "database.sqlite"
    migrate(scripts, path)

    command.check(migration_config(scripts, path))


@pytest.mark.parametrize("service", SERVICES)
def test_every_table_says_what_it_is_and_every_index_table_is_in_the_document(service: str) -> None:
    tables = importlib.import_module(f"services.{service}.tables").metadata.tables.values()
    document = (ROOT / "docs" / "coordinators.md").read_text()

    assert all(table.comment for table in tables)
    for table in tables:
        if table.comment.startswith("Coordinator index of "):
            assert f"`{table.name}`" in document
