"""What a transaction's function is given, and how a database refuses."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from branchline.v1.errors_pb2 import ERROR_REASON_DATABASE_BUSY, ERROR_REASON_DATABASE_UNAVAILABLE

from services.runtime.database.statement import TAKE_TURN, Compiled, Parameters, Statement, Values
from services.runtime.errors import Unavailable

T = TypeVar("T")

_NONE: Parameters = {}


class DatabaseError(Unavailable):
    """The database could not do it, whatever the function.

    Nothing was done, unless the connection to a server broke in the middle of its COMMIT.
    """


class DatabaseBusy(DatabaseError):
    """Another process kept the database too long."""

    def __init__(self, message: str) -> None:
        super().__init__(ERROR_REASON_DATABASE_BUSY, f"the database is busy: {message}")


class DatabaseUnavailable(DatabaseError):
    """The database cannot be reached, is full or broken."""

    def __init__(self, message: str) -> None:
        super().__init__(ERROR_REASON_DATABASE_UNAVAILABLE, f"the database is not available: {message}")


class DatabaseRefused(ValueError):
    """The database that the settings name will not do, now or later; the message says why, and holds no password."""


class Raced(Unavailable):
    """What the function read is no more so: another was faster. The function is run again, a few times."""

    def __init__(self) -> None:
        super().__init__(ERROR_REASON_DATABASE_BUSY, "others change the same at this moment; try again")


class Driver(Protocol):
    """A driver's connection, as both databases have it."""

    statements: int
    """Statements run so far; a batch counts once."""

    def execute(self, text: str, parameters: Values | None = None) -> Any:
        """Run a statement and return its cursor."""
        ...

    def execute_many(self, text: str, parameters: Sequence[Values]) -> int:
        """Run a statement for each of the parameters; return the number of rows that changed."""
        ...

    def compiled(self, statement: Statement) -> Compiled:
        """Return the statement as it is for this database."""
        ...

    def is_outage(self, error: BaseException) -> bool:
        """Say whether an error is the database's own, such as a full disk, and not the function's."""
        ...


class Reader:
    """An open transaction that sees one consistent state."""

    __slots__ = ("_driver",)

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def each(self, statement: Statement, parameters: Parameters = _NONE) -> Iterator[Any]:
        """Yield rows as named tuples, one after the other; stop when you have enough."""
        compiled = self._driver.compiled(statement)
        self._driver.statements += 1
        convert = compiled.convert
        for row in self._driver.execute(compiled.text, compiled.values(parameters)):
            yield convert(row)

    def rows(self, statement: Statement, parameters: Parameters = _NONE) -> list[Any]:
        """Return rows as named tuples."""
        compiled = self._driver.compiled(statement)
        self._driver.statements += 1
        found = self._driver.execute(compiled.text, compiled.values(parameters)).fetchall()
        return [compiled.convert(row) for row in found]

    def row(self, statement: Statement, parameters: Parameters = _NONE) -> Any | None:
        """Return the first row, or None."""
        found = self.rows(statement, parameters)
        return found[0] if found else None

    def is_outage(self, error: BaseException) -> bool:
        """Say whether an error is the database's own, such as a full disk, and not the function's."""
        return self._driver.is_outage(error)

    def value(self, statement: Statement, parameters: Parameters = _NONE) -> Any:
        """Return the first column of the first row, or None."""
        found = self.rows(statement, parameters)
        return found[0][0] if found else None


class Tx(Reader):
    """An open transaction that may write."""

    __slots__ = ("_due", "told")

    def __init__(self, driver: Driver) -> None:
        super().__init__(driver)
        self.told: list[Callable[[], None]] = []
        self._due: list[tuple[Callable[[Tx, Sequence[Any]], None], Sequence[Any]]] = []

    def change(self, statement: Statement, parameters: Parameters = _NONE) -> int:
        """Return the number of rows that changed."""
        compiled = self._driver.compiled(statement)
        self._driver.statements += 1
        return self._driver.execute(compiled.text, compiled.values(parameters)).rowcount

    def change_many(self, statement: Statement, parameters: Sequence[Parameters]) -> int:
        """Change rows, all with one statement; return their number."""
        if not parameters:
            return 0
        compiled = self._driver.compiled(statement)
        self._driver.statements += 1
        return self._driver.execute_many(compiled.text, [compiled.values(given) for given in parameters])

    def change_each(self, statement: Statement, parameters: Sequence[Parameters]) -> None:
        """Change a row for each of the parameters; raise Raced if one is not as it was read.

        For a state that follows from one that was read, or from none: `upsert(table, keys, newer="revision")`. No lock
        can hold what is not there yet, so two may both find nothing; here the slower one finds out.
        """
        if self.change_many(statement, parameters) < len(parameters):
            raise Raced

    def take_turn(self, what: str, owner_id: str) -> None:
        """Wait for others that count the same of one owner before they add to it; keep them waiting until the commit.

        Whoever keeps a limit calls this before it counts. No lock on rows holds those that are not there yet, so two
        would both find room for the last one.
        """
        self.value(TAKE_TURN, {"turn": f"{what}/{owner_id}"})

    @contextmanager
    def savepoint(self) -> Generator[None, None, None]:
        """Undo what the block did, and only that, if it raises."""
        told, due = len(self.told), len(self._due)
        self._driver.execute("SAVEPOINT part")
        try:
            yield
        except BaseException as error:
            del self.told[told:]
            del self._due[due:]
            try:
                self._driver.execute("ROLLBACK TO SAVEPOINT part")
                self._driver.execute("RELEASE SAVEPOINT part")
            except Exception:  # noqa: BLE001 - the whole transaction is lost, and the first error says why
                raise error from error.__cause__
            raise
        self._driver.execute("RELEASE SAVEPOINT part")

    def at_end(self, write: Callable[["Tx", Sequence[T]], None], items: Sequence[T]) -> None:
        """Have items written at the end of the function, all that are given for the same `write` at once."""
        self._due.append((write, items))

    def end(self) -> None:
        """Write what is due. The function has returned."""
        due: dict[Callable[[Tx, Sequence[Any]], None], list[Any]] = {}
        for write, items in self._due:
            due.setdefault(write, []).extend(items)
        for write, items in due.items():
            write(self, items)

    def after_commit(self, tell: Callable[[], None]) -> None:
        """Have something called in the event loop once this is committed."""
        self.told.append(tell)
