"""Closes the host to sandboxes where the service runs on the host itself.

A network without a way out still has the host in it: Docker drops what would be forwarded, and lets in what is meant
for the host. So whatever comes in from a sandbox's bridge, to whichever of the host's addresses, is refused but for the
door, and for answers to the service. The rules are put where Docker puts its own, by a container with the host's
network: the service needs no right besides the Engine.
"""

from services.sandbox.providers.base import ProviderError
from services.sandbox.providers.docker.engine import Engine

_SECONDS = 30.0

_SCRIPT = """set -eu
iptables-restore --wait 5 --noflush <<RULES
*filter
:{chain} - [0:0]
-A {chain} -p tcp --dport {door} -j ACCEPT
-A {chain} -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
-A {chain} -p tcp -j REJECT --reject-with tcp-reset
-A {chain} -j REJECT
COMMIT
RULES
iptables --wait 5 -C INPUT -i {bridges}+ -j {chain} 2>/dev/null || iptables --wait 5 -I INPUT 1 -i {bridges}+ -j {chain}
"""


def chain_of(bridges: str) -> str:
    """Return the name of the chain that holds the rules of some bridges. One rule of INPUT leads to it."""
    return f"BRANCHLINE-{bridges.strip('-')}"


async def close_host(engine: Engine, image: str, bridges: str, door_port: int) -> None:
    """Let sandboxes reach no port of the host but the door. Raise ProviderError if that cannot be done."""
    script = _SCRIPT.format(chain=chain_of(bridges), bridges=bridges, door=door_port)
    config = {
        "Image": image,
        "Entrypoint": [],
        "Cmd": ["sh", "-c", script],
        "User": "0:0",
        "HostConfig": {"NetworkMode": "host", "CapDrop": ["ALL"], "CapAdd": ["NET_ADMIN", "NET_RAW"]},
    }
    try:
        await engine.run_once(config, _SECONDS)
    except ProviderError as error:
        words = f"the host's ports cannot be closed to sandboxes ({error}); see sandbox.docker.host_firewall"
        raise ProviderError(words) from error
