"""The sandbox's stores on a real database."""

from collections.abc import AsyncGenerator
from pathlib import Path

import pytest_asyncio

from services.runtime.clock import Clock
from services.runtime.database import Database, open_database
from services.runtime.spine.outbox import Outbox
from services.sandbox.reports import Reports
from services.sandbox.sessions import SessionStore
from services.sandbox.store import SandboxStore
from tests.support.databases import migrated


@pytest_asyncio.fixture
async def database(tmp_path: Path) -> AsyncGenerator[Database, None]:
    opened = open_database(migrated("sandbox", tmp_path))
    await opened.start()
    yield opened
    await opened.close()


@pytest_asyncio.fixture
async def outbox(database: Database) -> Outbox:
    return Outbox(database, Clock())


@pytest_asyncio.fixture
async def sessions(outbox: Outbox) -> SessionStore:
    return SessionStore(outbox, Clock().timestamp)


@pytest_asyncio.fixture
async def reports(database: Database, outbox: Outbox) -> Reports:
    return Reports(database, outbox, Clock(), ["local"])


@pytest_asyncio.fixture
async def sandboxes(outbox: Outbox) -> SandboxStore:
    return SandboxStore(outbox, Clock())
