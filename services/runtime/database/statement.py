"""Statements of SQLAlchemy Core, compiled once for SQLite and PostgreSQL and run straight on the driver."""

import json
from collections import namedtuple
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Boolean, Column, ColumnElement, Delete, Select, String, Table, TypeDecorator, Update, bindparam
from sqlalchemy import Insert as CoreInsert
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.dialects.postgresql import Insert as PostgresInsert
from sqlalchemy.dialects.postgresql import insert as _insert
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler

Parameters = Mapping[str, Any]
Core = Select[*tuple[Any, ...]] | CoreInsert | Update | Delete

_SQLITE = SQLiteDialect_pysqlite(paramstyle="named")
_POSTGRES = PGDialect_psycopg()
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
        self.values: Callable[[Parameters], Parameters] = _same
        if fixed or into:
            self.values = lambda given: {
                name: into[name](value) if name in into else value for name, value in {**fixed, **given}.items()
            }
        columns = list(core.selected_columns) if isinstance(core, Select) else list(core.exported_columns)
        names = [column.key or f"column_{number}" for number, column in enumerate(columns)]
        make: Callable[[Sequence[Any]], Any] = _row_type(names) if columns else _same
        out = [
            (number, process)
            for number, column in enumerate(columns)
            if dialect is _SQLITE and (process := column.type.dialect_impl(dialect).result_processor(dialect, None))
        ]
        self.convert: Callable[[Sequence[Any]], Any] = _converting(make, out) if out else make


class Statement:
    """A statement of Core, compiled once. Make it at module level."""

    __slots__ = ("core", "postgres", "sqlite")

    def __init__(self, core: Core) -> None:
        self.core = core
        self.sqlite = Compiled(core, _SQLITE)
        self.postgres = Compiled(core, _POSTGRES)


def insert(table: Table, *leave_out: str) -> PostgresInsert:
    """Insert a row; one parameter for each column, by its name, but for those left out."""
    return _insert(table).values({name: bindparam(name, type_=c.type) for name, c in _columns(table, leave_out)})


def insert_new(table: Table, keys: Sequence[str], *leave_out: str) -> PostgresInsert:
    """Insert a row unless one with the same keys is there."""
    return insert(table, *leave_out).on_conflict_do_nothing(index_elements=list(keys))


def upsert(
    table: Table, keys: Sequence[str], *, newer: str = "", keep: Iterable[str] = (), leave_out: Sequence[str] = ()
) -> PostgresInsert:
    """Insert a row, or change the one with the same keys.

    With `newer`, only if that column of what is held is smaller than the given one. Columns in `keep` are set by the
    insertion alone; those in `leave_out` are not parameters at all.
    """
    statement = insert(table, *leave_out)
    kept = {*keys, *keep}
    return statement.on_conflict_do_update(
        index_elements=list(keys),
        set_={name: statement.excluded[name] for name, _ in _columns(table, leave_out) if name not in kept},
        where=table.c[newer] < statement.excluded[newer] if newer else None,
    )


def _columns(table: Table, leave_out: Iterable[str]) -> list[tuple[str, Column[Any]]]:
    return [(column.name, column) for column in table.columns if column.name not in set(leave_out)]


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


def _row_type(names: Sequence[str]) -> Callable[[Sequence[Any]], Any]:
    made = namedtuple("Row", names, rename=True)  # pyright: ignore[reportUntypedNamedTuple] - known at run time only
    return made._make


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
