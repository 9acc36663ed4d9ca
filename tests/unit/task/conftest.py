"""A database of its own for every test of the task room."""

from collections.abc import AsyncGenerator
from pathlib import Path

import pytest_asyncio

from services.runtime.principal import bind_principal
from tests.unit.task.room import CALLER, Room, new_database


@pytest_asyncio.fixture
async def room(tmp_path: Path) -> AsyncGenerator[Room, None]:
    database = new_database(tmp_path)
    await database.start()
    yield Room(database)
    await database.close()


@pytest_asyncio.fixture(autouse=True)
async def caller() -> AsyncGenerator[None, None]:
    """Let every test act for Ann."""
    bind_principal(CALLER)
    yield
    bind_principal(None)
