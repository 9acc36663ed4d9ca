"""The migrations of every service lead to the tables that its code expects, on SQLite and on PostgreSQL."""

import asyncio
import importlib
import re
import sqlite3
from contextlib import closing
from pathlib import Path

import psutil
import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import MetaData, create_engine
from sqlalchemy.exc import DBAPIError

from cli.installation import GATEWAY, ROOT, SERVICES, Installation, local_installation
from cli.settings import Settings
from services.runtime import migrations
from services.runtime.database import DatabaseUnavailable
from services.runtime.migrations import bring_up_to_date, migrate
from tests.support.databases import Databases, Server, look_into, tamper_with
from tests.support.edges import eventually

WAITING = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'advisory' AND query LIKE '%pg_advisory_lock%'"
OWNERS = [name for name in SERVICES if name != GATEWAY]


def tables_of(service: str) -> MetaData:
    return importlib.import_module(f"services.{service}.tables").metadata


@pytest.mark.parametrize("service", OWNERS)
def test_migrations_lead_to_the_tables(service: str, databases: Databases) -> None:
    url = databases.make(MetaData())
    migrate(ROOT / "services" / service / "migrations", url)

    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.connect() as connection:
        missing = compare_metadata(MigrationContext.configure(connection), tables_of(service))
    engine.dispose()

    assert missing == []


async def test_a_database_of_the_first_schema_is_brought_forward_with_what_it_holds(databases: Databases) -> None:
    folder, url = ROOT / "services" / "sandbox" / "migrations", databases.make(MetaData())
    migrate(folder, url, "0001")
    row = "INSERT INTO sandboxes (id, task_id, state, revision, payload) VALUES ('sbx_1', 'task_1', 1, 1, '')"
    tamper_with(url, row)
    with pytest.raises(DBAPIError):
        look_into(url, "SELECT remote_url FROM sandboxes")

    await bring_up_to_date({folder: url})

    assert look_into(url, "SELECT id, remote_url FROM sandboxes") == [("sbx_1", "")]


async def test_a_server_that_goes_away_before_the_scripts_run_is_only_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def old(*_: object) -> bool:
        return False

    monkeypatch.setattr(migrations, "_is_new", old)
    with pytest.raises(DatabaseUnavailable, match="No such file"):
        await bring_up_to_date({ROOT / "services" / "history" / "migrations": f"postgresql://x@/x?host={tmp_path}"})


async def test_a_start_that_is_cancelled_leaves_no_process_that_migrates(postgres: Server) -> None:
    """It waits for its turn behind another, which is at most a minute."""
    folder, url = ROOT / "services" / "history" / "migrations", postgres.create("of_two_turns")

    async def waiting() -> bool:
        return bool(look_into(url, WAITING))

    with psycopg.connect(url) as other:
        other.execute("SELECT pg_advisory_lock(hashtext('branchline migrations'))")
        starting = asyncio.create_task(bring_up_to_date({folder: url}))
        await eventually(waiting)
        starting.cancel()
        await asyncio.wait({starting})
        running = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
        assert not [child for child in running if "services.runtime.migrations" in child.cmdline()]


@pytest.fixture
def installation(tmp_path: Path) -> Installation:
    return local_installation(Settings(data_dir=tmp_path / "data"))


async def test_one_process_migrates_all_databases_and_none_when_nothing_is_new(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:  # item 7
    await bring_up_to_date(installation.databases())

    for url in installation.databases().values():
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as database:
            assert database.execute("SELECT count(*) FROM alembic_version").fetchall() == [(1,)]
    monkeypatch.setattr("sys.executable", "/bin/false")  # a process that would be started now would fail
    await bring_up_to_date(installation.databases())


@pytest.mark.parametrize("service", OWNERS)
def test_every_table_says_what_it_is_and_is_in_the_document(service: str) -> None:
    document = (ROOT / "docs" / "coordinators.md").read_text()

    for table in tables_of(service).tables.values():
        assert table.comment, table.name
        assert f"`{table.name}`" in document


def test_every_table_in_the_document_exists() -> None:
    document = (ROOT / "docs" / "coordinators.md").read_text()
    tables = document.partition("## Index tables")[2].partition("## Edges")[0]
    rows = [row.split("|")[2] for row in tables.splitlines() if row.startswith("|") and "`" in row.split("|")[2]]
    named = {name for cell in rows for name in re.findall(r"`(\w+)`", cell)}

    assert named
    assert named <= {name for service in OWNERS for name in tables_of(service).tables}
