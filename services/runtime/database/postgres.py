"""PostgreSQL: some threads with a connection each; every function has a transaction of its own.

A serialization failure or a deadlock is tried again; what needs a single writer takes its row first. Transactions
commit side by side, but are announced in an order in which each comes behind those whose effects it has seen.
"""

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from queue import LifoQueue
from typing import Any, Concatenate, LiteralString, ParamSpec, TypeVar, cast

import psycopg
from psycopg.pq import TransactionStatus

from services.runtime.database.base import Database, Job, in_context, raisable
from services.runtime.database.notices import CHANNEL, Hear, Look, Notices
from services.runtime.database.server import connect, hang_up
from services.runtime.database.statement import Compiled, Statement, Values
from services.runtime.database.transaction import (
    DatabaseBusy,
    DatabaseError,
    DatabaseRefused,
    DatabaseUnavailable,
    Raced,
    Reader,
)

P = ParamSpec("P")
T = TypeVar("T")

WRITERS = 8
READERS = 4
_ATTEMPTS = 8
_ATTEMPTS_TAKEN = 3
_PAUSE_SECONDS = 0.01
_PREPARED = 512

ANSWER_SECONDS = 15.0
"""Longest time that a statement may take, which the server is told, too; a lock is waited for less."""

_CUT_SECONDS = ANSWER_SECONDS + 5.0
"""Time after which a server that answers nothing at all, not even that, is hung up on."""

_SETTINGS = f"SET lock_timeout = '10s'; SET statement_timeout = '{ANSWER_SECONDS:.0f}s'"
_NOTIFY = "SELECT pg_notify(%s, message) FROM unnest(%s::text[]) AS messages (message)"

_CONFLICTS = frozenset({"40001", "40P01"})
"""Serialization failure, deadlock."""

_TAKEN = "23505"
"""A key that is taken: perhaps by somebody else at the same moment, so it is looked at again."""

_BUSY = frozenset({*_CONFLICTS, "55P03"})
_READ_ONLY = "25006"


class _Driver:
    """A connection, used by one thread at a time. A transaction that begins opens it again after a break."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._raw: psycopg.Connection[Any] | None = None
        self.statements = 0
        self.attempt = 0
        self._asked: float | None = None

    @property
    def status(self) -> TransactionStatus:
        """Where the connection stands."""
        return TransactionStatus.UNKNOWN if self._raw is None else self._raw.info.transaction_status

    def begin(self, text: str) -> None:
        """Begin a transaction. A connection that broke while it was idle is replaced."""
        if self._raw is not None and not self._raw.closed:
            try:
                self.execute(text)
                return
            except psycopg.OperationalError:
                self._raw.close()
        self._raw = connect(self._url)
        self._raw.prepare_threshold, self._raw.prepared_max = 0, _PREPARED
        self._execute(_SETTINGS, prepare=False)
        self.execute(text)

    def execute(self, text: str, parameters: Values | None = None) -> Any:
        return self._execute(text, parameters)

    def _execute(self, text: str, parameters: Values | None = None, *, prepare: bool | None = None) -> Any:
        assert self._raw is not None
        self._asked = time.monotonic()
        try:
            return self._raw.execute(cast("LiteralString", text), parameters, prepare=prepare)
        finally:
            self._asked = None

    def execute_many(self, text: str, parameters: Sequence[Values]) -> int:
        assert self._raw is not None
        self._asked = time.monotonic()
        try:
            with self._raw.cursor() as cursor:
                cursor.executemany(cast("LiteralString", text), parameters)
                return cursor.rowcount
        finally:
            self._asked = None

    def hang_up_on_silence(self) -> None:
        """Break the connection if the server has not answered for too long; from any thread. Its user hears of it."""
        raw, asked = self._raw, self._asked
        if raw is None or asked is None or time.monotonic() - asked < _CUT_SECONDS:
            return
        hang_up(raw)

    def compiled(self, statement: Statement) -> Compiled:
        return statement.postgres

    def is_outage(self, error: BaseException) -> bool:
        if self.status not in {TransactionStatus.INTRANS, TransactionStatus.INERROR}:
            return True
        if _is_race(error):
            return self.attempt < _ATTEMPTS_TAKEN
        return isinstance(_refusal(error), DatabaseError)

    def rollback(self) -> None:
        if self._raw is not None and not self._raw.closed and self.status != TransactionStatus.IDLE:
            try:
                self.execute("ROLLBACK")
            except psycopg.Error:
                self._raw.close()

    def close(self) -> None:
        if self._raw is not None:
            self._raw.close()


class _Pool:
    """Threads, each with a connection while it works."""

    def __init__(self, url: str, size: int) -> None:
        self.drivers = [_Driver(url) for _ in range(size)]
        self._free: LifoQueue[_Driver] = (
            LifoQueue()
        )  # what is idle stays so: few connections unless there is much to do
        for driver in self.drivers:
            self._free.put(driver)
        self._threads = ThreadPoolExecutor(size, thread_name_prefix="postgres")

    def run(self, fn: Callable[[_Driver], T]) -> "asyncio.Future[T]":
        """Have a function run; it is not begun if the future is cancelled before."""
        return asyncio.get_running_loop().run_in_executor(self._threads, self._with_driver, fn)

    def _with_driver(self, fn: Callable[[_Driver], T]) -> T:
        driver = self._free.get()
        try:
            return fn(driver)
        finally:
            driver.rollback()
            self._free.put(driver)

    async def close(self) -> None:
        """Wait for what runs, then close the connections."""
        await asyncio.to_thread(self._threads.shutdown)
        for driver in self.drivers:
            driver.close()


@dataclass(slots=True)
class _Commit:
    """A transaction that commits now. Who has seen its effects takes its own place later."""

    jobs: list[Job]
    ended: bool = False


@dataclass(slots=True)
class _Work:
    """Functions of one transaction, on their way."""

    jobs: list[Job]
    commits: "deque[_Commit]"
    commit: _Commit | None = field(default=None)

    def run(self, driver: _Driver) -> bool:
        """Run the functions, again after a conflict; say whether they were committed."""
        wanted = [job for job in self.jobs if job.wanted]
        attempt = 0
        while True:
            attempt += 1
            for job in wanted:
                job.clear()
            driver.attempt = attempt
            error = self._attempt(wanted, driver)
            driver.rollback()
            if error is None:
                return bool(wanted)
            if attempt >= _attempts(error):
                for job in wanted:
                    job.error = _refusal(error)
                return False
            time.sleep(random.uniform(0, _PAUSE_SECONDS * 2**attempt))

    def _attempt(self, jobs: list[Job], driver: _Driver) -> BaseException | None:
        try:
            driver.begin("BEGIN")
            for job in jobs:
                job.call(driver)
                if job.error is not None:
                    return job.error
            if driver.status == TransactionStatus.INERROR:  # COMMIT would answer ROLLBACK, and be no error
                return psycopg.errors.InFailedSqlTransaction("the function went on after an error of the database")
            self._take_place()
            driver.execute("COMMIT")
        except (psycopg.Error, DatabaseRefused, DatabaseUnavailable) as error:
            return error
        return None

    def _take_place(self) -> None:
        """Take the place in which this is announced, behind all that has been committed so far."""
        self.leave()
        self.commit = _Commit(self.jobs)
        self.commits.append(self.commit)

    def leave(self) -> None:
        """Give up the place, if there is one."""
        if self.commit is not None:
            self.commit.jobs = []
            self.commit.ended = True


class PostgresDatabase(Database):
    """A service's database on a server."""

    dialect = "postgresql"

    def __init__(self, url: str, writers: int = WRITERS, readers: int = READERS) -> None:
        super().__init__()
        self._writers = _Pool(url, writers)
        self._readers = _Pool(url, readers)
        self._asking = _Pool(url, 1)
        self._running: set[asyncio.Future[bool]] = set()
        self._commits: deque[_Commit] = deque()
        self._closed = False
        self._notices = Notices(url, self._send)
        self._guard: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """See whether the server answers, and listen to what others commit."""
        if self._guard is None:
            self._guard = asyncio.create_task(self._hang_up_on_silence())
        await self.ask()
        await self._notices.start()

    async def close(self) -> None:
        """Run what waits, then close."""
        if self._closed:
            return
        self._ride_now()
        while self._running:
            await asyncio.wait(self._running)
        await self._notices.close()
        self._closed = True
        for pool in self._pools:
            await pool.close()
        if self._guard is not None:
            self._guard.cancel()

    @property
    def statements(self) -> int:
        """Statements run so far."""
        return sum(driver.statements for driver in self._drivers)

    @property
    def _pools(self) -> tuple[_Pool, ...]:
        return self._writers, self._readers, self._asking

    @property
    def _drivers(self) -> list[_Driver]:
        return [driver for pool in self._pools for driver in pool.drivers]

    @property
    def shared(self) -> bool:
        """Other processes may use it, too."""
        return True

    def hear(self, topic: str, hear: Hear, look: Look) -> None:
        """Have what other processes tell of a topic heard."""
        self._notices.add(topic, hear, look)

    def tell(self, topic: str, subject: str, word: str) -> None:
        """Tell other processes."""
        self._notices.tell(topic, subject, word)

    async def _send(self, messages: list[str]) -> None:
        def notify(driver: _Driver) -> None:
            driver.begin("BEGIN")
            driver.execute("SET LOCAL synchronous_commit = off")
            driver.execute(_NOTIFY, [CHANNEL, messages])
            driver.execute("COMMIT")

        try:
            await self._writers.run(notify)
        except (psycopg.Error, DatabaseRefused) as error:
            raise DatabaseUnavailable(str(error)) from error

    async def _hang_up_on_silence(self) -> None:
        while True:
            await asyncio.sleep(_CUT_SECONDS / 8)
            for driver in self._drivers:
                driver.hang_up_on_silence()

    def _submit(self, job: Job) -> None:
        if self._closed:
            raise DatabaseUnavailable("it is closed")
        self._start([job])

    def _flush(self) -> None:
        riding = self._take_riding()
        if riding and not self._closed:
            self._start(riding)

    def _start(self, jobs: list[Job]) -> None:
        work = _Work(jobs, self._commits)
        running = self._writers.run(work.run)
        self._running.add(running)
        running.add_done_callback(partial(self._ended, work))

    def _ended(self, work: _Work, ran: "asyncio.Future[bool]") -> None:
        self._running.discard(ran)
        error = ran.exception()
        if error is None and ran.result() and work.commit is not None:
            self.commits += 1
            work.commit.ended = True
        else:
            work.leave()
            for job in work.jobs:
                job.error = job.error or error
                self._deliver(job)
        while self._commits and self._commits[0].ended:
            for job in self._commits.popleft().jobs:
                self._deliver(job)

    async def ask(self) -> None:
        """Have the server answer on a connection of its own: many who read say nothing of it."""
        await self._asking.run(partial(_read, _nothing, (), {}))

    async def read(self, fn: Callable[Concatenate[Reader, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function that only reads, on one consistent state."""
        if self._closed:
            raise DatabaseUnavailable("it is closed")
        return await self._readers.run(in_context(partial(_read, fn, args, kwargs)))


def _nothing(_: Reader) -> None:
    return


def _read(fn: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any], driver: _Driver) -> T:
    try:
        driver.begin("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        return fn(Reader(driver), *args, **kwargs)
    except (psycopg.Error, DatabaseRefused) as error:
        raise _refusal(error) from error.__cause__
    except StopIteration as error:
        raise raisable(error) from error


def _attempts(error: BaseException) -> int:
    """Return how often a function that fails so is run."""
    if getattr(error, "sqlstate", None) in _CONFLICTS:
        return _ATTEMPTS
    return _ATTEMPTS_TAKEN if _is_race(error) else 1


def _is_race(error: BaseException) -> bool:
    """Say whether somebody else may have been faster, which a second look shows."""
    return isinstance(error, Raced) or getattr(error, "sqlstate", None) == _TAKEN


def _refusal(error: BaseException) -> BaseException:
    """Return the error as callers know it: what the server cannot do is a DatabaseError."""
    state = getattr(error, "sqlstate", None)
    if isinstance(error, DatabaseRefused):
        return DatabaseUnavailable(str(error))
    if isinstance(error, DatabaseError) or not (isinstance(error, psycopg.OperationalError) or state == _READ_ONLY):
        return error
    refusal = DatabaseBusy(str(error)) if state in _BUSY else DatabaseUnavailable(str(error))
    refusal.__cause__ = error
    return refusal
