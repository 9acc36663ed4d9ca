"""Runs sandboxes as containers.

The Engine is the only memory: what there is of a sandbox is found by its name and labels, and the tokens are made
from the installation's key. So a service that was killed, or one beside it, finds and goes on with whatever is there.
A container is never woken: one that stopped is made anew around its volume, which holds the home.
"""

import asyncio
import json
import secrets
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import cached_property
from ipaddress import IPv4Network
from pathlib import Path
from typing import TYPE_CHECKING

from services.runtime.logging import get_logger
from services.runtime.loops import for_each
from services.runtime.retry import Backoff
from services.sandbox.agent_server import Unreachable
from services.sandbox.door.tokens import DOOR, SERVER, Minter
from services.sandbox.providers.base import NOBODY, Condition, Machine, Overuse, Owner, Probe, ProviderError
from services.sandbox.providers.docker import container, firewall, inside
from services.sandbox.providers.docker.config import HOME, DockerProviderConfig
from services.sandbox.providers.docker.engine import Engine, EngineAway, Json, Missing, Taken
from services.sandbox.providers.docker.labels import CONFIG, INSTALLATION, ORGANIZATION, SANDBOX, TASK
from services.sandbox.providers.docker.networks import Network, Networks, bridges_of, subnet_of

if TYPE_CHECKING:
    from services.sandbox.http import Http

log = get_logger(__name__)

_START_SECONDS = 30.0
_PROBE_SECONDS = 2.0
_SOON_SECONDS, _TICK_SECONDS = 1.0, 0.01
_INSIDE_SECONDS = 15.0
_ATTEMPTS = 8
_LOOK_SECONDS = 5.0
_LOOKS = 16
_KNOWN_ENDS = 1000
_ROOT = ("", "0", "root")
_PROGRAM = ["python3", "-I", "-S", "-c", Path(inside.__file__).read_text()]


class DockerProvider:
    """Makes a container for each sandbox."""

    name = "docker"

    def __init__(
        self,
        root: Path,
        config: DockerProviderConfig,
        minter: Minter,
        door_port: int,
        http: "Callable[[], Http]",
    ) -> None:
        """`root` is a folder for the installation's name, where the configuration gives none."""
        self._root = root
        self._config = config
        self._minter = minter
        self._door_port = door_port
        self._http = http
        self._engine = Engine(config.url)
        self._preparing = asyncio.Lock()
        self._prepared = False
        self._own_container = ""
        self._joined: dict[str, str] = {}
        self._ends: dict[str, str] = {}
        self._ended: deque[str] = deque(maxlen=_KNOWN_ENDS)

    @cached_property
    def _installation(self) -> str:
        if self._config.installation:
            return self._config.installation
        path = self._root / "installation"
        if not path.exists():
            self._root.mkdir(parents=True, exist_ok=True)
            path.write_text(secrets.token_hex(6))
        return path.read_text().strip()

    @cached_property
    def _networks(self) -> Networks:
        pool = IPv4Network(self._config.subnets)
        return Networks(self._engine, pool, self._installation, on_host=True)

    @cached_property
    def _ours(self) -> str:
        """The label of all that this installation has made."""
        return f"{INSTALLATION}={self._installation}"

    async def start(self) -> None:
        """Prepare what can be. An Engine that is away now is looked for when it is needed."""
        try:
            await self._prepare()
        except ProviderError as error:
            log.warning("Docker sandboxes cannot be made now", reason=str(error))

    async def close(self) -> None:
        """Let go of the Engine."""
        await self._engine.close()

    async def create(self, sandbox_id: str, owner: Owner = NOBODY) -> Machine:
        """Make and start the container, or return what runs; two who do so at once get one container."""
        await self._prepare()
        for _ in range(_ATTEMPTS):
            machine = await self._running(sandbox_id) or await self._made(sandbox_id, owner)
            if machine is not None:
                return machine
        raise ProviderError("its container is made and removed again and again: another installation has its name")

    async def resume(self, sandbox_id: str, owner: Owner = NOBODY) -> Machine:
        """Make a container around the files that are kept."""
        return await self.create(sandbox_id, owner)

    async def pause(self, sandbox_id: str) -> None:
        """Remove the container and its network; the files stay in their volume."""
        await self._engine.remove_container(self._name(sandbox_id))
        await self._remove_network(sandbox_id)

    async def destroy(self, sandbox_id: str) -> None:
        """Remove the container, the network and the volume."""
        await self.pause(sandbox_id)
        await self._engine.remove_volume(self._name(sandbox_id))
        self._ends.pop(sandbox_id, None)

    async def probe(self, sandbox_id: str) -> Probe:
        """Look at the container and ask its server. While the Engine is away, or refuses to say, nobody knows."""
        try:
            found = await self._engine.find_container(self._name(sandbox_id))
            if found is None:
                return Probe(Condition.GONE, words=self._ends.get(sandbox_id, ""))
            state = found["State"]
            if not state["Running"]:
                return Probe(Condition.GONE, words=self._why_ended(sandbox_id, state))
            if state["Paused"]:
                return Probe(Condition.UNKNOWN, words="its container is paused")
            machine, refused = await self._ask(sandbox_id, found)
        except ProviderError as error:
            return Probe(Condition.UNKNOWN, words=str(error))
        if refused:
            return Probe(Condition.GONE, words="it was made with another signing key")
        return Probe(Condition.ALIVE if machine else Condition.UNKNOWN, machine)

    async def known(self) -> set[str]:
        """Return the sandboxes of this installation that have a container, a network or a volume."""
        containers = await self._engine.containers(self._ours)
        others = [*await self._engine.networks(self._ours), *await self._engine.volumes(self._ours)]
        labels = [one["Labels"] for one in (*containers, *others)]
        return {one[SANDBOX] for one in labels if SANDBOX in one}

    async def agents(self, sandbox_id: str) -> set[str]:
        """Return the names of the processes that the server started as agents."""
        try:
            return set(json.loads(await self._inside(sandbox_id, "agents")))
        except (Missing, Taken):  # no container, or it does not run
            return set()

    async def end_agent(self, sandbox_id: str, process: str) -> bool:
        """End an agent's process with all its descendants."""
        try:
            return json.loads(await self._inside(sandbox_id, "end", process)) is True
        except (Missing, Taken):
            return True
        except ProviderError as error:
            log.info("agent not ended", sandbox=sandbox_id, reason=str(error))
            return False

    async def watch(self, ended: Callable[[Overuse], Awaitable[None]]) -> None:
        """End sandboxes that run out of memory or stay at their number of processes, and tell of them."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch_memory(ended))
            group.create_task(self._watch_processes(ended))

    async def is_at(self, sandbox_id: str, address: str) -> bool:
        """Say whether a sandbox has an address. Raise EngineAway."""
        return await self._networks.is_at(sandbox_id, address)

    async def _prepare(self) -> None:
        """Find out where the service runs, and close the host to sandboxes if it runs there."""
        async with self._preparing:
            if self._prepared:
                return
            self._own_container = await self._find_own_container()
            self._networks.on_host = not self._own_container
            if self._networks.on_host and self._config.host_firewall:
                await firewall.close_host(
                    self._engine, self._config.image, bridges_of(self._installation), self._door_port
                )
            self._prepared = True

    async def _find_own_container(self) -> str:
        """Return the id of the container that this service runs in; empty if it runs on the host."""
        name = self._config.service_container or socket.gethostname()
        found = await self._engine.find_container(name)
        if found is not None and (self._config.service_container or found["Id"].startswith(name)):
            return str(found["Id"])
        if self._config.service_container:
            raise ProviderError(f"the Docker Engine has no container {name}, which sandbox.docker names as its own")
        return ""

    def _name(self, sandbox_id: str) -> str:
        return f"branchline-{self._installation}-{sandbox_id}"

    def _tokens(self, sandbox_id: str) -> container.Tokens:
        return container.Tokens(self._minter.token(SERVER, sandbox_id), self._minter.token(DOOR, sandbox_id))

    def _why_ended(self, sandbox_id: str, state: Json) -> str:
        if state.get("OOMKilled"):
            return self._out_of_memory()
        return self._ends.get(sandbox_id) or f"its container ended with code {state.get('ExitCode')}"

    def _out_of_memory(self) -> str:
        return f"it ran out of memory: it may have {self._config.memory_mib} MiB"

    async def _running(self, sandbox_id: str) -> Machine | None:
        """Return the machine if its container runs, waiting for its server; None if there is none that runs."""
        deadline = asyncio.get_running_loop().time() + _START_SECONDS
        pause = Backoff(first_seconds=0.02, most_seconds=0.2)
        while True:
            seen = await self.probe(sandbox_id)
            if seen.condition is not Condition.UNKNOWN:
                return seen.machine
            if seen.words:
                raise ProviderError(seen.words)
            if asyncio.get_running_loop().time() > deadline:
                said = await self._engine.output(self._name(sandbox_id))
                raise ProviderError(f"its sandbox-agent server did not answer in {_START_SECONDS:g} seconds: {said}")
            await asyncio.sleep(pause.next_seconds())

    async def _made(self, sandbox_id: str, owner: Owner) -> Machine | None:
        """Make and start the container; None if somebody else makes or removes it at this moment."""
        name = self._name(sandbox_id)
        labels = {
            INSTALLATION: self._installation,
            ORGANIZATION: owner.organization_id,
            TASK: owner.task_id,
            SANDBOX: sandbox_id,
        }
        network = await self._networks.ensure(name, sandbox_id, labels)
        door = (network.service if self._own_container else network.gateway, self._door_port)
        config = container.config(self._config, name, sandbox_id, network, door, self._tokens(sandbox_id), labels)
        digest = config["Labels"][CONFIG] = container.digest(config)
        found = await self._engine.find_container(name)
        if found is not None and not _is_useful(found, digest):
            await self._engine.remove_container(found["Id"])
            found = None
        self._ends.pop(sandbox_id, None)
        try:
            if found is None:
                await self._create_container(sandbox_id, config)
            await self._join(sandbox_id, network)
            await self._engine.start_container(name)
        except (Taken, Missing) as error:
            log.info("a container is made by another, too", sandbox=sandbox_id, reason=str(error))
            return None
        machine = await self._soon(sandbox_id, network) or await self._running(sandbox_id)
        if machine is None and await self._engine.find_container(name) is not None:
            said = await self._engine.output(name)
            raise ProviderError(f"its container ended at once: {said}")
        return machine

    async def _create_container(self, sandbox_id: str, config: Json) -> None:
        """Make the container. Where none can be made, as without its image, the network is given back."""
        try:
            if await self._engine.user_of(self._config.image) in _ROOT:
                raise ProviderError(f"the image {self._config.image} runs as root: give it a USER")
            await self._engine.create_container(self._name(sandbox_id), config)
        except (Taken, Missing, EngineAway):
            raise
        except ProviderError:
            await self._remove_network(sandbox_id)
            raise

    async def _remove_network(self, sandbox_id: str) -> None:
        self._joined.pop(sandbox_id, None)  # first: who is in a network is put out of it before it goes
        await self._networks.remove(sandbox_id)

    async def _soon(self, sandbox_id: str, network: Network) -> Machine | None:
        """Return the machine if its server answers as soon as it should, without a look at the container."""
        deadline = asyncio.get_running_loop().time() + _SOON_SECONDS
        while asyncio.get_running_loop().time() < deadline:
            machine, _ = await self._heard(sandbox_id, network)
            if machine is not None:
                return machine
            await asyncio.sleep(_TICK_SECONDS)
        return None

    async def _join(self, sandbox_id: str, network: Network) -> None:
        """Put this service's own container into the sandbox's network."""
        if self._own_container and self._joined.get(sandbox_id) != network.id:
            await self._engine.join(network.id, self._own_container, network.service)
            self._joined[sandbox_id] = network.id

    async def _ask(self, sandbox_id: str, found: Json) -> tuple[Machine | None, bool]:
        """Ask the server; return the machine if it answers, and whether it refuses our token."""
        within = found["NetworkSettings"]["Networks"].get(self._name(sandbox_id))
        if within is None or not within["IPAddress"]:
            return None, False
        network = Network(within["NetworkID"], self._name(sandbox_id), subnet_of(within["IPAddress"]))
        await self._prepare()  # where the Engine was away at start
        await self._join(sandbox_id, network)
        return await self._heard(sandbox_id, network)

    async def _heard(self, sandbox_id: str, network: Network) -> tuple[Machine | None, bool]:
        """Return the machine if the server in a network answers, and whether it refuses our token."""
        token = self._tokens(sandbox_id).server
        url, headers = f"http://{network.sandbox}:{container.PORT}", {"Authorization": f"Bearer {token}"}
        try:
            answer = await self._http().send("GET", f"{url}/v1/acp", _PROBE_SECONDS, None, headers=headers)
        except Unreachable:
            return None, False
        if not answer.is_success:
            return None, answer.status_code in (401, 403)
        return Machine(url, token, str(HOME), "docker"), False

    async def _inside(self, sandbox_id: str, *arguments: str) -> str:
        return await self._engine.run_inside(self._name(sandbox_id), [*_PROGRAM, *arguments], _INSIDE_SECONDS)

    async def _watch_memory(self, ended: Callable[[Overuse], Awaitable[None]]) -> None:
        """End whatever the kernel has killed a process of."""
        kinds = {"type": ["container"], "event": ["oom"], "label": [self._ours]}
        backoff = Backoff(first_seconds=0.5, most_seconds=10.0)
        while True:
            try:
                async for event in self._engine.events(kinds):
                    backoff.reset()
                    actor = event["Actor"]
                    await self._end(actor["Attributes"].get(SANDBOX, ""), actor["ID"], self._out_of_memory(), ended)
            except ProviderError as error:
                log.info("the Engine's events are looked for again", reason=str(error))
            except Exception:
                log.exception("the Engine's events are not understood")
            await asyncio.sleep(backoff.next_seconds())

    async def _watch_processes(self, ended: Callable[[Overuse], Awaitable[None]]) -> None:
        """End what is twice in a row seen to have as many processes as it may."""
        full: set[str] = set()
        running: dict[str, str] = {}

        async def look(container_id: str) -> None:
            count = await self._engine.processes(container_id)
            if count < self._config.processes - max(1, self._config.processes // 50):
                full.discard(container_id)
            elif container_id not in full:
                full.add(container_id)
            else:
                full.discard(container_id)
                words = f"it started more processes than it may have, which is {self._config.processes}"
                await self._end(running[container_id], container_id, words, ended)

        while True:
            with suppress(ProviderError):
                there = await self._engine.containers(self._ours)
                running = {one["Id"]: one["Labels"][SANDBOX] for one in there if one["State"] == "running"}
                full &= running.keys()
                await for_each(running, "look at a sandbox's processes", look, _LOOKS)
            await asyncio.sleep(_LOOK_SECONDS)

    async def _end(
        self, sandbox_id: str, container_id: str, words: str, ended: Callable[[Overuse], Awaitable[None]]
    ) -> None:
        """Kill a sandbox, and keep in mind why. One that has another container by now, or none, is left alone."""
        if container_id in self._ended:
            return
        try:
            found = await self._engine.find_container(self._name(sandbox_id))
            if found is None or found["Id"] != container_id:
                return
            await self._engine.kill_container(container_id)
        except (Missing, Taken):  # it has ended by itself
            pass
        except ProviderError as error:
            log.warning("a sandbox is not killed", sandbox=sandbox_id, reason=str(error))
        self._ended.append(container_id)
        log.warning("a sandbox is ended", sandbox=sandbox_id, reason=words)
        self._ends[sandbox_id] = words
        while len(self._ends) > _KNOWN_ENDS:
            del self._ends[next(iter(self._ends))]
        await ended(Overuse(sandbox_id, words))


def _is_useful(found: Json, digest: str) -> bool:
    """Say whether a container is as it would be made now, and has not ended: another may be about to start it."""
    state = found["State"]
    return found["Config"]["Labels"].get(CONFIG) == digest and (state["Running"] or state["Status"] == "created")
