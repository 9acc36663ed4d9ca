"""Networks of sandboxes: one each, a small subnet from a pool, that leads nowhere.

The Engine's own networks are the truth about what is taken. It refuses a subnet that overlaps with another's, and a
second bridge of one name, which is made from the sandbox's id: so two who make the network of one sandbox at the same
moment, or take the same subnet, are told apart by it, whatever each of them knows.
"""

import hashlib
import random
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from typing import cast

from services.sandbox.providers.base import ProviderError
from services.sandbox.providers.docker.config import SUBNET_PREFIX
from services.sandbox.providers.docker.engine import Engine, Json, Taken
from services.sandbox.providers.docker.labels import INSTALLATION, SANDBOX

_TRIES = 16
_BRIDGE_CHARACTERS = 15
"""Longest name of an interface (IFNAMSIZ, without the zero)."""

_OVERLAPS = ("overlap", "already in use", "same bridge name", "conflicts with network")


@dataclass(frozen=True, slots=True)
class Network:
    """The network of one sandbox."""

    id: str
    name: str
    subnet: IPv4Network

    @property
    def gateway(self) -> str:
        """Address of the host, where the service runs on the host."""
        return str(self.subnet[1])

    @property
    def service(self) -> str:
        """Address of the service, where that runs in a container."""
        return str(self.subnet[2])

    @property
    def sandbox(self) -> str:
        """Address of the sandbox."""
        return str(self.subnet[3])


@dataclass(slots=True)
class Networks:
    """The networks of all sandboxes of one installation."""

    engine: Engine
    pool: IPv4Network
    installation: str
    on_host: bool
    """Whether the host has an address in each, which the service uses."""

    _taken: set[IPv4Network] = field(default_factory=set[IPv4Network])
    _owners: dict[IPv4Network, str] = field(default_factory=dict[IPv4Network, str])

    async def find(self, sandbox_id: str) -> Network | None:
        """Return the network of a sandbox, or None."""
        for network in await self._of(sandbox_id):
            subnet = _subnets(network)[0]
            self._owners[subnet] = sandbox_id
            return Network(network["Id"], network["Name"], subnet)
        return None

    async def ensure(self, name: str, sandbox_id: str, labels: dict[str, str]) -> Network:
        """Return the network of a sandbox, made with labels if need be. Raise ProviderError if no subnet is left."""
        for attempt in range(_TRIES):
            found = await self.find(sandbox_id)
            if found is not None:
                return found
            if attempt or not self._taken:
                self._taken = {one for network in await self.engine.networks() for one in _subnets(network)}
            subnet = self._free()
            try:
                await self.engine.create_network(self._config(name, subnet, labels))
            except Taken:
                continue
            except ProviderError as error:
                if not any(sign in str(error).lower() for sign in _OVERLAPS):
                    raise
                self._taken.add(subnet)
        raise ProviderError(f"no network could be made in {self.pool} in {_TRIES} tries: others take it, too")

    async def remove(self, sandbox_id: str) -> None:
        """Remove the network of a sandbox; one that has none is left."""
        for network in await self._of(sandbox_id):
            await self.engine.remove_network(network["Id"])
            for subnet in _subnets(network):
                self._taken.discard(subnet)
                self._owners.pop(subnet, None)

    async def is_at(self, sandbox_id: str, address: str) -> bool:
        """Say whether a sandbox has an address. Raise EngineAway."""
        given = IPv4Address(address)
        subnet = subnet_of(address)
        if self._owners.get(subnet) != sandbox_id:
            await self.find(sandbox_id)
        return given == subnet[3] and self._owners.get(subnet) == sandbox_id

    async def _of(self, sandbox_id: str) -> list[Json]:
        """Return what the Engine has for a sandbox of this installation: another may have one of the same id."""
        return await self.engine.networks(f"{INSTALLATION}={self.installation}", f"{SANDBOX}={sandbox_id}")

    def _free(self) -> IPv4Network:
        """Return a subnet that overlaps with none that is taken."""
        bits = SUBNET_PREFIX - self.pool.prefixlen
        overlapping = [one for one in self._taken if one.overlaps(self.pool)]
        small = {one for one in overlapping if one.prefixlen >= SUBNET_PREFIX}
        large = [one for one in overlapping if one.prefixlen < SUBNET_PREFIX]
        closed = {one.supernet(new_prefix=SUBNET_PREFIX) for one in small}
        first, step = int(self.pool.network_address), 2 ** (32 - SUBNET_PREFIX)
        begin = random.randrange(2**bits)
        for number in range(2**bits):
            subnet = IPv4Network((first + (begin + number) % 2**bits * step, SUBNET_PREFIX))
            if subnet not in closed and not any(one.overlaps(subnet) for one in large):
                return subnet
        words = f"every network of {self.pool} is taken: {len(closed)} sandboxes run; widen sandbox.docker.subnets"
        raise ProviderError(words)

    def _config(self, name: str, subnet: IPv4Network, labels: dict[str, str]) -> Json:
        digest = hashlib.sha256(labels[SANDBOX].encode()).hexdigest()
        options = {"com.docker.network.bridge.name": f"{bridges_of(self.installation)}{digest}"[:_BRIDGE_CHARACTERS]}
        if not self.on_host:
            options["com.docker.network.bridge.inhibit_ipv4"] = "true"
        return {
            "Name": name,
            "CheckDuplicate": True,
            "Driver": "bridge",
            "Internal": True,
            "EnableIPv6": False,
            "IPAM": {"Driver": "default", "Config": [{"Subnet": str(subnet), "Gateway": str(subnet[1])}]},
            "Options": options,
            "Labels": labels,
        }


def bridges_of(installation: str) -> str:
    """Return what the names of all bridges of an installation begin with."""
    return f"b{hashlib.sha256(installation.encode()).hexdigest()[:5]}-"


def subnet_of(address: str) -> IPv4Network:
    """Return the subnet that a sandbox's address lies in."""
    return IPv4Network((int(IPv4Address(address)), SUBNET_PREFIX), strict=False)


def _subnets(network: Json) -> list[IPv4Network]:
    given = cast("list[dict[str, str]]", network["IPAM"]["Config"] or [])
    return [IPv4Network(one["Subnet"]) for one in given if ":" not in one.get("Subnet", ":")]
