"""Transactions of one service: one writer, nothing half done, whatever is cancelled."""

import asyncio
from pathlib import Path

import pytest
from sqlalchemy import Column, Integer, MetaData, Table, create_engine, func, insert, select

from services.runtime.database import Database

metadata = MetaData()
numbers = Table("numbers", metadata, Column("number", Integer, primary_key=True))


@pytest.fixture
def database(tmp_path: Path) -> Database:
    engine = create_engine(f"sqlite:///{tmp_path / 'database.sqlite'}")
    metadata.create_all(engine)
    engine.dispose()
    return Database(tmp_path / "database.sqlite")


async def count(database: Database) -> int:
    async with database.read() as reader:
        return (await reader.execute(select(func.count()).select_from(numbers))).scalar_one()


async def add(database: Database, *values: int) -> None:
    async with database.transaction() as tx:
        for value in values:
            await tx.execute(insert(numbers).values(number=value))


async def test_a_transaction_that_raises_leaves_nothing(database: Database) -> None:
    async def fail() -> None:
        async with database.transaction() as tx:
            await tx.execute(insert(numbers).values(number=1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()

    assert await count(database) == 0
    await database.close()


async def test_cancelled_transactions_leave_nothing_half_done_and_no_lock(database: Database) -> None:
    announced: list[int] = []

    async def work(number: int) -> None:
        async with database.transaction() as tx:
            tx.after_commit.append(lambda: announced.append(number))
            await tx.execute(insert(numbers).values(number=number * 2))
            await tx.execute(insert(numbers).values(number=number * 2 + 1))

    for number in range(60):
        task = asyncio.create_task(work(number))
        await asyncio.sleep(number * 0.0001)
        task.cancel()
        await asyncio.wait({task})

    async with asyncio.timeout(5):
        await add(database, 1000)
    assert await count(database) == 2 * len(announced) + 1
    assert len(set(announced)) == len(announced)
    await database.close()


async def test_writers_take_turns_and_readers_see_whole_transactions(database: Database) -> None:
    seen: list[int] = []

    async def look() -> None:
        while len(seen) < 50:
            seen.append(await count(database))

    await asyncio.gather(look(), *(add(database, *range(base, base + 10)) for base in range(0, 200, 10)))

    assert all(number % 10 == 0 for number in seen)
    await database.close()
