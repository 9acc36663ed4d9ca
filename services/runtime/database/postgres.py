"""PostgreSQL: some threads with a connection each; every function has a transaction of its own.

A serialization failure or a deadlock is tried again; what needs a single writer takes its row first.
"""

import asyncio
import contextvars
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from typing import Any, Concatenate, LiteralString, ParamSpec, TypeVar, cast

import psycopg
from psycopg.pq import TransactionStatus

from services.runtime.database.base import Database, Job
from services.runtime.database.statement import Compiled, Parameters, Statement
from services.runtime.database.transaction import DatabaseError, DatabaseUnavailable, Reader

P = ParamSpec("P")
T = TypeVar("T")

CONNECTIONS = 8
_ATTEMPTS = 4
_CONNECT_SECONDS = 10
_AGAIN = frozenset({"40001", "40P01", "23505"})
"""Serialization failure, deadlock, and a key that somebody else inserted at the same moment."""


class _Driver:
    """A connection, used by one thread at a time. It is opened again after a break."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._raw: psycopg.Connection[Any] | None = None
        self.statements = 0

    @property
    def raw(self) -> psycopg.Connection[Any]:
        if self._raw is None or self._raw.closed:
            self._raw = psycopg.connect(
                self._url, autocommit=True, prepare_threshold=0, connect_timeout=_CONNECT_SECONDS
            )
        return self._raw

    def execute(self, text: str, parameters: Parameters | None = None) -> Any:
        return self.raw.execute(cast("LiteralString", text), parameters)

    def execute_many(self, text: str, parameters: Sequence[Parameters]) -> int:
        with self.raw.cursor() as cursor:
            cursor.executemany(cast("LiteralString", text), parameters)
            return cursor.rowcount

    def compiled(self, statement: Statement) -> Compiled:
        return statement.postgres

    def is_outage(self, error: BaseException) -> bool:
        return isinstance(_refusal(error), DatabaseError) or getattr(error, "sqlstate", None) in _AGAIN

    def rollback(self) -> None:
        raw = self._raw
        if raw is not None and not raw.closed and raw.info.transaction_status != TransactionStatus.IDLE:
            try:
                raw.execute("ROLLBACK")
            except psycopg.Error:
                raw.close()

    def close(self) -> None:
        if self._raw is not None:
            self._raw.close()


class PostgresDatabase(Database):
    """A service's database on a server."""

    dialect = "postgresql"

    def __init__(self, url: str, connections: int = CONNECTIONS) -> None:
        super().__init__()
        self._drivers = [_Driver(url) for _ in range(connections)]
        self._free: SimpleQueue[_Driver] = SimpleQueue()
        for driver in self._drivers:
            self._free.put(driver)
        self._threads = ThreadPoolExecutor(connections, thread_name_prefix="postgres")
        self._running: set[asyncio.Future[Any]] = set()

    async def start(self) -> None:
        """See whether the server answers."""
        await self.read(lambda reader: None)

    async def close(self) -> None:
        """Run what waits, then close."""
        self._ride_now()
        while self._running:
            await asyncio.wait(self._running)
        await asyncio.to_thread(self._threads.shutdown)
        for driver in self._drivers:
            driver.close()

    @property
    def statements(self) -> int:
        """Statements run so far."""
        return sum(driver.statements for driver in self._drivers)

    def _submit(self, job: Job) -> None:
        self._start([job])

    def _flush(self) -> None:
        self._start(self._take_riding())

    def _start(self, jobs: list[Job]) -> None:
        running = asyncio.get_running_loop().run_in_executor(self._threads, self._with_driver, partial(_run, jobs))
        self._running.add(running)
        running.add_done_callback(partial(self._ended, jobs))

    def _ended(self, jobs: list[Job], ran: "asyncio.Future[Any]") -> None:
        self._running.discard(ran)
        error = ran.exception()
        self.commits += ran.result() if error is None else 0
        for job in jobs:
            job.error = job.error or error
            job.deliver()

    async def read(self, fn: Callable[Concatenate[Reader, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function that only reads, on one consistent state."""
        call = partial(contextvars.copy_context().run, _read, fn, args, kwargs)
        running = asyncio.get_running_loop().run_in_executor(self._threads, self._with_driver, call)
        self._running.add(running)
        running.add_done_callback(self._running.discard)
        return await asyncio.shield(running)

    def _with_driver(self, fn: Callable[[_Driver], T]) -> T:
        driver = self._free.get()
        try:
            return fn(driver)
        finally:
            driver.rollback()
            self._free.put(driver)


def _run(jobs: list[Job], driver: _Driver) -> int:
    """Run functions in one transaction, again after a conflict; return the number of commits."""
    wanted = [job for job in jobs if job.wanted]
    for attempt in range(1, _ATTEMPTS + 1):
        for job in wanted:
            job.clear()
        error = _attempt(wanted, driver)
        driver.rollback()
        if error is None:
            return 1 if wanted else 0
        if getattr(error, "sqlstate", None) not in _AGAIN or attempt == _ATTEMPTS:
            for job in wanted:
                job.error = _refusal(error)
            return 0
    return 0


def _attempt(jobs: list[Job], driver: _Driver) -> BaseException | None:
    try:
        driver.execute("BEGIN")
        for job in jobs:
            job.call(driver)
            if job.error is not None:
                return job.error
        driver.execute("COMMIT")
    except psycopg.Error as error:
        return error
    return None


def _read(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], driver: _Driver) -> Any:
    try:
        driver.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        return fn(Reader(driver), *args, **kwargs)
    except psycopg.Error as error:
        raise _refusal(error) from error


def _refusal(error: BaseException) -> BaseException:
    """Return the error as callers know it: what the server cannot do is a DatabaseError."""
    if isinstance(error, DatabaseError) or not isinstance(error, psycopg.OperationalError):
        return error
    refusal = DatabaseUnavailable(str(error))
    refusal.__cause__ = error
    return refusal
