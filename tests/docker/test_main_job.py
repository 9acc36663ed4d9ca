"""The main job with a Docker sandbox, the door on the way, and what is told when it goes wrong."""

import json
import os
import socket
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
from branchline.v1 import tasks_pb2
from branchline.v1.common_pb2 import FAILURE_REASON_CLONE_FAILED
from branchline.v1.tasks_pb2 import TASK_ACTIVITY_IDLE, TASK_STATE_FAILED, Task
from branchline_internal.sandbox.v1.sandbox_pb2 import ListOrphansRequest
from branchline_internal.sandbox.v1.sandbox_pb2_grpc import SandboxServiceStub

from cli.calls import operating
from services.runtime.config import read_config
from services.sandbox.agent_server import AgentServer
from services.sandbox.commands import run
from services.sandbox.door.tokens import DOOR, Minter
from services.sandbox.http import Http
from services.sandbox.providers.base import Condition
from services.sandbox.providers.docker.config import DockerProviderConfig
from services.sandbox.providers.docker.provider import DockerProvider
from services.sandbox.providers.ports import free_port
from tests.support.engine import SANDBOX_IMAGE, docker
from tests.support.git_http import serve_git
from tests.support.stack import Stack, git, make_remote, request_id, running_stack

SUBNETS = "10.214.8.0/22"
MEMORY_MIB = 300
SANDBOX_USER = (1000, 1000)


@pytest.fixture(scope="module")
def host_address() -> str:
    """An address of this host that is not loopback: where the door finds the git server, and a sandbox does not."""
    found = [one.address for ends in psutil.net_if_addrs().values() for one in ends if one.family == socket.AF_INET]
    return next(address for address in found if not address.startswith(("127.", "10.214.")))


@pytest.fixture(scope="module")
def git_host(tmp_path_factory: pytest.TempPathFactory, host_address: str) -> Iterator[tuple[str, Path]]:
    """A git server that everybody may push to."""
    root = tmp_path_factory.mktemp("git")
    with serve_git(root, "", "", host_address) as host:
        yield host, root


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the host that sandboxes have, too."""
    folder = tmp_path_factory.mktemp("shared")
    folder.chmod(0o755)
    return folder


def image_of(installation: str) -> str:
    """Return a name of the image that is this installation's own, and can be taken away."""
    return f"branchline-sandbox:{installation}"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def stack(
    tmp_path_factory: pytest.TempPathFactory, installation: str, git_host: tuple[str, Path], shared: Path
) -> AsyncGenerator[Stack, None]:
    docker("tag", SANDBOX_IMAGE, image_of(installation))
    sandbox = {
        "provider": "docker",
        "docker": {
            "installation": installation,
            "image": image_of(installation),
            "subnets": SUBNETS,
            "memory_mib": MEMORY_MIB,
            "binds": [str(shared)],
            "agents": {"mock": ["branchline-scripted-agent"]},
        },
        "door": {"listen": f"0.0.0.0:{free_port()}", "private_networks": [git_host[0].partition(":")[0]]},
    }
    async with running_stack(tmp_path_factory.mktemp("docker"), sandbox=sandbox) as made:
        yield made
    docker("rmi", image_of(installation))


async def a_repository(stack: Stack, git_host: tuple[str, Path]) -> tuple[str, Path]:
    host, root = git_host
    remote = make_remote(root)
    git("config", "http.receivepack", "true", cwd=remote)
    return await stack.add_repository(url=f"http://{host}/{remote.name}"), remote


def a_provider(stack: Stack, installation: str, http: Http) -> DockerProvider:
    """Return a provider of the stack's sandboxes beside its own."""
    config = {"installation": installation, "subnets": SUBNETS, "host_firewall": False}
    settings = read_config(DockerProviderConfig, config)
    return DockerProvider(stack.installation.settings.data_dir, settings, minter(stack), door_port(stack), lambda: http)


def minter(stack: Stack) -> Minter:
    return Minter(stack.installation.signing_key.value.encode())


def door_port(stack: Stack) -> int:
    return int(stack.installation.settings.sandbox["door"]["listen"].rpartition(":")[2])


async def test_a_task_is_done_in_a_container_and_pushed_through_the_door(
    stack: Stack, git_host: tuple[str, Path]
) -> None:
    repository, remote = await a_repository(stack, git_host)
    task = await stack.create_task(repository, "write NEWS.md: some news\ncommit News\npush")
    done = await stack.until(task.id, activity=TASK_ACTIVITY_IDLE, turn=1)
    assert done.sandbox_provider == "docker"
    assert git("show", f"{done.branch}:NEWS.md", cwd=remote) == "some news"


async def test_a_remote_that_is_a_folder_of_the_host_is_pushed_to(stack: Stack, shared: Path) -> None:
    remote = make_remote(shared)
    for path in (remote, *remote.rglob("*")):
        os.chown(path, *SANDBOX_USER)
    task = await stack.create_task(
        await stack.add_repository(url=f"file://{remote}"), "write NEWS.md: some news\ncommit News\npush"
    )
    done = await stack.until(task.id, activity=TASK_ACTIVITY_IDLE, turn=1)
    assert git("-c", "safe.directory=*", "show", f"{done.branch}:NEWS.md", cwd=remote) == "some news"


async def test_the_door_leads_a_sandbox_to_its_remote_alone_and_knows_it_by_its_token(
    stack: Stack, git_host: tuple[str, Path], installation: str
) -> None:
    repository, _ = await a_repository(stack, git_host)
    one, other = [await stack.ready_task(repository) for _ in range(2)]
    http = Http()
    provider = a_provider(stack, installation, http)
    machine = (await provider.probe(one.active_sandbox_id)).machine
    assert machine is not None
    server = AgentServer(machine, http)
    tokens = [minter(stack).token(DOOR, task.active_sandbox_id) for task in (one, other)]

    async def curl(*arguments: str) -> str:
        """Return the status, or that of the proxy where there is none, and what is said."""
        wanted = ["curl", "--silent", "--max-time", "10", "--write-out", "%{http_connect} %{http_code}", *arguments]
        return (await run(server, wanted, server.machine.home, {}, 20)).stdout

    try:
        door = f"http://door:{door_port(stack)}"
        told = await curl("--user", f"{one.active_sandbox_id}:{tokens[0]}", f"{door}/v1/sandbox")
        assert json.loads(told.rpartition("\n")[0])["task_id"] == one.id
        assert (await curl(f"{door}/v1/sandbox")).endswith(" 407")
        assert (await curl("--user", f"{one.active_sandbox_id}:{tokens[1]}", f"{door}/v1/sandbox")).endswith(" 407")
        stolen = await curl("--user", f"{other.active_sandbox_id}:{tokens[1]}", f"{door}/v1/sandbox")
        assert stolen.startswith("the token is another sandbox's")
        assert stolen.endswith(" 403")
        assert (await curl(f"http://{git_host[0]}/nonesuch")).endswith("404")
        assert (await curl("--proxytunnel", f"http://{git_host[0]}/nonesuch")).startswith("200 404")
        own = stack.address.rpartition(":")[2]
        for place in ("example.com", f"127.0.0.1:{own}", f"{git_host[0].partition(':')[0]}:{own}", "169.254.169.254"):
            answer = await curl("--noproxy", "", f"http://{place}/")
            assert answer.startswith("the door does not lead to"), place
            assert (await curl("--noproxy", "", "--proxytunnel", f"http://{place}/")).startswith("421"), place
        garbage = await run(
            server, ["bash", "-c", f"printf 'no http\\r\\n\\r\\n' > /dev/tcp/door/{door_port(stack)}"], "/", {}, 20
        )
        assert garbage.end.exit_code == 0
        assert (await curl(f"{door}/v1/sandbox")).endswith(" 407")
    finally:
        await provider.close()
        await http.close()


async def test_a_remote_that_leads_inside_is_refused(stack: Stack) -> None:
    """Somebody calls a service's port the remote of a repository: the door does not lead there."""
    nowhere, metadata = "http://nowhere.invalid/x.git", "http://169.254.169.254/x.git"
    not_public = "which is not public: see sandbox.door.private_networks"
    for url, words in ((nowhere, "is not reached"), (metadata, not_public)):
        task = await stack.create_task(await stack.add_repository(url=url), hold_prompt=True)
        failed = await stack.until(task.id, state=TASK_STATE_FAILED)
        assert failed.failure.reason == FAILURE_REASON_CLONE_FAILED
        assert words in failed.failure.output_tail


async def test_a_task_that_eats_all_memory_says_so_and_goes_on(stack: Stack, git_host: tuple[str, Path]) -> None:
    repository, _ = await a_repository(stack, git_host)
    task = await stack.create_task(repository, "run python3 -c 'x = bytearray(10**9)'\nwait 60")
    failed = await stack.until(task.id, state=TASK_STATE_FAILED)
    assert failed.failure.message == f"the sandbox failed: it ran out of memory: it may have {MEMORY_MIB} MiB"
    await retry(stack, task)
    await stack.send(task, "write a.txt: after")
    await stack.until(task.id, activity=TASK_ACTIVITY_IDLE, turn=2)


async def retry(stack: Stack, task: Task) -> None:
    """Provision a task again and wait until it is there."""
    request = tasks_pb2.RetryProvisioningRequest(request_id=request_id(), task_id=task.id)
    await stack.client.tasks.RetryProvisioning(request)
    await stack.until(task.id)


async def test_a_missing_image_fails_the_task_and_a_retry_succeeds(
    stack: Stack, git_host: tuple[str, Path], installation: str
) -> None:
    repository, _ = await a_repository(stack, git_host)
    image = image_of(installation)
    docker("rmi", image)
    try:
        task = await stack.create_task(repository, hold_prompt=True)
        failed = await stack.until(task.id, state=TASK_STATE_FAILED)
        assert f"the image {image} is not on the Docker Engine" in failed.failure.message
    finally:
        docker("tag", SANDBOX_IMAGE, image)
    await retry(stack, task)


async def test_what_no_task_knows_is_told_to_the_operator_and_left(stack: Stack, installation: str) -> None:
    http = Http()
    provider = a_provider(stack, installation, http)
    try:
        await provider.create("sbx_stray")
        async with operating(stack.installation, "sandbox", SandboxServiceStub) as sandbox:
            found = await sandbox.ListOrphans(ListOrphansRequest())
            assert [(orphan.sandbox_id, orphan.provider) for orphan in found.orphans] == [("sbx_stray", "docker")]
            assert (await provider.probe("sbx_stray")).condition is Condition.ALIVE
            await provider.destroy("sbx_stray")
            assert not (await sandbox.ListOrphans(ListOrphansRequest())).orphans
    finally:
        await provider.close()
        await http.close()
