"""Copies a stopped installation's SQLite files into its databases on a PostgreSQL server.

Each database is copied whole in one transaction, or not at all, while its file is locked; one that was copied before is
found so and left alone. What the data folder holds beside databases stays there and goes on to be used.
"""

import asyncio
import sqlite3
from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path

import psycopg
from psycopg import sql
from rich.console import Console
from sqlalchemy import Boolean, Connection, MetaData, NullPool, Table, create_engine, exc, func, select

from cli.installation import known_installation
from cli.server import configure
from cli.settings import Settings, SettingsError
from services.runtime.database import DatabaseUnavailable
from services.runtime.database.server import connect
from services.runtime.migrations import bring_up_to_date
from services.runtime.workflows import SCHEMA, make_state

_PART = 500
_OWN = frozenset({"alembic_version", "dbos_migrations"})
"""Tables in which each database says what its schema is."""

Counts = dict[str, int]


async def migrate_data(console: Console, data_dir: Path) -> None:
    """Copy every database that is set and has a file, and say how much that was."""
    settings = configure(data_dir)
    installation = known_installation(settings)
    targets = {folder: url for folder, url in installation.databases().items() if not url.startswith("sqlite:///")}
    files = {folder: _file(settings, folder.parent.name) for folder in targets}
    there = {folder: file for folder, file in files.items() if file.exists()}
    if not there:
        raise SettingsError(
            f"there is nothing to copy: no service with a setting under databases has a file in {data_dir}"
        )
    for file in there.values():
        with _locked(file):
            pass  # all of them are stopped, before the first is changed
    await bring_up_to_date({folder: f"sqlite:///{file}" for folder, file in there.items()})
    try:
        await bring_up_to_date({folder: targets[folder] for folder in there})
        for folder, file in there.items():
            copied = await asyncio.to_thread(_copy, file, targets[folder], "public")
            console.print(f"{folder.parent.name}: {copied}", markup=False)
            workflows = file.with_name("workflows.sqlite")
            if workflows.exists():
                await asyncio.to_thread(make_state, targets[folder])
                copied = await asyncio.to_thread(_copy, workflows, targets[folder], SCHEMA)
                console.print(f"{folder.parent.name}, its workflows: {copied}", markup=False)
    except (DatabaseUnavailable, exc.OperationalError, psycopg.OperationalError) as error:
        raise SettingsError(f"not all was copied, and it may be run again: {error}") from error


def _file(settings: Settings, service: str) -> Path:
    return settings.data_dir.resolve() / service / f"{service}.sqlite"


@contextmanager
def _locked(file: Path) -> Generator[sqlite3.Connection, None, None]:
    """Keep everybody else out of a file for the length of the block. Raise SettingsError if somebody has it open."""
    with closing(sqlite3.connect(file, isolation_level=None, timeout=1)) as connection:
        try:
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            raise SettingsError(f"{file} is in use ({error}): stop the services first") from error
        yield connection
        connection.execute("ROLLBACK")


def _copy(file: Path, url: str, schema: str) -> str:
    """Copy a file's tables into a schema; return what was done, in words."""
    engine = create_engine("postgresql+psycopg://", creator=lambda: connect(url, autocommit=False), poolclass=NullPool)
    with _locked(file) as source, engine.begin() as target:
        metadata = MetaData(schema=schema)
        metadata.reflect(target)
        tables = [table for table in metadata.sorted_tables if table.name not in _OWN]
        wanted = {table.name: _count(source, table) for table in tables}
        before = _counts(target, tables)
        if before == wanted and any(wanted.values()):
            return f"{sum(wanted.values())} rows are there already"
        if any(before.values()):
            full = ", ".join(name for name, count in before.items() if count)
            raise SettingsError(f"the database that {file.name} would be copied to is not empty: see its tables {full}")
        for table in tables:
            try:
                _copy_table(source, target, table)
            except psycopg.DataError as error:
                raise SettingsError(
                    f"{file.name} was not copied: {table.name} holds what cannot be: {error}"
                ) from error
        if _counts(target, tables) != wanted:
            raise SettingsError(f"{file.name} was not copied: the counts of rows differ")
    return f"copied {sum(wanted.values())} rows of {sum(map(bool, wanted.values()))} tables"


def _count(source: sqlite3.Connection, table: Table) -> int:
    """Return how many rows a file's table has; none if the file is older than the table."""
    there = source.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", (table.name,)).fetchone()
    return source.execute(f'SELECT count(*) FROM "{table.name}"').fetchone()[0] if there else 0  # noqa: S608


def _counts(target: Connection, tables: list[Table]) -> Counts:
    return {table.name: target.scalar(select(func.count()).select_from(table)) or 0 for table in tables}


def _copy_table(source: sqlite3.Connection, target: Connection, table: Table) -> None:
    held = {row[1] for row in source.execute(f'PRAGMA table_info("{table.name}")')}
    columns = [column for column in table.columns if column.name in held]
    if not columns:
        return
    names = ", ".join(f'"{column.name}"' for column in columns)
    truths = [number for number, column in enumerate(columns) if isinstance(column.type, Boolean)]
    rows = source.execute(f'SELECT {names} FROM "{table.name}"')  # noqa: S608
    into = sql.SQL("COPY {} ({}) FROM STDIN").format(
        sql.Identifier(table.schema or "public", table.name),
        sql.SQL(", ").join(sql.Identifier(column.name) for column in columns),
    )
    driver: psycopg.Connection = target.connection.driver_connection  # pyright: ignore[reportAssignmentType]
    with driver.cursor() as cursor, cursor.copy(into) as copy:
        while part := rows.fetchmany(_PART):
            for row in part:
                values = list(row)
                for number in truths:  # a file holds 0 and 1
                    values[number] = None if values[number] is None else bool(values[number])
                copy.write_row(values)
