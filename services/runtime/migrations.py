"""Alembic per service: the scripts live in the service's `migrations` folder.

They run in a process of their own, so that no service keeps Alembic in its memory, and only where something is new.

    python -m services.runtime.migrations FOLDER URL [FOLDER URL ...]
"""

import asyncio
import sqlite3
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from sqlalchemy import MetaData

from services.runtime.config import make_private
from services.runtime.database.indexes import add_conditions

_VERSIONS = "versions"


class MigrationError(Exception):
    """The database could not be brought to the newest schema; the message is the end of what Alembic said."""


async def bring_up_to_date(databases: Mapping[Path, str]) -> None:
    """Bring databases, given by their scripts' folders, to the newest schema."""
    old = {folder: url for folder, url in databases.items() if not await asyncio.to_thread(_is_new, folder, url)}
    if not old:
        return
    arguments = [word for folder, url in old.items() for word in (str(folder), url)]
    migrating = await asyncio.create_subprocess_exec(
        sys.executable, "-m", __name__, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await migrating.communicate()
    if migrating.returncode:
        raise MigrationError(output.decode(errors="replace")[-4000:])


def _is_new(folder: Path, url: str) -> bool:
    """Say whether a SQLite file has the newest schema. The newest script is the last by name."""
    newest = max(path.stem.partition("_")[0] for path in (folder / _VERSIONS).glob("[0-9]*.py"))
    path = Path(url.removeprefix("sqlite:///"))
    if not url.startswith("sqlite:///") or not path.exists():
        return False
    with closing(sqlite3.connect(path)) as connection:
        try:
            return [(newest,)] == connection.execute("SELECT version_num FROM alembic_version").fetchall()
        except sqlite3.Error:
            return False


def migrate(folder: Path, url: str) -> None:
    """Bring one database to the newest schema, in this process."""
    from alembic import command  # noqa: PLC0415 - only the process that migrates has Alembic
    from alembic.config import Config  # noqa: PLC0415

    if url.startswith("sqlite:///"):
        make_private(Path(url.removeprefix("sqlite:///")).parent)
    config = Config()
    config.set_main_option("script_location", str(folder))
    config.set_main_option("sqlalchemy.url", url.replace("postgresql://", "postgresql+psycopg://").replace("%", "%%"))
    command.upgrade(config, "head")


def run_environment(metadata: MetaData) -> None:
    """Do what every service's `migrations/env.py` does: run the scripts in one transaction."""
    from alembic import context  # noqa: PLC0415
    from sqlalchemy import create_engine  # noqa: PLC0415

    add_conditions(metadata)
    engine = create_engine(context.config.get_main_option("sqlalchemy.url") or "")
    with engine.connect() as connection:
        context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
        with context.begin_transaction():
            context.run_migrations()
    engine.dispose()


if __name__ == "__main__":
    for number in range(1, len(sys.argv), 2):
        migrate(Path(sys.argv[number]), sys.argv[number + 1])
