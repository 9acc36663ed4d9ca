"""A server and a client of it for each test."""

from collections.abc import AsyncGenerator

import pytest_asyncio
from branchline import AsyncClient

from tests.unit.sdk.server import Server, served


@pytest_asyncio.fixture
async def server() -> AsyncGenerator[Server, None]:
    async with served() as running:
        yield running


@pytest_asyncio.fixture
async def client(server: Server) -> AsyncGenerator[AsyncClient, None]:
    async with AsyncClient(server.address, "secret", timeout_seconds=10) as client:
        yield client
