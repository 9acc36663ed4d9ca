"""Configuration of the door."""

from collections.abc import Sequence
from ipaddress import IPv4Address, ip_network

from services.runtime.config import Config


class DoorConfig(Config, frozen=True):
    """Where the door is, and where it leads."""

    listen: str = "0.0.0.0:7710"
    """Address, of IPv4, and port. Who is not in a sandbox's network is turned away, whatever the address."""

    egress: Sequence[str] = ()
    """Where every sandbox may go besides its task's git remote: "api.example.com:443", "*.example.com:443"."""

    private_networks: Sequence[str] = ()
    """Networks, such as "10.20.0.0/16", that sandboxes may reach though they are not public: where git remotes and
    what stands in `egress` are within. Without them no remote, whatever people call it, leads to what is inside."""

    connections: int = 64
    """Most connections of one sandbox at a time. One more is told so, up to as many again."""

    head_seconds: float = 10.0
    """How long a sandbox may take to say what it wants and to hear the end, and a place to be found and reached."""

    idle_seconds: float = 900.0
    """A connection that nothing passes for so long is closed."""

    def __post_init__(self) -> None:
        for network in self.private_networks:
            try:
                ip_network(network)
            except ValueError as error:
                raise ValueError(f"private_networks: {error}") from None
        for place in self.egress:
            if not place.rpartition(":")[2].isdigit():
                raise ValueError(f'egress: "{place}" names no port')
        if not self.listen.rpartition(":")[2].isdigit():
            raise ValueError(f'listen: "{self.listen}" names no port')
        try:
            IPv4Address(self.host)
        except ValueError:
            raise ValueError(f'listen: "{self.host}" is no address of IPv4, which is all that sandboxes have') from None

    @property
    def host(self) -> str:
        """The address."""
        return self.listen.rpartition(":")[0]

    @property
    def port(self) -> int:
        """The port."""
        return int(self.listen.rpartition(":")[2])
