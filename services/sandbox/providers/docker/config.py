"""Configuration of the `docker` provider. Apart, so that who does not use it does not load the client."""

from collections.abc import Mapping, Sequence
from ipaddress import IPv4Network
from pathlib import PurePosixPath

from services.runtime.config import Config

HOME = PurePosixPath("/home/sandbox")
"""Where the volume with all that is kept lies."""

_OWN_FOLDERS = (HOME, *map(PurePosixPath, ("/dev", "/proc", "/run", "/sys", "/var/run")))

SUBNET_PREFIX = 29
"""Six hosts: the bridge's, one of the sandbox service, and one of the sandbox; the rest is room for replicas."""


class DockerProviderConfig(Config, frozen=True):
    """Configuration of the `docker` provider."""

    url: str = ""
    """Where the Engine is, such as "unix:///var/run/docker.sock"; else what DOCKER_HOST says, or the usual socket."""

    image: str = "branchline-sandbox"
    """Image of sandboxes. It is never pulled: it must be there."""

    installation: str = ""
    """Name in the labels of all that is made, so that two installations can share an Engine. Else a random one, which
    is kept in the data folder."""

    subnets: str = "10.213.0.0/17"
    """Where the sandboxes' networks are taken from, each a /29: 4096 of them by default. Nothing else may use it."""

    cpus: float = 2.0
    """Processors that one sandbox may keep busy."""

    memory_mib: int = 4096
    """Memory of one sandbox, its files in /tmp included; there is no swap. One that needs more is ended."""

    processes: int = 1024
    """Processes and threads of one sandbox. One that stays at this number, or within 2 % of it, is
    ended."""

    temporary_mib: int = 1024
    """Most that /tmp of one sandbox may hold."""

    read_only: bool = True
    """Whether everything but the home and the folders for temporary files is read-only."""

    binds: Sequence[str] = ()
    """Folders of the Engine's host that every sandbox has at the same path, and may write to: such as a bare repository
    that a `file://` remote names. The image's user needs the right to; what lies there is all sandboxes'."""

    service_container: str = ""
    """Container that the service itself runs in. Else the one whose id is the host name, as Docker has it by default;
    if there is none, the service runs on the host."""

    host_firewall: bool = True
    """Whether the host's own ports are closed to sandboxes where the service runs on the host itself; else the
    operator has seen to that."""

    agents: Mapping[str, Sequence[str]] = {}
    """Command line of agents by name, in the place of what sandbox-agent would install."""

    environment: Mapping[str, str] = {}
    """Further variables of every sandbox."""

    def __post_init__(self) -> None:
        try:
            pool = IPv4Network(self.subnets)
        except ValueError as error:
            raise ValueError(f"subnets: {error}") from None
        if pool.prefixlen > SUBNET_PREFIX:
            raise ValueError(f"subnets: {self.subnets} has no room for one network of 8 addresses")
        for name in ("cpus", "memory_mib", "processes", "temporary_mib"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: must be more than nothing")
        for bind in self.binds:
            path = PurePosixPath(bind)
            if not path.is_absolute() or str(path) != bind or ".." in path.parts:
                raise ValueError(f'binds: "{bind}" is no absolute path in its plainest form')
            for own in _OWN_FOLDERS:
                if path.is_relative_to(own) or own.is_relative_to(path):
                    raise ValueError(f'binds: "{bind}" would hide {own}, which is the sandbox\'s own')
