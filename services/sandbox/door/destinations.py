"""Where the door leads: the task's git remote, what the operator allows, and nothing that is inside. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from urllib.parse import urlsplit

from services.sandbox.door.config import DoorConfig

_GLOBAL_UNICAST = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")
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
    patterns = (pattern.lower().replace("[", "[[]") for pattern in config.egress)  # brackets are an address's
    return place == place_of(remote_url) or any(fnmatchcase(str(place), pattern) for pattern in patterns)


def public(address: str) -> bool:
    """Say whether an address is one of the public Internet."""
    found = _end_of(address)
    if isinstance(found, IPv6Address) and found not in _GLOBAL_UNICAST:
        return False
    return found.is_global and not found.is_multicast


def named(config: DoorConfig, address: str) -> bool:
    """Say whether an address is in one of the networks that the operator has named."""
    found = _end_of(address)
    networks: Sequence[str] = config.private_networks
    return any(found in ip_network(one) for one in networks)


def _end_of(address: str) -> IPv4Address | IPv6Address:
    """Return where an address leads: some of IPv6 are ways to one of IPv4 (RFC 4291, 3056, 6052)."""
    found = ip_address(address.partition("%")[0])
    if isinstance(found, IPv4Address):
        return found
    if found in _NAT64:
        return IPv4Address(int(found) & 0xFFFFFFFF)
    return found.ipv4_mapped or found.sixtofour or found
