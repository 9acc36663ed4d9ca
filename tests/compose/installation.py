"""An installation as people run it, by Compose, and what befalls its containers.

It is dialled as clients do, through the one published port. Only to look behind its back, and to be sure of what cannot
be reached, tests dial the addresses of containers that they made.
"""

import asyncio
import json
import os
import random
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

from cli.installation import ROOT, SERVICES
from services.sandbox.providers.ports import free_port
from tests.support.client import Client
from tests.support.engine import docker
from tests.support.stack import make_remote

FOLDER = ROOT / "deploy" / "compose"
FILE, DOOR = FOLDER / "compose.yaml", FOLDER / "door.yaml"
GIT_HOST = "git:8080"
REMOTE = f"http://{GIT_HOST}/demo.git"
GIT_NAME, GIT_PASSWORD = "git", "git"

_UP_SECONDS = 240
_HEALTHY_SECONDS = 120
_HEALTH = ("python", "-m", "cli.health")
_OWN_PROCESSES = "kill -9 $(cat /proc/1/task/1/children)"
"""Ends what a container is for, as a crash does. `docker kill` would be taken for an order not to start it again."""


def _fails(*arguments: str) -> bool:
    return bool(subprocess.run(["docker", *arguments], capture_output=True, check=False).returncode)


def compose_program() -> list[str]:
    """Return the command of Docker Compose; fail with words where there is none."""
    plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
    if not plugin.returncode:
        return ["docker", "compose"]
    program = shutil.which("docker-compose", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program, "these tests need Docker Compose 2 or newer: `make setup` installs it"
    return [program]


@dataclass
class Composed:
    """An installation under a project name of its own."""

    project: str
    environment: dict[str, str]
    address: str
    networks: IPv4Network
    """Of the services."""

    remote: Path
    """A bare repository of this machine that sandboxes may push to."""

    files: tuple[Path, ...] = (FILE,)

    def compose(self, *arguments: str, seconds: float = _UP_SECONDS) -> str:
        """Run Docker Compose; return what it prints. Fail with what it says."""
        files = [word for file in self.files for word in ("--file", str(file))]
        command = [*compose_program(), "--project-name", self.project, *files, *arguments]
        environment = {**os.environ, **self.environment}
        ran = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=seconds, cwd=ROOT
        )
        assert not ran.returncode, f"{' '.join(arguments)}: {ran.stderr[-2000:]}\n{self.said()}\n{ran.stderr[-2000:]}"
        return ran.stdout

    def said(self) -> str:
        """Return the last lines of what every container logged."""
        listed = docker("ps", "--all", "--quiet", "--filter", f"label=com.docker.compose.project={self.project}")
        logs = [
            subprocess.run(["docker", "logs", "--tail", "40", one], capture_output=True, check=False)
            for one in listed.split()
        ]
        return "\n".join((one.stdout + one.stderr).decode(errors="replace") for one in logs)

    def up(self) -> None:
        """Bring everything up, and wait until it is healthy."""
        self.compose("up", "--detach", "--wait")

    def down(self) -> None:
        """Remove all that there is of it, sandboxes first: the sandbox service is in their networks."""
        self.compose("stop", "--timeout", "5", "sandbox")
        sandboxes = f"label=branchline.installation={self.project}"
        for container in docker("ps", "--all", "--quiet", "--filter", sandboxes).split():
            docker("rm", "--force", "--volumes", container)
        docker("rm", "--force", self.container("sandbox"), self.git)
        for kind in ("network", "volume"):
            for one in docker(kind, "ls", "--quiet", "--filter", sandboxes).split():
                docker(kind, "rm", one)
        self.compose("down", "--volumes", "--timeout", "5")

    def container(self, service: str) -> str:
        """Return the name of a service's container, by the service's name."""
        return f"{self.project}-{service.replace('_', '-')}-1"

    @property
    def git(self) -> str:
        """Name of the git server's container."""
        return f"{self.project}-git"

    @property
    def disk(self) -> str:
        """Name of the container that has PostgreSQL's disk mounted, too."""
        return f"{self.project}-disk"

    def in_git(self, *arguments: str) -> str:
        """Run git in the repository of the git server."""
        return docker("exec", self.git, "git", "-C", "/srv/git/demo.git", *arguments)

    @cached_property
    def token(self) -> str:
        """The first user's token."""
        return self.read("operator", "/var/lib/branchline/token")

    def read(self, service: str, path: str) -> str:
        """Return a text file of a service's container, which need not run."""
        with tempfile.TemporaryDirectory() as folder:
            docker("cp", f"{self.container(service)}:{path}", f"{folder}/file")
            return Path(folder, "file").read_text()

    def beside(self, *files: Path, **environment: str) -> "Composed":
        """Return the same installation as further files and settings have it from the next `up` on."""
        return replace(self, files=(*self.files, *files), environment={**self.environment, **environment})

    def client(self) -> Client:
        """Return a client of the published port."""
        return Client(self.address, self.token)

    def addresses(self, container: str) -> dict[str, str]:
        """Return the addresses of a container by the names of its networks."""
        found: dict[str, Any] = json.loads(
            docker("inspect", "--format", "{{json .NetworkSettings.Networks}}", container)
        )
        return {name.removeprefix(f"{self.project}_"): one["IPAddress"] for name, one in found.items()}

    def reached_at(self, service: str) -> set[str]:
        """Return the addresses of a service in the networks of the services."""
        held = self.addresses(self.container(service)).values()
        return {address for address in held if address and IPv4Address(address) in self.networks}

    def database(self, service: str) -> str:
        """Return the URL of a service's database for the superuser."""
        password = docker("exec", self.container("postgres"), "cat", "/keys/postgres/password")
        host = self.addresses(self.container("postgres"))["setup-postgres"]
        return f"postgresql://postgres:{password}@{host}/{service}"

    def crash(self, service: str) -> None:
        """End a service's process with SIGKILL; Docker starts it again."""
        docker("exec", self.container(service), "sh", "-c", _OWN_PROCESSES, check=False)

    def until_healthy(self, service: str) -> None:
        """Wait until a service answers its health check, asked now and not when Docker did last."""
        asked = ["pg_isready", "-q", "-h", "127.0.0.1"] if service == "postgres" else [*_HEALTH, service]
        deadline = time.monotonic() + _HEALTHY_SECONDS
        while _fails("exec", self.container(service), *asked):
            assert time.monotonic() < deadline, f"{service} is not healthy\n{self.said()}"
            time.sleep(0.2)

    def replace_image(self, service: str) -> None:
        """Put a container of another image, which differs by a label, in the place of a service's."""
        image = f"branchline:{self.project}"
        label = f"replaced={secrets.token_hex(4)}"
        given = "FROM branchline:latest\n"
        command = ["docker", "build", "--quiet", "--label", label, "--tag", image, "-"]
        subprocess.run(command, input=given, text=True, check=True, capture_output=True)
        self.environment["BRANCHLINE_IMAGE"] = image
        self.compose("up", "--detach", "--wait", "--no-deps", service.replace("_", "-"))
        self.environment.pop("BRANCHLINE_IMAGE")

    @asynccontextmanager
    async def paused(self, service: str) -> AsyncGenerator[None, None]:
        """Freeze a service for the length of the block."""
        await asyncio.to_thread(docker, "pause", self.container(service))
        yield
        await asyncio.to_thread(docker, "unpause", self.container(service))

    @contextmanager
    def disk_held(self) -> Generator[None, None, None]:
        """Keep PostgreSQL's disk mounted, even while its server is down, for the length of the block."""
        mounted = ("--volume", f"{self.project}_postgres:/disk", "--user", "0", "--network", "none")
        docker(
            "run", "--detach", "--name", self.disk, *mounted, "--entrypoint", "sleep", "branchline-postgres", "infinity"
        )
        try:
            yield
        finally:
            docker("rm", "--force", self.disk)

    @asynccontextmanager
    async def disk_full(self) -> AsyncGenerator[None, None]:
        """Have no byte left on PostgreSQL's disk for the length of the block."""
        fill = "cat /dev/zero >/disk/ballast; df --output=avail /disk | tail -1"
        left = await asyncio.to_thread(docker, "exec", self.disk, "sh", "-c", fill)
        assert left == "0", f"{left} KiB are left"
        yield
        await asyncio.to_thread(docker, "exec", self.disk, "rm", "/disk/ballast")

    @asynccontextmanager
    async def cut_off(self, service: str) -> AsyncGenerator[None, None]:
        """Take a service off all its networks for the length of the block; it gets its addresses back."""
        container, held = self.container(service), self.addresses(self.container(service))
        for network in held:
            await asyncio.to_thread(docker, "network", "disconnect", "--force", f"{self.project}_{network}", container)
        yield
        for network, address in held.items():
            alias = ("--alias", service.replace("_", "-"), "--ip", address)
            await asyncio.to_thread(docker, "network", "connect", *alias, f"{self.project}_{network}", container)


@contextmanager
def composed(*files: Path) -> Generator[Composed, None, None]:
    """Bring an installation up for the length of the block, with a git server beside it.

    `files` go on top of the one for all.
    """
    services, sandboxes = _free_networks()
    project, port = f"branchline-test-{secrets.token_hex(3)}", free_port()
    prefix = str(services.network_address).rpartition(".")[0]
    with tempfile.TemporaryDirectory() as folder:
        remote = _opened(make_remote(Path(folder)))
        environment = {
            "POSTGRES_IMAGE": os.environ.get("POSTGRES_IMAGE", "branchline-postgres"),
            "BRANCHLINE_PORT": str(port),
            "BRANCHLINE_SUBNETS": prefix,
            "BRANCHLINE_SANDBOX_SUBNETS": str(sandboxes),
            "BRANCHLINE_PRIVATE_NETWORKS": json.dumps([f"{prefix}.72/29"]),
            "BRANCHLINE_BINDS": json.dumps([str(remote)]),
            "DOCKER_GROUP": str(Path("/var/run/docker.sock").stat().st_gid),
        }
        made = Composed(project, environment, f"127.0.0.1:{port}", services, remote, (FILE, *files))
        try:
            made.up()
            reached = ("--network", f"{project}_sandbox-outside", "--network-alias", "git")
            docker("run", "--detach", "--name", made.git, *reached, "branchline-test-git")
            yield made
        finally:
            made.down()


def _opened(remote: Path) -> Path:
    """Let sandboxes push to a repository, as README.md has it."""
    for folder in (remote / "objects", remote / "refs"):
        subprocess.run(["find", folder, "-type", "d", "-exec", "chmod", "a+rwx", "{}", "+"], check=True)
    return remote


def build_images() -> None:
    """Build what an installation is made of, and the git server beside it, from this checkout."""
    build = subprocess.run([ROOT / "deploy" / "docker" / "build"], capture_output=True, text=True, check=False)
    assert not build.returncode, build.stdout[-4000:] + build.stderr[-4000:]
    here = ROOT / "tests" / "compose"
    docker("build", "--quiet", "--file", str(here / "postgres.Dockerfile"), "--tag", "branchline-postgres", str(here))
    support = str(ROOT / "tests" / "support")
    docker("build", "--quiet", "--file", str(here / "git.Dockerfile"), "--tag", "branchline-test-git", support)


def _free_networks() -> tuple[IPv4Network, IPv4Network]:
    """Return a range for services and one for sandboxes that no network of the Engine overlaps."""
    listed = docker("network", "ls", "--quiet").split()
    subnets = docker("network", "inspect", "--format", "{{range .IPAM.Config}}{{.Subnet}} {{end}}", *listed).split()
    taken = [IPv4Network(one) for one in subnets if ":" not in one]
    free: list[IPv4Network] = []
    while len(free) < len(("services", "sandboxes")):
        bits = (24, 20)[len(free)]
        found = IPv4Network((f"10.{random.randint(200, 254)}.{random.randint(0, 255)}.0", bits), strict=False)
        if not any(found.overlaps(one) for one in (*taken, *free)):
            free.append(found)
            taken.append(found)
    return free[0], free[1]


OWNERS = tuple(name for name in SERVICES if name != "gateway")
