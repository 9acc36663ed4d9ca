"""SQLite: one file per service, write-ahead log, one writer in aiosqlite's thread, readers beside it.

While one group of transactions commits, the next gathers. A function that raises is undone alone. If a group cannot be
committed together, its functions are run again, each in a transaction of its own.
"""

import asyncio
import sqlite3
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import aiosqlite

from services.runtime.config import make_private
from services.runtime.database.base import Database, Job, in_context, raisable
from services.runtime.database.statement import Compiled, Statement, Values
from services.runtime.database.transaction import DatabaseBusy, DatabaseError, DatabaseUnavailable, Reader

P = ParamSpec("P")
T = TypeVar("T")

GROUP = 64
"""Most transactions in one commit."""

_READERS = 4
_BUSY_TIMEOUT_MS = 10_000
_PRIMARY = 0xFF
_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


class _Driver:
    """A connection to the file, used in one thread."""

    def __init__(self, raw: sqlite3.Connection) -> None:
        self.raw = raw
        self.execute: Callable[..., sqlite3.Cursor] = raw.execute
        self.statements = 0

    def execute_many(self, text: str, parameters: Sequence[Values]) -> int:
        return self.raw.executemany(text, parameters).rowcount

    def compiled(self, statement: Statement) -> Compiled:
        return statement.sqlite

    def is_outage(self, error: BaseException) -> bool:
        return not self.raw.in_transaction or isinstance(_refusal(error), DatabaseError)


class _Connection(aiosqlite.Connection):
    """aiosqlite's connection with its thread; functions are run there whole, in one hop."""

    driver: _Driver

    def run(self, fn: Callable[..., T], *args: Any) -> "asyncio.Future[T]":
        """Run a function in the connection's thread."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        cast("Any", self)._tx.put_nowait((future, partial(fn, self.driver, *args)))
        return future


class SqliteDatabase(Database):
    """A service's file."""

    dialect = "sqlite"

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._waiting: deque[Job] = deque()
        self._writer: _Connection | None = None
        self._busy = False
        self._idle_readers: deque[_Connection] = deque()
        self._waiting_reads: deque[tuple[asyncio.Future[Any], Callable[..., Any]]] = deque()
        self._readers: list[_Connection] = []
        self._at_rest = asyncio.Event()

    async def start(self) -> None:
        """Open the connections."""
        make_private(self.path.parent)
        self._writer = await _open(self.path, writes=True)
        self._readers = [await _open(self.path, writes=False) for _ in range(_READERS)]
        self._idle_readers.extend(self._readers)

    async def close(self) -> None:
        """Run what waits, then close."""
        if self._writer is None:
            return
        self._ride_now()
        while self._busy or len(self._idle_readers) < len(self._readers):
            self._at_rest.clear()
            await self._at_rest.wait()
        writer, self._writer = self._writer, None
        for connection in (writer, *self._readers):
            await connection.close()

    @property
    def statements(self) -> int:
        """Statements run so far."""
        connections = [] if self._writer is None else [self._writer, *self._readers]
        return sum(connection.driver.statements for connection in connections)

    def _submit(self, job: Job) -> None:
        if self._writer is None:
            raise DatabaseUnavailable("it is closed")
        self._waiting.append(job)
        if not self._busy:
            self._next_group()

    def _flush(self) -> None:
        if not self._busy and self._writer is not None:
            self._next_group()

    def _next_group(self) -> None:
        """Have a group run, if there is one."""
        assert self._writer is not None
        group: list[Job] = []
        while self._waiting and len(group) < GROUP:
            job = self._waiting.popleft()
            if job.wanted:
                group.append(job)
        group += self._take_riding()
        self._busy = bool(group)
        if group:
            self._writer.run(_run_group, group).add_done_callback(partial(self._group_ended, group))

    def _group_ended(self, group: list[Job], ran: "asyncio.Future[int]") -> None:
        error = ran.exception()
        if error is None:
            self.commits += ran.result()
        self._busy = False
        if self._waiting or self._ride_due:  # the next group commits while this one's callers go on
            self._next_group()
        for job in group:
            job.error = job.error or error
            self._deliver(job)
        self._at_rest.set()

    async def read(self, fn: Callable[Concatenate[Reader, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function that only reads, on one consistent state."""
        if self._writer is None:
            raise DatabaseUnavailable("it is closed")
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        call = in_context(partial(_read, fn, args, kwargs))
        self._waiting_reads.append((future, call))
        self._start_reads()
        return await future

    def _start_reads(self) -> None:
        while self._waiting_reads and self._idle_readers:
            future, call = self._waiting_reads.popleft()
            if future.cancelled():
                continue
            reader = self._idle_readers.pop()
            reader.run(_in_thread, call).add_done_callback(partial(self._read_ended, reader, future))

    def _read_ended(
        self,
        reader: _Connection,
        future: "asyncio.Future[Any]",
        ran: "asyncio.Future[tuple[Any, BaseException | None]]",
    ) -> None:
        self._idle_readers.append(reader)
        self._start_reads()
        self._at_rest.set()
        if future.done():
            return
        result, error = ran.result()
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)


async def _open(path: Path, *, writes: bool) -> _Connection:
    def connect() -> sqlite3.Connection:
        raw = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=512)
        for pragma in (f"busy_timeout={_BUSY_TIMEOUT_MS}", "synchronous=FULL", "foreign_keys=ON"):
            raw.execute(f"PRAGMA {pragma}")
        if writes:
            raw.execute("PRAGMA journal_mode=WAL")
        else:
            raw.execute("PRAGMA query_only=ON")
        return raw

    try:
        connection = await _Connection(connect, iter_chunk_size=64)
    except sqlite3.Error as error:
        raise _refusal(error) from error
    assert isinstance(connection, _Connection)
    connection.driver = _Driver(connection._conn)  # pyright: ignore[reportPrivateUsage]
    return connection


def _run_group(driver: _Driver, group: list[Job], *, savepoints: bool = False) -> int:
    """Run functions in one transaction, or each alone if that cannot be; return the number of commits.

    Who raises has rarely written before. So functions run without savepoints, which cost as much as a statement each,
    and the group is run again with them if one has.
    """
    try:
        driver.execute("BEGIN IMMEDIATE")
    except sqlite3.Error as error:
        for job in group:
            job.error = _refusal(error)
        return 0
    try:
        failure = _attempt(driver, group, savepoints=savepoints)
    except _UndoneTogether:
        for job in group:
            job.clear()
        return _run_group(driver, group, savepoints=True)
    if failure is None:
        for job in group:
            job.error = _refusal(job.error)
        return int(any(job.error is None for job in group))
    if len(group) == 1:
        group[0].error = _refusal(failure)
        return 0
    for job in group:
        job.clear()
    return sum(_run_group(driver, [job]) for job in group)


class _UndoneTogether(Exception):
    """A function raised after it had written, and can be undone only with all others."""


def _attempt(driver: _Driver, group: list[Job], *, savepoints: bool) -> BaseException | None:
    """Run functions in the transaction that is open and commit it; return why that could not be."""
    sql, raw = driver.execute, driver.raw
    try:
        for job in group:
            if savepoints:
                sql("SAVEPOINT job")
            written = raw.total_changes
            job.call(driver)
            if not raw.in_transaction:  # a full disk or an I/O error: SQLite has rolled everything back
                return job.error or DatabaseUnavailable("the transaction was rolled back")
            if savepoints:
                if job.error is not None:
                    sql("ROLLBACK TO SAVEPOINT job")
                sql("RELEASE SAVEPOINT job")
            elif job.error is not None and raw.total_changes != written and len(group) > 1:
                raise _UndoneTogether
        if any(job.error is None for job in group):
            sql("COMMIT")
    except sqlite3.Error as error:
        return error
    finally:
        if raw.in_transaction:
            sql("ROLLBACK")
    return None


def _read(fn: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any], driver: _Driver) -> T:
    driver.execute("BEGIN")
    try:
        return fn(Reader(driver), *args, **kwargs)
    finally:
        driver.execute("ROLLBACK")


def _in_thread(driver: _Driver, fn: Callable[[_Driver], Any]) -> tuple[Any, BaseException | None]:
    try:
        return fn(driver), None
    except BaseException as error:  # noqa: BLE001 - it is the caller's
        return None, _refusal(raisable(error))


def _refusal(error: BaseException | None) -> Any:
    """Return the error as callers know it: what the database cannot do is a DatabaseError."""
    broken = type(error) is sqlite3.DatabaseError  # the file is no database, or damaged
    if not (isinstance(error, sqlite3.OperationalError) or broken):
        return error
    assert isinstance(error, sqlite3.Error)
    if error.sqlite_errorcode & _PRIMARY in _BUSY:
        refusal: DatabaseError = DatabaseBusy(str(error))
    elif error.sqlite_errorcode & _PRIMARY == sqlite3.SQLITE_ERROR:  # the statement is wrong, not the database
        return error
    else:
        refusal = DatabaseUnavailable(str(error))
    refusal.__cause__ = error
    return refusal
