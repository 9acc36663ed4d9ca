"""Alembic per service: the scripts live in the service's `migrations` folder, and are the same for both databases.

They run in a process of their own, so that no service keeps Alembic in its memory, and only where something is new.

    python -m services.runtime.migrations < {"FOLDER": "URL", ...}

Two processes that start at once on one PostgreSQL server take turns. There a comment says whose a database is.
"""

import asyncio
import json
import os
import sqlite3
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from sqlalchemy import Connection, MetaData, exc, text

from services.runtime.config import make_private
from services.runtime.database import DatabaseRefused, DatabaseUnavailable
from services.runtime.database.indexes import add_conditions

_SQLITE = "sqlite:///"
_VERSIONS = "versions"
_STAND = "SELECT version_num, obj_description('alembic_version'::regclass) FROM alembic_version"
_THERE = "SELECT to_regclass('alembic_version') IS NOT NULL"
_PATIENCE = "SET LOCAL lock_timeout = '60s'"
_TURN = "SELECT pg_advisory_lock(hashtext('branchline migrations'))"
_FORBIDDEN = "42501"
_LOOK_SECONDS = 10.0
"""Longest time that a server may take to say what it holds."""

_MOST_SECONDS = 1800.0
"""Longest time that bringing databases up to date may take."""


class MigrationError(DatabaseRefused):
    """The database could not be brought to the newest schema; the message says why, if need be in Alembic's words."""


async def bring_up_to_date(databases: Mapping[Path, str]) -> None:
    """Bring databases, given by their scripts' folders, to the newest schema.

    Raise DatabaseRefused if one is another service's, newer than this program or not open to it; DatabaseUnavailable
    if its server cannot be reached now.
    """
    old = {str(folder): url for folder, url in databases.items() if not await asyncio.to_thread(_is_new, folder, url)}
    if not old:
        return
    migrating = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", __name__),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(_MOST_SECONDS):
            output, _ = await migrating.communicate(json.dumps(old).encode())  # not as an argument: others see those
    except TimeoutError as error:
        raise DatabaseUnavailable(f"it was not brought up to date in {_MOST_SECONDS:.0f} seconds") from error
    finally:
        if migrating.returncode is None:
            migrating.kill()
            await migrating.wait()
    said = output.decode(errors="replace")[-4000:].strip()
    if migrating.returncode == os.EX_TEMPFAIL:
        raise DatabaseUnavailable(said)
    if migrating.returncode:
        raise MigrationError(said)


def _is_new(folder: Path, url: str) -> bool:
    """Say whether a database has the newest schema. The newest script is the last by name."""
    service = folder.parent.name
    newest = max(path.stem.partition("_")[0] for path in (folder / _VERSIONS).glob("[0-9]*.py"))
    version, owner = _in_file(Path(url.removeprefix(_SQLITE))) if url.startswith(_SQLITE) else _on_server(service, url)
    if owner not in {service, None}:
        raise DatabaseRefused(
            f"the services {owner} and {service} were given one database; each needs its own (databases.{service})"
        )
    if version is not None and version > newest:
        raise MigrationError(
            f"the database of {service} has schema {version}, which is newer than this program: it knows {newest}"
        )
    return version == newest


def _in_file(path: Path) -> tuple[str | None, str | None]:
    """Return the version of a file's schema, or None; and nobody as its owner, since its path says that."""
    if not path.exists():
        return None, None
    with closing(sqlite3.connect(path)) as connection:
        try:
            rows = connection.execute("SELECT version_num FROM alembic_version").fetchall()
        except sqlite3.Error:
            return None, None
    return (rows[0][0] if rows else None), None


def _on_server(service: str, url: str) -> tuple[str | None, str | None]:
    """Return the version of a schema, or None, and which service it is of."""
    import psycopg  # noqa: PLC0415 - only where there is a server

    from services.runtime.database.server import answered_within, connect  # noqa: PLC0415

    try:
        with connect(url) as connection, answered_within(connection, _LOOK_SECONDS):
            row = connection.execute(_THERE).fetchone()
            found = connection.execute(_STAND).fetchone() if row is not None and row[0] else None
    except DatabaseRefused as error:
        raise DatabaseRefused(f"PostgreSQL does not let {service} in (databases.{service}): {error}") from error
    except psycopg.OperationalError as error:
        raise DatabaseUnavailable(str(error)) from error
    except psycopg.Error as error:
        raise DatabaseRefused(f"the database of {service} cannot be used: {error}") from error
    return (found[0], found[1]) if found is not None else (None, None)


def migrate(folder: Path, url: str, version: str = "head") -> None:
    """Bring one database to the newest schema, or an older one, in this process."""
    from alembic import command  # noqa: PLC0415 - only the process that migrates has Alembic
    from alembic.config import Config  # noqa: PLC0415

    if url.startswith(_SQLITE):
        make_private(Path(url.removeprefix(_SQLITE)).parent)
    config = Config()
    config.set_main_option("script_location", str(folder))
    config.attributes["url"], config.attributes["service"] = url, folder.parent.name
    command.upgrade(config, version)


def run_environment(metadata: MetaData) -> None:
    """Do what every service's `migrations/env.py` does: run the scripts in one transaction."""
    from alembic import context  # noqa: PLC0415
    from sqlalchemy import create_engine  # noqa: PLC0415

    add_conditions(metadata)
    url, service = context.config.attributes["url"], context.config.attributes["service"]
    if url.startswith(_SQLITE):
        engine = create_engine(url)
    else:
        from services.runtime.database.server import connect  # noqa: PLC0415

        engine = create_engine("postgresql+psycopg://", creator=lambda: connect(url, autocommit=False))
    with engine.connect() as connection:
        on_server = connection.dialect.name == "postgresql"
        if on_server:
            _take_turn(connection, service)
        context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
        with context.begin_transaction():
            context.run_migrations()
            if on_server:
                connection.execute(text(f"COMMENT ON TABLE alembic_version IS '{service}'"))
    engine.dispose()


def _take_turn(connection: Connection, service: str) -> None:
    """Wait for another that migrates, for as long as the connection lives; another service may have been faster."""
    connection.execute(text(_PATIENCE))
    connection.execute(text(_TURN))
    if connection.scalar(text(_THERE)):
        found = connection.execute(text(_STAND)).first()
        if found is not None and found[1] not in {service, None}:
            raise DatabaseRefused(f"the services {found[1]} and {service} were given one database; each needs its own")
    connection.commit()


def _main() -> None:
    for folder, url in json.load(sys.stdin).items():
        try:
            migrate(Path(folder), url)
        except (DatabaseRefused, DatabaseUnavailable) as error:
            print(error)  # noqa: T201 - to the process that waits for it
            sys.exit(1 if isinstance(error, DatabaseRefused) else os.EX_TEMPFAIL)
        except exc.DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) == _FORBIDDEN:
                print(f"the role of {Path(folder).parent.name} may not make tables in its database: {error.orig}")  # noqa: T201
                sys.exit(1)
            if isinstance(error, exc.OperationalError) and not url.startswith(_SQLITE):
                print(error.orig)  # noqa: T201
                sys.exit(os.EX_TEMPFAIL)
            raise


if __name__ == "__main__":
    _main()
