"""Statements of SQLAlchemy Core, compiled once for SQLite and PostgreSQL and run straight on the driver."""

import json
from collections import namedtuple
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, cached_property
from operator import itemgetter
from typing import Any, cast

from sqlalchemy import (
    ARRAY,
    BindParameter,
    Boolean,
    ColumnElement,
    Delete,
    Insert,
    Select,
    String,
    Table,
    TypeDecorator,
    Update,
    bindparam,
    select,
)
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler

Parameters = Mapping[str, Any]
Values = Parameters | Sequence[Any]
"""Parameters as a driver takes them: by name or by position."""
Core = Select[*tuple[Any, ...]] | Insert | Update | Delete

_SQLITE = SQLiteDialect_pysqlite(paramstyle="qmark")
"""By position: sqlite3 looks every named parameter up anew for every row."""
_BY_DRIVER = (bool, bytes, float)
"""Types whose values the sqlite3 driver takes as they are."""


class Compiled:
    """A statement's text for one dialect, and how values go in and come out where the driver does not see to it."""

    __slots__ = ("convert", "text", "values")

    def __init__(self, core: Core, dialect: Dialect) -> None:
        compiled = core.compile(dialect=dialect)
        if compiled.post_compile_params:
            raise TypeError("an IN of unknown length: use is_in")
        self.text = str(compiled)
        binds = {name: bind for bind, name in compiled.bind_names.items()}
        fixed = {name: bind.value for name, bind in binds.items() if not bind.required}
        into = {
            name: process
            for name, bind in binds.items()
            if (process := bind.type.dialect_impl(dialect).bind_processor(dialect))
            and not (dialect is _SQLITE and _python_type(bind.type) in _BY_DRIVER)
        }
        named: Callable[[Parameters], Parameters] = _same
        if fixed or into:
            named = lambda given: {  # noqa: E731
                name: into[name](value) if name in into else value for name, value in {**fixed, **given}.items()
            }
        self.values: Callable[[Parameters], Values] = named
        if compiled.positiontup is not None:
            ordered = _in_order(compiled.positiontup)
            self.values = (lambda given: ordered(named(given))) if fixed or into else ordered
        columns = list(core.selected_columns) if isinstance(core, Select) else list(core.exported_columns)
        names = [column.key or f"column_{number}" for number, column in enumerate(columns)]
        make: Callable[[Sequence[Any]], Any] = _row_type(names) if columns else _same
        out = [
            (number, process)
            for number, column in enumerate(columns)
            if dialect is _SQLITE and (process := column.type.dialect_impl(dialect).result_processor(dialect, None))
        ]
        self.convert: Callable[[Sequence[Any]], Any] = _converting(make, out) if out else make


@cache
def _postgres() -> Dialect:
    from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg  # noqa: PLC0415

    return PGDialect_psycopg()


class Statement:
    """A statement of Core, compiled once. Make it at module level."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.sqlite = Compiled(core, _SQLITE)

    @cached_property
    def postgres(self) -> Compiled:
        """The statement for PostgreSQL, whose dialect only those processes load that use it."""
        return Compiled(self.core, _postgres())


class _OnConflict(Insert):
    """An insert that says what becomes of a row whose keys are there; both databases write it in the same words."""

    inherit_cache = False
    keys: Sequence[str] = ()
    changed: Sequence[str] = ()
    newer = ""
    same: Sequence[str] = ()


@compiles(_OnConflict)
def _on_conflict(element: _OnConflict, compiler: SQLCompiler, **options: Any) -> str:
    quote = compiler.preparer.quote
    inserted = cast("Any", compiler).visit_insert(element, **options)
    text = f"{inserted} ON CONFLICT ({', '.join(map(quote, element.keys))})"
    if not element.changed:
        return f"{text} DO NOTHING"
    changes = ", ".join(f"{quote(name)} = excluded.{quote(name)}" for name in element.changed)
    text = f"{text} DO UPDATE SET {changes}"
    if not element.newer:
        return text
    conditions = [(element.newer, "<"), *((name, "=") for name in element.same)]
    held = quote(element.table.name)
    wanted = " AND ".join(f"{held}.{quote(name)} {sign} excluded.{quote(name)}" for name, sign in conditions)
    return f"{text} WHERE {wanted}"


def insert(table: Table, *leave_out: str) -> Insert:
    """Insert a row; one parameter for each column, by its name, but for those left out."""
    return Insert(table).values(_parameters(table, leave_out))


def insert_new(table: Table, keys: Sequence[str], *leave_out: str) -> Insert:
    """Insert a row unless one with the same keys is there."""
    statement = _OnConflict(table).values(_parameters(table, leave_out))
    statement.keys = keys
    return statement


def upsert(
    table: Table,
    keys: Sequence[str],
    *,
    newer: str = "",
    same: Sequence[str] = (),
    keep: Iterable[str] = (),
    leave_out: Sequence[str] = (),
) -> Insert:
    """Insert a row, or change the one with the same keys.

    With `newer`, only if that column of what is held is smaller than the given one, and those in `same` are as given.
    Columns in `keep` and `same` are set by the insertion alone; those in `leave_out` are not parameters at all.
    """
    statement = _OnConflict(table).values(_parameters(table, leave_out))
    kept = {*keys, *keep, *same, *leave_out}
    statement.keys, statement.newer, statement.same = keys, newer, same
    statement.changed = [column.name for column in table.columns if column.name not in kept]
    return statement


def _parameters(table: Table, leave_out: Iterable[str]) -> dict[str, BindParameter[Any]]:
    left_out = set(leave_out)
    return {one.name: bindparam(one.name, type_=one.type) for one in table.columns if one.name not in left_out}


class _List(TypeDecorator[Any]):
    """A parameter that holds a list of words: JSON on SQLite, an array on PostgreSQL."""

    impl = String
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> Any:
        kind: Any = ARRAY(String) if dialect.name == "postgresql" else String()
        return dialect.type_descriptor(kind)

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        return list(value) if dialect.name == "postgresql" else json.dumps(list(value))


class is_in(ColumnElement[bool]):  # noqa: N801 - reads like a function of SQLAlchemy
    """The column's value is one of a list given as a parameter, whatever its length."""

    inherit_cache = False
    type = Boolean()

    def __init__(self, column: ColumnElement[Any], parameter: str, *, negate: bool = False) -> None:
        self.column = column
        self.bind = bindparam(parameter, type_=_List())
        self.negate = negate

    def self_group(self, against: Any = None) -> "is_in":
        """Stay as it is in a WHERE: SQLAlchemy would compare it with 1, and no index serves that."""
        return self


@compiles(is_in, "sqlite")
def _is_in_sqlite(element: is_in, compiler: SQLCompiler, **options: Any) -> str:
    column, bind = compiler.process(element.column, **options), compiler.process(element.bind, **options)
    return f"{column} {'NOT IN' if element.negate else 'IN'} (SELECT value FROM json_each({bind}))"  # noqa: S608


@compiles(is_in, "postgresql")
def _is_in_postgres(element: is_in, compiler: SQLCompiler, **options: Any) -> str:
    column, bind = compiler.process(element.column, **options), compiler.process(element.bind, **options)
    kind = compiler.dialect.type_compiler_instance.process(element.column.type)
    return f"{column} {'<> ALL' if element.negate else '= ANY'} (CAST({bind} AS {kind}[]))"


class _Turn(ColumnElement[None]):
    """Waits until no other transaction has the turn that a parameter names, and keeps it until this one ends."""

    inherit_cache = False

    def __init__(self) -> None:
        self.bind = bindparam("turn", type_=String)


@compiles(_Turn, "sqlite")
def _turn_sqlite(element: _Turn, compiler: SQLCompiler, **options: Any) -> str:
    return compiler.process(element.bind, **options)  # its writers take turns by themselves


@compiles(_Turn, "postgresql")
def _turn_postgres(element: _Turn, compiler: SQLCompiler, **options: Any) -> str:
    return f"pg_advisory_xact_lock(hashtextextended({compiler.process(element.bind, **options)}, 0))"


def _row_type(names: Sequence[str]) -> Callable[[Sequence[Any]], Any]:
    made = namedtuple("Row", names, rename=True)  # pyright: ignore[reportUntypedNamedTuple] - known at run time only
    return made._make


def _in_order(names: Sequence[str]) -> Callable[[Parameters], Sequence[Any]]:
    if len(names) > 1:
        return itemgetter(*names)
    return lambda given: [given[name] for name in names]


def _same(value: Any) -> Any:
    return value


def _python_type(kind: Any) -> type | None:
    try:
        return kind.python_type
    except NotImplementedError:
        return None


def _converting(
    make: Callable[[Sequence[Any]], Any], out: Sequence[tuple[int, Callable[[Any], Any]]]
) -> Callable[[Sequence[Any]], Any]:
    def convert(row: Sequence[Any]) -> Any:
        values = list(row)
        for number, process in out:
            values[number] = process(values[number])
        return make(values)

    return convert


TAKE_TURN = Statement(select(_Turn().label("taken")))
