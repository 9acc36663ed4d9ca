"""What the tests of Docker sandboxes share: an Engine, and an installation's name that is theirs alone."""

import secrets
from collections.abc import Iterator

import pytest

from services.sandbox.providers.docker.firewall import chain_of
from services.sandbox.providers.docker.networks import bridges_of
from tests.support.engine import SANDBOX_IMAGE, docker, require_engine

_RULES_GO = """
iptables --wait 5 -S INPUT | sed -n '/-j {chain}$/s/^-A/-D/p' | while read -r rule; do iptables --wait 5 $rule; done
iptables --wait 5 -F {chain} 2>/dev/null && iptables --wait 5 -X {chain}
! iptables --wait 5 -S | grep -e '{chain}'
"""
"""Takes an installation's rules out of the host's firewall, as docs/operating.md has it."""


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
    script = _RULES_GO.format(chain=chain_of(bridges_of(name)))
    rights = ("--network", "host", "--user", "0:0", "--cap-add", "NET_ADMIN", "--cap-add", "NET_RAW")
    docker("run", "--rm", *rights, SANDBOX_IMAGE, "sh", "-c", script)
