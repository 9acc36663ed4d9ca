"""The database of a service as its code knows it, and the work that waits for it."""

import asyncio
import contextvars
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from services.runtime.database.transaction import DatabaseUnavailable, Driver, Reader, Tx
from services.runtime.logging import get_logger

log = get_logger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
D = TypeVar("D", bound=Driver)

REFUSING_SECONDS = 15.0
"""Time for which a refused transaction counts where no other shows whether the database works again."""

RIDE_SECONDS = 5.0
"""Longest time that `ride` waits for a transaction to ride on."""


def raisable(error: BaseException) -> BaseException:
    """Return an error that a future can hold: StopIteration means something else there."""
    if not isinstance(error, StopIteration):
        return error
    other = RuntimeError("a function of the database raised StopIteration")
    other.__cause__ = error
    return other


def in_context(call: Callable[[D], T]) -> Callable[[D], T]:
    """Return a call that sees the context variables of now."""
    context = contextvars.copy_context()
    return lambda driver: context.run(call, driver)


class Job:
    """A function that waits for its transaction, then its outcome."""

    __slots__ = ("args", "context", "error", "fn", "future", "kwargs", "result", "told")

    def __init__(
        self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], future: asyncio.Future[Any] | None
    ) -> None:
        self.fn, self.args, self.kwargs, self.future = fn, args, kwargs, future
        self.context = contextvars.copy_context()
        self.clear()

    @property
    def wanted(self) -> bool:
        """Whether anybody waits for it still."""
        return self.future is None or not self.future.cancelled()

    def clear(self) -> None:
        """Forget an outcome, so that it can be run again."""
        self.result: Any = None
        self.error: BaseException | None = None
        self.told: list[Callable[[], None]] = []

    def call(self, driver: Driver) -> None:
        """Run the function, in the database's thread."""
        tx = Tx(driver)
        try:
            self.result = self.context.run(self.fn, tx, *self.args, **self.kwargs)
            tx.end()
            self.told = tx.told
        except BaseException as error:  # noqa: BLE001 - it is the caller's
            self.error = raisable(error)

    def deliver(self) -> None:
        """Tell what is committed, then the caller; in the event loop."""
        if self.error is None:
            for tell in self.told:
                try:
                    tell()
                except Exception:
                    log.exception("an announcement failed", of=self.fn.__qualname__)
        if self.future is None:
            if self.error is not None:
                log.warning("a ride failed", of=self.fn.__qualname__, error=str(self.error))
        elif not self.future.done():
            if self.error is None:
                self.future.set_result(self.result)
            else:
                self.future.set_exception(self.error)


class Database(ABC):
    """The database of one service. Nobody else opens it."""

    dialect: str
    """"sqlite" or "postgresql"."""

    def __init__(self) -> None:
        self._riding: list[Job] = []
        self._ride_timer: asyncio.TimerHandle | None = None
        self.commits = 0
        """Transactions committed so far; a group counts once."""
        self._refused = -math.inf

    @property
    def refusing(self) -> bool:
        """Whether the last transaction failed for no fault of its own, and not long ago: the database is full, say."""
        return time.monotonic() - self._refused < REFUSING_SECONDS

    async def ask(self) -> None:
        """Have the database answer, whatever else it has to do. Raise DatabaseError if it cannot."""
        await self.read(lambda _: None)

    @property
    def shared(self) -> bool:
        """Whether other processes may commit to it, too; then `tell` and `hear` work."""
        return False

    def tell(self, topic: str, subject: str, word: str) -> None:  # noqa: B027 - nobody is there
        """Tell other processes what was committed: a word on a subject, the newest of which they hear."""

    def hear(  # noqa: B027
        self,
        topic: str,
        hear: Callable[[Mapping[str, str]], None],
        look: Callable[[bool], Awaitable[None]],
    ) -> None:
        """Have words of other processes on a topic heard, by their subjects, some time after the commit.

        A notice may be lost: `look` is called every few seconds to see for itself, with True where many may be.
        """

    @abstractmethod
    async def start(self) -> None:
        """Connect."""

    @abstractmethod
    async def close(self) -> None:
        """Run what waits, then close all connections."""

    @abstractmethod
    def _submit(self, job: Job) -> None:
        """Have a job run."""

    @abstractmethod
    def _flush(self) -> None:
        """Run what rides although nothing else happens, at the next opportunity."""

    def _deliver(self, job: Job) -> None:
        """Tell how a job ended, and remember whether the database works."""
        if job.error is None or isinstance(job.error, DatabaseUnavailable):
            self._refused = -math.inf if job.error is None else time.monotonic()
        job.deliver()

    @property
    @abstractmethod
    def statements(self) -> int:
        """Statements run so far, those that read among them; a batch counts once."""

    @abstractmethod
    async def read(self, fn: Callable[Concatenate[Reader, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function that only reads, on one consistent state."""

    async def write(self, fn: Callable[Concatenate[Tx, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function as a transaction; return what it returns once that is durable.

        Raise what it raises, with nothing done, or a DatabaseError.
        """
        job = Job(fn, args, kwargs, asyncio.get_running_loop().create_future())
        assert job.future is not None
        self._submit(job)
        return await job.future

    def ride(self, fn: Callable[Concatenate[Tx, P], object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Have a function run with the next transaction that happens anyway, in a few seconds at the latest.

        For what may also be lost: nobody hears of its end, and a closed database does nothing.
        """
        self._riding.append(Job(fn, args, kwargs, None))
        if self._ride_timer is None:
            self._ride_timer = asyncio.get_running_loop().call_later(RIDE_SECONDS, self._ride_now)

    def _ride_now(self) -> None:
        self._ride_timer = None
        if self._riding:
            self._flush()

    @property
    def _ride_due(self) -> bool:
        """Whether something rides whose time is over."""
        return bool(self._riding) and self._ride_timer is None

    def _take_riding(self) -> list[Job]:
        riding, self._riding = self._riding, []
        if self._ride_timer is not None:
            self._ride_timer.cancel()
            self._ride_timer = None
        return riding


def open_database(url: str) -> Database:
    """Return the database that a URL names, not yet connected: `sqlite:///PATH` or `postgresql://...`."""
    if url.startswith("sqlite:///"):
        from services.runtime.database.sqlite import SqliteDatabase  # noqa: PLC0415 - only the driver that is used

        return SqliteDatabase(Path(url.removeprefix("sqlite:///")))
    if url.startswith("postgresql://"):
        from services.runtime.database.postgres import PostgresDatabase  # noqa: PLC0415

        return PostgresDatabase(url)
    raise ValueError(f'a database is "sqlite:///PATH" or "postgresql://...", not {url.partition(":")[0]!r}')
