"""The Docker Engine: every call has a deadline, and every refusal says what it means for who runs an installation."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import aiohttp
from aiodocker import Docker, DockerError
from aiodocker.containers import DockerContainer
from aiodocker.networks import DockerNetwork

from services.runtime.retry import Backoff
from services.sandbox.providers.base import ProviderError

Json = dict[str, Any]
T = TypeVar("T")

_CALL_SECONDS = 30.0
_NOT_FOUND, _CONFLICT = 404, 409
_NO_ENGINE = 900  # aiodocker's own
_STDERR = 2
_RELEASES = 10


class EngineAway(ProviderError):
    """The Engine does not answer: what became of its containers is not known."""


class Taken(ProviderError):
    """The name is another's, or what was asked is being done already."""


class Missing(ProviderError):
    """There is no such thing."""


class Engine:
    """One Engine. The connection is made with the first call."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._client: Docker | None = None

    async def close(self) -> None:
        """Close all connections."""
        if self._client is not None:
            await self._client.close()
            self._client = None

    async def find_container(self, name: str) -> Json | None:
        """Return what the Engine knows of a container, or None."""
        try:
            return await self._ask(lambda docker: docker.containers.container(name).show())
        except Missing:
            return None

    async def create_container(self, name: str, config: Json) -> None:
        """Make a container, not started. Raise Taken if there is one of the name, Missing without the image."""
        await self._ask(lambda docker: docker.containers.create(config, name=name))

    async def user_of(self, image: str) -> str:
        """Return the user that an image's programs run as, as the image names it; empty for root."""
        found = await self._ask(lambda docker: docker.images.inspect(image))
        return found["Config"]["User"].partition(":")[0]

    async def start_container(self, name: str) -> None:
        """Start a container; leave one that runs."""
        await self._ask(lambda docker: docker.containers.container(name).start())

    async def kill_container(self, name: str) -> None:
        """Kill all of a container's processes. Raise Missing or Taken if none runs."""
        await self._ask(lambda docker: docker.containers.container(name).kill())

    async def remove_container(self, name: str) -> None:
        """Remove a container, killed first if it runs; one that is not there is left."""
        try:
            await self._ask(lambda docker: docker.containers.container(name).delete(force=True))
        except (Missing, Taken):  # or another is removing it
            await self._gone(name)

    async def _gone(self, name: str) -> None:
        """Wait until what is being removed is gone. Raise EngineAway if it does not go."""
        try:
            async with asyncio.timeout(_CALL_SECONDS):
                while True:
                    found = await self.find_container(name)
                    if found is None or found["State"]["Status"] != "removing":
                        return
                    await asyncio.sleep(0.05)
        except TimeoutError as error:
            words = f"the Docker Engine does not end the removal of {name} within {_CALL_SECONDS:g} seconds"
            raise EngineAway(words) from error

    async def containers(self, *labels: str) -> list[DockerContainer]:
        """Return the containers with all of some labels, those that have ended included."""
        filters = json.dumps({"label": labels})
        return await self._ask(lambda docker: docker.containers.list(all="true", filters=filters))

    async def output(self, name: str) -> str:
        """Return the end of what a container's first process said; nothing if it is gone."""
        try:
            lines = await self._ask(
                lambda docker: docker.containers.container(name).log(stdout=True, stderr=True, tail=20)
            )
        except (Missing, Taken):  # it is gone, or goes
            return ""
        return "".join(lines)[-2000:].strip()

    async def run_inside(self, name: str, command: Sequence[str], seconds: float) -> str:
        """Run a program in a container and return what it prints. Raise ProviderError if it fails."""

        async def run(docker: Docker) -> str:
            container = docker.containers.container(name)
            made = await container.exec(command)
            parts: dict[int, bytes] = {}
            async with made.start(detach=False) as stream:
                while (message := await stream.read_out()) is not None:
                    parts[message.stream] = parts.get(message.stream, b"") + message.data
            ended = await made.inspect()
            if ended["ExitCode"]:
                words = parts.get(_STDERR, b"").decode(errors="replace")[-500:]
                raise ProviderError(f"a program in the sandbox ended with code {ended['ExitCode']}: {words}")
            return b"".join(data for stream, data in parts.items() if stream != _STDERR).decode(errors="replace")

        return await self._ask(run, seconds)

    async def run_once(self, config: Json, seconds: float) -> None:
        """Run a container to its end and remove it. Raise ProviderError with its output if it fails."""

        async def run(docker: Docker) -> None:
            container = await docker.containers.create(config)
            try:
                await container.start()
                ended = await container.wait()
                if ended["StatusCode"]:
                    lines = await _last_lines(container)
                    raise ProviderError("".join(lines).strip() or f"it ended with code {ended['StatusCode']}")
            finally:
                await container.delete(force=True)

        await self._ask(run, seconds)

    async def processes(self, name: str) -> int:
        """Return how many processes and threads a container has now."""
        samples = await self._ask(lambda docker: docker.containers.container(name).stats(stream=False))
        return int(samples[0].get("pids_stats", {}).get("current") or 0) if samples else 0

    async def networks(self, *labels: str) -> list[Json]:
        """Return the networks with all of some labels."""
        return await self._ask(lambda docker: docker.networks.list(filters={"label": list(labels)}))

    async def create_network(self, config: Json) -> None:
        """Make a network. Raise Taken, or ProviderError where its addresses are another's."""
        await self._ask(lambda docker: docker.networks.create(config))

    async def remove_network(self, network_id: str) -> None:
        """Remove a network with whoever is in it; one that is not there is left."""

        async def remove(docker: Docker) -> None:
            network = DockerNetwork(docker, network_id)
            attached: Json = (await network.show())["Containers"]
            for container_id in attached:
                await network.disconnect({"Container": container_id, "Force": True})
            await network.delete()

        try:
            await self._ask(remove)
        except Missing:
            return

    async def join(self, network_id: str, container: str, address: str) -> None:
        """Put a container into a network, under an address. One that is in it is left."""
        config = {"Container": container, "EndpointConfig": {"IPAMConfig": {"IPv4Address": address}}}
        try:
            await self._ask(lambda docker: DockerNetwork(docker, network_id).connect(config))
        except ProviderError as error:
            if "already exists in network" not in str(error):
                raise

    async def volumes(self, *labels: str) -> list[Json]:
        """Return the volumes with all of some labels."""

        async def found(docker: Docker) -> list[Json]:
            answer: Json = await docker.volumes.list(filters={"label": list(labels)})
            return answer.get("Volumes") or []

        return await self._ask(found)

    async def remove_volume(self, name: str) -> None:
        """Remove a volume with its files; one that is not there is left."""

        async def remove(docker: Docker) -> None:
            volume = await docker.volumes.get(name)
            await volume.delete()

        backoff = Backoff(first_seconds=0.05, most_seconds=0.5)
        for _ in range(_RELEASES):  # the container that held it may be gone only a moment later
            try:
                return await self._ask(remove)
            except Missing:
                return None
            except Taken:
                await asyncio.sleep(backoff.next_seconds())
        return await self._ask(remove)

    async def events(self, kinds: Mapping[str, Sequence[str]]) -> AsyncGenerator[Json, None]:
        """Yield what happens from now on, of some kinds. Raise EngineAway once the Engine ends the stream."""
        docker = self._docker()
        listened = docker.events.subscribe(create_task=False)
        listening = asyncio.ensure_future(docker.events.run(filters=json.dumps(kinds)))
        try:
            while (event := await listened.get()) is not None:
                yield event
            raise EngineAway(f"the Docker Engine ended its events: {await _why(listening)}")
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)

    async def _ask(self, call: Callable[[Docker], Awaitable[T]], seconds: float = _CALL_SECONDS) -> T:
        try:
            async with asyncio.timeout(seconds):
                return await call(self._docker())
        except DockerError as error:
            raise _understood(error) from error
        except TimeoutError as error:
            raise EngineAway(f"the Docker Engine did not answer within {seconds:g} seconds") from error
        except (aiohttp.ClientError, OSError) as error:
            raise EngineAway(f"the Docker Engine does not answer: {error!r}") from error

    def _docker(self) -> Docker:
        if self._client is None:
            try:
                self._client = Docker(self._url or None)
            except (AssertionError, ValueError) as error:
                words = "there is no Docker Engine: neither sandbox.docker.url, nor DOCKER_HOST, nor its usual socket"
                raise EngineAway(words) from error
        return self._client


async def _why(listening: asyncio.Future[None]) -> str:
    """Return why it was listened to no longer."""
    (ended,) = await asyncio.gather(listening, return_exceptions=True)
    return repr(ended) if ended is not None else "it is stopped"


async def _last_lines(container: DockerContainer) -> list[str]:
    return await container.log(stdout=True, stderr=True, tail=20)


def _understood(error: DockerError) -> ProviderError:
    """Return what an answer of the Engine means."""
    words = error.message.strip()
    if error.status == _NO_ENGINE:
        return EngineAway(f"the Docker Engine does not answer: {words}")
    if "No such image" in words or "pull access denied" in words:
        name = words.partition("No such image: ")[2] or words
        return ProviderError(f"the image {name} is not on the Docker Engine: build it, or pull it there")
    if "no space left on device" in words.lower():
        return ProviderError(f"the Docker Engine's disk is full: {words}")
    if error.status == _NOT_FOUND:
        return Missing(words)
    if error.status == _CONFLICT:
        return Taken(words)
    return ProviderError(f"the Docker Engine refuses: {words}")
