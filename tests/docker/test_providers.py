"""The `docker` provider does what every provider does, and what only it does: against a real Engine."""

import asyncio
import socket
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from services.runtime.config import read_config
from services.sandbox.agent_server import AgentServer
from services.sandbox.door.tokens import Minter
from services.sandbox.http import Http
from services.sandbox.providers.base import Condition, Overuse, ProviderError
from services.sandbox.providers.docker import engine as engine_module
from services.sandbox.providers.docker import provider as module
from services.sandbox.providers.docker.config import DockerProviderConfig
from services.sandbox.providers.docker.engine import Engine, EngineAway
from services.sandbox.providers.docker.provider import DockerProvider
from tests.support.engine import SANDBOX_IMAGE, docker
from tests.support.provider_conformance import AGENT, ONE, OTHER, OWNER, Ground, ProviderConformance

DOOR_PORT = 7719
SUBNETS = "10.214.0.0/22"


@dataclass
class DockerGround(Ground[DockerProvider]):
    root: Path
    installation: str
    given: dict[str, Any] = field(default_factory=dict[str, Any])

    def again(self, **given: Any) -> DockerProvider:
        return a_provider(self.root, self.http, self.installation, **{**self.given, **given})

    def name(self, sandbox_id: str = ONE) -> str:
        return f"branchline-{self.installation}-{sandbox_id}"

    async def kill(self, sandbox_id: str) -> None:
        await asyncio.to_thread(docker, "kill", "--signal", "KILL", self.name(sandbox_id))

    async def freeze(self, sandbox_id: str) -> None:
        await asyncio.to_thread(docker, "pause", self.name(sandbox_id))

    async def thaw(self, sandbox_id: str) -> None:
        await asyncio.to_thread(docker, "unpause", self.name(sandbox_id), check=False)

    def left(self) -> list[str]:
        """Return all that the Engine has of the installation."""
        label = f"label=branchline.installation={self.installation}"
        kinds = (("ps", "--all"), ("network", "ls"), ("volume", "ls"))
        return [one for kind in kinds for one in docker(*kind, "--quiet", "--filter", label).split()]


def a_provider(root: Path, http: Http, installation: str, key: bytes = b"a key", **given: Any) -> DockerProvider:
    config = {"installation": installation, "subnets": SUBNETS, "agents": {"mock": AGENT}, **given}
    return DockerProvider(root, read_config(DockerProviderConfig, config), Minter(key), DOOR_PORT, lambda: http)


@pytest_asyncio.fixture
async def ground(tmp_path: Path, installation: str) -> AsyncGenerator[DockerGround, None]:
    http = Http()
    made = DockerGround(http, a_provider(tmp_path, http, installation), tmp_path, installation)
    yield made
    for sandbox_id in await made.provider.known():
        await made.provider.destroy(sandbox_id)
    await made.provider.close()
    await http.close()
    assert made.left() == []


class TestDocker(ProviderConformance):
    """All that every provider does."""


async def test_creations_at_one_moment_make_one_machine(ground: DockerGround) -> None:
    others = [ground.again() for _ in range(3)]
    try:
        made = await asyncio.gather(*(one.create(ONE, OWNER) for one in (ground.provider, *others)))
        assert len({(machine.url, machine.token) for machine in made}) == 1
    finally:
        for other in others:
            await other.close()
    assert len(ground.left()) == 3  # a container, a network, a volume


async def test_a_machine_carries_whose_it_is_and_may_do_nothing_special(ground: DockerGround) -> None:
    await ground.make()
    shown = '{{index .Config.Labels "branchline.organization"}} {{index .Config.Labels "branchline.task"}}'
    assert docker("inspect", "--format", shown, ground.name()) == "org_1 task_1"
    status = (await ground.said("cat /proc/self/status; id -u; touch /usr/written && echo written")).stdout
    assert "written" not in status
    assert "NoNewPrivs:\t1" in status
    for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert f"{kind}:\t0000000000000000" in status
    assert "\n1000\n" in status
    shown = " ".join(f"{{{{.HostConfig.{limit}}}}}" for limit in ("Memory", "MemorySwap", "NanoCpus", "PidsLimit"))
    limits = docker("inspect", "--format", shown, ground.name())
    assert limits == "4294967296 4294967296 2000000000 1024"


async def test_a_volume_is_all_that_a_paused_sandbox_keeps(ground: DockerGround) -> None:
    await ground.make()
    await ground.provider.pause(ONE)
    assert ground.left() == [ground.name()]


async def test_another_installation_of_the_same_sandboxes_leaves_them_alone(ground: DockerGround) -> None:
    """Such as one that was brought up from a backup, beside the first."""
    machine = await ground.provider.create(ONE, OWNER)
    copy = a_provider(ground.root, ground.http, f"{ground.installation}-copy", host_firewall=False)
    try:
        assert (await copy.probe(ONE)).condition is Condition.GONE
        assert (await copy.create(ONE, OWNER)).url != machine.url
        await copy.destroy(ONE)
        assert await copy.known() == set()
        assert await ground.answers(machine)
    finally:
        await copy.destroy(ONE)
        await copy.close()


@pytest.fixture
def stand_in(installation: str) -> Iterator[str]:
    """A container in the place of the service's own: what the service does to be in networks is seen on it."""
    name = f"branchline-{installation}-service"
    docker("run", "--detach", "--name", name, "--network", "none", SANDBOX_IMAGE, "sleep", "600")
    docker("network", "disconnect", "none", name)
    yield name
    docker("rm", "--force", name)


def joined(stand_in: str) -> list[str]:
    """Return the networks that it is in."""
    return docker(
        "inspect", "--format", "{{range $name, $_ := .NetworkSettings.Networks}}{{$name}} {{end}}", stand_in
    ).split()


async def test_the_service_joins_each_network_that_a_sandbox_gets(
    ground: DockerGround, stand_in: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network goes where no container can be made in it, and the sandbox has another then."""
    monkeypatch.setattr(module, "_START_SECONDS", 0.1)  # nothing answers, as these tests are in no container
    image = f"{SANDBOX_IMAGE}:{ground.installation}-joins"
    docker("tag", SANDBOX_IMAGE, image)
    inside = ground.again(service_container=stand_in, image=image)
    try:
        for _ in range(2):
            with pytest.raises(ProviderError, match="did not answer"):
                await inside.create(ONE, OWNER)
            assert joined(stand_in) == [ground.name()]
            docker("rm", "--force", ground.name())
            docker("rmi", image)
            with pytest.raises(ProviderError, match="is not on the Docker Engine"):
                await inside.create(ONE, OWNER)
            assert joined(stand_in) == []
            docker("tag", SANDBOX_IMAGE, image)
    finally:
        docker("rmi", image)
        await inside.destroy(ONE)
        await inside.close()


async def test_a_service_that_began_without_the_engine_joins_what_runs(
    ground: DockerGround, stand_in: str, tmp_path: Path
) -> None:
    await ground.make()
    socket_path = tmp_path / "docker.sock"
    late = ground.again(service_container=stand_in, url=f"unix://{socket_path}")
    try:
        await late.start()
        assert (await late.probe(ONE)).condition is Condition.UNKNOWN
        socket_path.symlink_to("/var/run/docker.sock")
        await late.probe(ONE)
        assert joined(stand_in) == [ground.name()]
    finally:
        await late.close()


async def test_files_outlive_a_container_that_was_removed_by_hand(ground: DockerGround) -> None:
    await ground.said("echo kept > file")
    docker("rm", "--force", ground.name())
    assert (await ground.provider.probe(ONE)).condition is Condition.GONE
    assert (await ground.said("cat file")).stdout == "kept\n"


async def test_a_new_signing_key_makes_the_machine_anew_around_its_files(ground: DockerGround) -> None:
    await ground.said("echo kept > file")
    again = ground.again(key=b"another key")
    try:
        assert (await again.probe(ONE)).condition is Condition.GONE
        machine = await again.resume(ONE, OWNER)
        assert (await AgentServer(machine, ground.http).read_file(f"{machine.home}/file")) == b"kept\n"
    finally:
        await again.close()


async def test_a_missing_image_is_named(ground: DockerGround) -> None:
    missing = ground.again(image="nonesuch:1", host_firewall=False)
    try:
        with pytest.raises(ProviderError, match="the image nonesuch:1 is not on the Docker Engine"):
            await missing.create(ONE, OWNER)
    finally:
        await missing.close()


async def test_an_engine_that_is_away_is_unknown_and_named(ground: DockerGround, tmp_path: Path) -> None:
    away = ground.again(url=f"unix://{tmp_path}/nonesuch.sock")
    try:
        await away.start()
        seen = await away.probe(ONE)
        assert seen.condition is Condition.UNKNOWN
        assert "does not answer" in seen.words
        with pytest.raises(ProviderError, match="the Docker Engine does not answer"):
            await away.create(ONE, OWNER)
    finally:
        await away.close()


async def test_a_full_pool_is_told_and_a_subnet_that_is_free_again_is_used(ground: DockerGround) -> None:
    small = ground.again(subnets="10.214.4.0/29")
    try:
        await small.create(ONE, OWNER)
        with pytest.raises(ProviderError, match=r"every network of 10\.214\.4\.0/29 is taken"):
            await small.create(OTHER, OWNER)
        await small.pause(ONE)
        await small.create(OTHER, OWNER)
    finally:
        await small.destroy(ONE)
        await small.destroy(OTHER)
        await small.close()


async def test_a_sandbox_that_eats_all_memory_ends_alone_with_that_reason(ground: DockerGround) -> None:
    ended: asyncio.Queue[Overuse] = asyncio.Queue()
    small = ground.again(memory_mib=128)
    watching = asyncio.ensure_future(small.watch(ended.put))
    try:
        other = await small.create(OTHER, OWNER)
        server = AgentServer(await small.create(ONE, OWNER), ground.http)
        await asyncio.sleep(0.5)  # the Engine's events are listened to
        await server.start_process(["python3", "-c", "x = bytearray(10**9)"], "/", {})
        async with asyncio.timeout(30):
            told = await ended.get()
        assert told == Overuse(ONE, "it ran out of memory: it may have 128 MiB")
        seen = await small.probe(ONE)
        assert (seen.condition, seen.words) == (Condition.GONE, told.words)
        assert await ground.answers(other)
        fresh = ground.again(memory_mib=128)
        assert "ran out of memory" in (await fresh.probe(ONE)).words
        await fresh.close()
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await small.close()


async def test_what_is_told_late_of_a_container_ends_no_other_of_the_same_sandbox(
    ground: DockerGround, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Engine tells of each process that it killed; the sandbox may be awake again before the last is heard."""
    machine = await ground.provider.create(ONE, OWNER)
    first = docker("inspect", "--format", "{{.Id}}", ground.name())
    told: list[Overuse] = []
    events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def heard(engine: Engine, kinds: object) -> AsyncGenerator[dict[str, Any], None]:
        while True:
            yield await events.get()
            events.task_done()

    async def ended(overuse: Overuse) -> None:
        told.append(overuse)
        if len(told) == 1:
            await ground.provider.resume(ONE, OWNER)

    monkeypatch.setattr(Engine, "events", heard)
    watching = asyncio.ensure_future(ground.provider.watch(ended))
    try:
        for container_id in (first, first, "nonesuch"):
            await events.put({"Actor": {"ID": container_id, "Attributes": {"branchline.sandbox": ONE}}})
        async with asyncio.timeout(20):
            await events.join()
        assert len(told) == 1
        assert await ground.answers(machine)
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def test_an_engine_that_refuses_to_say_leaves_a_sandbox_unknown_with_its_words(
    ground: DockerGround, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(engine: Engine, name: str) -> None:
        raise ProviderError("the Docker Engine refuses: layer does not exist")

    monkeypatch.setattr(Engine, "find_container", refuse)
    seen = await ground.provider.probe(ONE)
    assert (seen.condition, seen.words) == (Condition.UNKNOWN, "the Docker Engine refuses: layer does not exist")


async def test_a_removal_without_end_is_told_as_an_engine_that_is_away(
    ground: DockerGround, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def removing(engine: Engine, name: str) -> dict[str, Any]:
        return {"State": {"Status": "removing"}}

    monkeypatch.setattr(Engine, "find_container", removing)
    monkeypatch.setattr(engine_module, "_CALL_SECONDS", 0.5)
    with pytest.raises(EngineAway, match="does not end the removal"):
        await ground.provider.pause(ONE)


async def test_an_image_that_runs_as_root_is_refused(ground: DockerGround, tmp_path: Path) -> None:
    image = f"{SANDBOX_IMAGE}:{ground.installation}-root"
    (tmp_path / "Dockerfile").write_text(f"FROM {SANDBOX_IMAGE}\nUSER root\n")
    docker("build", "--quiet", "--tag", image, str(tmp_path))
    careless = ground.again(image=image, host_firewall=False)
    try:
        with pytest.raises(ProviderError, match=f"the image {image} runs as root: give it a USER"):
            await careless.create(ONE, OWNER)
        assert ground.left() == []
    finally:
        await careless.close()
        docker("rmi", image)


async def test_a_sandbox_that_forks_without_end_ends_alone_with_that_reason(ground: DockerGround) -> None:
    ended: asyncio.Queue[Overuse] = asyncio.Queue()
    small = ground.again(processes=64)
    watching = asyncio.ensure_future(small.watch(ended.put))
    try:
        other = await small.create(OTHER, OWNER)
        server = AgentServer(await small.create(ONE, OWNER), ground.http)
        await server.start_process(["sh", "-c", "while true; do sleep 1000 & done"], "/", {})
        async with asyncio.timeout(60):
            told = await ended.get()
        assert told == Overuse(ONE, "it started more processes than it may have, which is 64")
        assert (await small.probe(ONE)).condition is Condition.GONE
        assert await ground.answers(other)
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await small.close()


async def test_the_host_and_other_sandboxes_cannot_be_reached(ground: DockerGround) -> None:
    """A listener on every address of the host stands for all that listens there: services, PostgreSQL, the Engine."""
    await ground.make()
    other = (await ground.make(OTHER)).machine
    with socket.create_server(("0.0.0.0", 0)) as open_to_all:
        port = open_to_all.getsockname()[1]
        places = [(address, port) for address in host_addresses()]
        places += [
            (other.url.removeprefix("http://").partition(":")[0], 2468),
            ("8.8.8.8", 53),
            ("169.254.169.254", 80),
        ]
        assert len(places) > 4
        tries = (f"timeout 2 bash -c 'echo > /dev/tcp/{host}/{port}' && echo {host} {port}" for host, port in places)
        seen = await ground.said(" & ".join(tries) + " & wait", seconds=60)
    assert (seen.stdout, seen.end.timed_out) == ("", False)
    names = await ground.said("timeout 20 getent hosts deb.debian.org; cat /proc/net/if_inet6", seconds=40)
    assert names.stdout == ""


def host_addresses() -> list[str]:
    """Return all addresses of this host but loopback, those in the sandboxes' networks included."""
    found = [one.address for ends in psutil.net_if_addrs().values() for one in ends if one.family == socket.AF_INET]
    return [address for address in found if not address.startswith("127.")]
