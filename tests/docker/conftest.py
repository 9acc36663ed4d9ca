"""What the tests of Docker sandboxes share: an Engine, and an installation's name that is theirs alone."""

import secrets
from collections.abc import Iterator

import pytest

from tests.support.engine import docker, require_engine


@pytest.fixture(autouse=True, scope="session")
def engine() -> None:
    require_engine()


@pytest.fixture(scope="session")
def installation() -> Iterator[str]:
    """A name in the labels of all that a test makes. What is left under it is removed."""
    name = f"tests-{secrets.token_hex(4)}"
    yield name
    label = f"label=branchline.installation={name}"
    for kind, listed in (("container", ("ls", "--all")), ("network", ("ls",)), ("volume", ("ls",))):
        for left in docker(kind, *listed, "--quiet", "--filter", label).split():
            docker(kind, "rm", "--force", left) if kind != "network" else docker(kind, "rm", left)
