"""Where the door leads: the task's git remote, what the operator allows, and nothing that is inside. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from ipaddress import IPv6Address, ip_address, ip_network
from urllib.parse import urlsplit

from services.sandbox.door.config import DoorConfig

_PORTS = {"http": 80, "https": 443, "ssh": 22, "git": 9418}


@dataclass(frozen=True, slots=True)
class Place:
    """A host and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def place_of(url: str, default_port: int | None = None) -> Place | None:
    """Return the place that a URL, a git remote or "host:port" leads to; None if it names none."""
    if "://" not in url and default_port is None and "@" in url:  # git@host:path
        host = url.partition("@")[2].partition(":")[0]
        return Place(host.lower(), _PORTS["ssh"]) if host else None
    try:
        parts = urlsplit(url if "://" in url else f"//{url}")
        port = parts.port or default_port or _PORTS.get(parts.scheme)
    except ValueError:
        return None
    return Place(parts.hostname.lower(), port) if parts.hostname and port else None


def leads_to(config: DoorConfig, remote_url: str, place: Place) -> bool:
    """Say whether a sandbox with a git remote may go to a place."""
    return place == place_of(remote_url) or any(fnmatchcase(str(place), pattern) for pattern in config.egress)


def outside(config: DoorConfig, address: str) -> bool:
    """Say whether an address is public, or in one of the networks that the operator has named."""
    found = ip_address(address.partition("%")[0])
    if isinstance(found, IPv6Address) and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    named: Sequence[str] = config.private_networks
    return (found.is_global and not found.is_multicast) or any(found in ip_network(one) for one in named)
