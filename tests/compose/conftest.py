"""An Engine, images built from this checkout, and one installation for all tests of the module."""

from collections.abc import AsyncGenerator, Generator

import pytest
import pytest_asyncio

from tests.compose.installation import Composed, build_images, composed
from tests.compose.work import git_repository
from tests.support.client import Client
from tests.support.engine import running_engine


@pytest.fixture(scope="session")
def engine() -> Generator[None, None, None]:
    with running_engine():
        yield


@pytest.fixture(scope="session")
def images(engine: None) -> None:
    build_images()


@pytest.fixture(scope="module")
def installation(images: None) -> Generator[Composed, None, None]:
    with composed() as made:
        yield made


@pytest_asyncio.fixture
async def client(installation: Composed) -> AsyncGenerator[Client, None]:
    async with installation.client() as made:
        yield made


@pytest_asyncio.fixture
async def repository(client: Client) -> str:
    return await git_repository(client)
