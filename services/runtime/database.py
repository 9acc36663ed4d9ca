"""One SQLite file per service: write-ahead log, one writer connection, readers beside it.

A transaction has one owner: `async with database.transaction() as tx`. What it changed is announced to the
process after the commit, in the order of commits.
"""

import asyncio
import sqlite3
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import CursorResult, Executable, event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import StaticPool

_BUSY_TIMEOUT_MS = 10_000
_READERS = 4

T = TypeVar("T")


class Reader:
    """A connection within a transaction: sees one consistent state."""

    def __init__(self, connection: AsyncConnection) -> None:
        self.connection = connection

    async def execute(
        self, statement: Executable, parameters: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None
    ) -> CursorResult[Any]:
        """Run one statement."""
        return await _whole(self.connection.execute(statement, parameters))  # pyright: ignore[reportReturnType]


class Transaction(Reader):
    """An open write transaction."""

    def __init__(self, connection: AsyncConnection) -> None:
        super().__init__(connection)
        self.after_commit: list[Callable[[], None]] = []

    @asynccontextmanager
    async def savepoint(self) -> AsyncGenerator[None, None]:
        """Undo what the block did, and only that, if it raises."""
        announced = len(self.after_commit)
        try:
            async with self.connection.begin_nested():
                yield
        except BaseException:
            del self.after_commit[announced:]
            raise


class Database:
    """The database of one service. Nobody else opens it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writing = asyncio.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        _use_write_ahead_log(path)
        self._writer = _engine(path, "BEGIN IMMEDIATE", poolclass=StaticPool)
        self._reader = _engine(path, "BEGIN", pool_size=_READERS, max_overflow=0)

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[Transaction, None]:
        """Commit what the block writes, or nothing of it if it raises or is cancelled."""
        async with self._writing, _begun(self._writer) as connection:
            transaction = Transaction(connection)
            yield transaction
            try:
                await _whole(connection.commit())
            except asyncio.CancelledError:  # the commit has ended all the same, so others must hear of it
                _announce(transaction)
                raise
            _announce(transaction)

    @asynccontextmanager
    async def read(self) -> AsyncGenerator[Reader, None]:
        """Give a connection that sees one consistent state."""
        async with _begun(self._reader) as connection:
            yield Reader(connection)

    async def close(self) -> None:
        """Close all connections."""
        await self._writer.dispose()
        await self._reader.dispose()


@asynccontextmanager
async def _begun(engine: AsyncEngine) -> AsyncGenerator[AsyncConnection, None]:
    """Give a connection with a transaction begun; roll back what was not committed."""
    connection = engine.connect()
    try:
        await _whole(connection.start())
        await _whole(connection.begin().start())
        yield connection
    finally:
        if connection.sync_connection is not None:
            await _whole(connection.close())


async def _whole(statement: Coroutine[Any, Any, T]) -> T:
    """Await something that runs in the database's thread and cannot be called back.

    If the caller is cancelled meanwhile, the cancellation waits for the end: a connection that was left in the
    middle of a statement would keep its lock.
    """
    running = asyncio.ensure_future(statement)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        while not running.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait({running})
        running.result()
        raise


def _announce(transaction: Transaction) -> None:
    for announce in transaction.after_commit:
        announce()


def _use_write_ahead_log(path: Path) -> None:
    """Switch the file to the write-ahead log. It stays so; the switch itself needs the file for itself."""
    with closing(sqlite3.connect(path, timeout=_BUSY_TIMEOUT_MS / 1000)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")


def _engine(path: Path, begin: str, **options: Any) -> AsyncEngine:
    """Make an engine whose transactions begin with the given statement.

    SQLAlchemy documents this recipe for SQLite: the driver must not begin transactions by itself.
    """
    engine = create_async_engine(f"sqlite+aiosqlite:///{path}", **options)

    def on_connect(connection: Any, _record: object) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in (f"busy_timeout={_BUSY_TIMEOUT_MS}", "synchronous=FULL", "foreign_keys=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    def on_begin(connection: Any) -> None:
        connection.exec_driver_sql(begin)

    event.listen(engine.sync_engine, "connect", on_connect)
    event.listen(engine.sync_engine, "begin", on_begin)
    return engine
