"""The four-statement write: remember a request, upsert an entity, mark the outbox, raise a sequence.

The floor runs the same texts in a loop on raw `sqlite3`, with the same commits and nothing else.
"""

import asyncio
import itertools
import sqlite3
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import BigInteger, Column, LargeBinary, MetaData, String, Table, bindparam, create_engine, update

from services.runtime.database import Database, Statement, Tx, insert, open_database, upsert
from services.runtime.spine.tables import add_spine_tables
from tests.bench.result import Figures, Options, Row, against, interleave, p50

CALLERS = 32
_PAYLOAD = bytes(500)
_ENTITIES = 1000

metadata = MetaData()
add_spine_tables(metadata, coordinator=True, commands=True)
entities = Table(
    "entities",
    metadata,
    Column("id", String, primary_key=True),
    Column("revision", BigInteger, nullable=False),
    Column("payload", LargeBinary, nullable=False),
)
_requests, _outbox, _sequences = (metadata.tables[name] for name in ("requests", "outbox", "change_sequences"))
_REMEMBER = Statement(insert(_requests))
_PUT = Statement(upsert(entities, ["id"], newer="revision"))
_MARK = Statement(upsert(_outbox, ["destination", "type_url", "entity_id"]))
_RAISE = Statement(
    update(_sequences)
    .where(_sequences.c.scope == bindparam("of"))
    .values(value=_sequences.c.value + bindparam("count"))
    .returning(_sequences.c.value)
)
_FOUR = [statement.sqlite for statement in (_REMEMBER, _PUT, _MARK, _RAISE)]


def _parameters(number: int) -> list[dict[str, Any]]:
    entity = f"task_{number % _ENTITIES:032d}"
    request = {"caller": "usr_1", "method": "Write", "request_id": f"{number:032d}", "fingerprint": "0" * 64}
    mark = {"destination": "coordinator", "type_url": "type.googleapis.com/branchline.v1.Task"}
    return [
        {**request, "response": b"", "create_time": float(number)},
        {"id": entity, "revision": number, "payload": _PAYLOAD},
        {
            **mark,
            "entity_id": entity,
            "seq": number,
            "revision": number,
            "deleted": False,
            "payload": _PAYLOAD,
            "mark_time": float(number),
            "attempts": 0,
            "parked_reason": "",
        },
        {"of": "org_1", "count": 1},
    ]


def _four(tx: Tx, number: int) -> None:
    remember, put, mark, sequence = _parameters(number)
    tx.change(_REMEMBER, remember)
    tx.change(_PUT, put)
    tx.change(_MARK, mark)
    tx.value(_RAISE, sequence)


def _raw_four(connection: sqlite3.Connection, number: int) -> None:
    for statement, given in zip(_FOUR, _parameters(number), strict=True):
        connection.execute(statement.text, statement.values(given)).fetchall()


class _Files:
    """A new file with the tables for every round."""

    def __init__(self, folder: Path) -> None:
        self._paths = (folder / f"write-{number}.sqlite" for number in itertools.count())

    def _made(self) -> Path:
        path = next(self._paths)
        engine = create_engine(f"sqlite:///{path}")
        metadata.create_all(engine)
        with engine.begin() as connection:
            connection.execute(_sequences.insert().values(scope="org_1", value=0, horizon=0))
        engine.dispose()
        return path

    @asynccontextmanager
    async def ours(self) -> AsyncGenerator[Database, None]:
        """Open a file as services do."""
        database = open_database(f"sqlite:///{self._made()}")
        await database.start()
        try:
            yield database
        finally:
            await database.close()

    @contextmanager
    def raw(self) -> Generator[sqlite3.Connection, None, None]:
        """Open a file with the same durability."""
        connection = sqlite3.connect(self._made(), isolation_level=None)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        try:
            yield connection
        finally:
            connection.close()


async def one_caller(options: Options, folder: Path) -> list[Row]:
    """Write one after the other, each committed alone."""
    files = _Files(folder)

    async def floor() -> Figures:
        took: list[float] = []
        with files.raw() as connection:
            for number in range(options.samples):
                began = time.perf_counter()
                connection.execute("BEGIN IMMEDIATE")
                _raw_four(connection, number)
                connection.execute("COMMIT")
                took.append(time.perf_counter() - began)
        return {"p50": p50(took)}

    async def ours() -> Figures:
        took: list[float] = []
        async with files.ours() as database:
            for number in range(options.samples):
                began = time.perf_counter()
                await database.write(_four, number)
                took.append(time.perf_counter() - began)
        return {"p50": p50(took)}

    rounds = await interleave(options.rounds, floor, ours)
    return against("four-statement write, one caller, p50", "ms", rounds["p50"], 2.0)


async def many_callers(options: Options, folder: Path) -> list[Row]:
    """Write from 32 callers at once; the floor puts 32 into each commit."""
    files = _Files(folder)
    each = options.samples * 4 // CALLERS

    async def floor() -> Figures:
        with files.raw() as connection:
            began = time.perf_counter()
            for first in range(0, each * CALLERS, CALLERS):
                connection.execute("BEGIN IMMEDIATE")
                for number in range(first, first + CALLERS):
                    _raw_four(connection, number)
                connection.execute("COMMIT")
            return {"rate": each * CALLERS / (time.perf_counter() - began)}

    async def ours() -> Figures:
        async with files.ours() as database:
            numbers = itertools.count()

            async def caller() -> None:
                for _ in range(each):
                    await database.write(_four, next(numbers))

            began = time.perf_counter()
            await asyncio.gather(*(caller() for _ in range(CALLERS)))
            return {"rate": each * CALLERS / (time.perf_counter() - began)}

    rounds = await interleave(options.rounds, floor, ours)
    name = f"four-statement write, {CALLERS} callers"
    return against(name, "1/s", rounds["rate"], 0.5, at_least=True)
