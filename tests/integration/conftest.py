"""One installation serves all integration tests; each test makes its own organization, repository or task."""

from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.support.stack import Stack, running_stack


@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Stack, None]:
    folder: Path = tmp_path_factory.mktemp("installation")
    async with running_stack(folder) as running:
        yield running
