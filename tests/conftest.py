"""One installation serves all integration tests; each test makes its own organization, repository or task."""

import os

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
import pytest_asyncio

from services.runtime.logging import configure_logging
from tests.support.stack import Stack, running_stack

configure_logging(level=os.environ.get("TESTS_LOG_LEVEL", "error"))


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Stack, None]:
    folder: Path = tmp_path_factory.mktemp("installation")
    async with running_stack(folder) as running:
        yield running
