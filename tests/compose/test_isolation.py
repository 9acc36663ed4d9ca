"""What code in a sandbox reaches: its git remote and the door, and nothing else of what the test has made."""

import json
from typing import Any

import pytest

from tests.compose.installation import OWNERS, REMOTE, Composed
from tests.compose.work import create_task, finished
from tests.support.client import Client
from tests.support.engine import docker
from tests.support.processes import execute

pytestmark = pytest.mark.timeout(900)

_PORTS = (22, 2375, 2376, 2468, 5432, 7700, 7710)

_DIAL = """
import json, socket, sys
from concurrent.futures import ThreadPoolExecutor

def dial(place):
    try:
        socket.create_connection(place, 2).close()
        return place
    except OSError:
        return None

with ThreadPoolExecutor(64) as threads:
    print(json.dumps([place for place in threads.map(dial, map(tuple, json.loads(sys.argv[1]))) if place]))
"""

_ASK_THE_DOOR = """
import os, sys, urllib.error, urllib.request
from base64 import b64encode
request = urllib.request.Request(os.environ["BRANCHLINE_DOOR"] + "/v1/sandbox")
shown = sys.argv[1] + ":" + (sys.argv[2] if len(sys.argv) > 2 else os.environ["BRANCHLINE_DOOR_TOKEN"])
request.add_header("Authorization", "Basic " + b64encode(shown.encode()).decode())
try:
    print(urllib.request.urlopen(request, timeout=10).status)
except urllib.error.HTTPError as error:
    print(error.code)
"""


def sandbox_of(installation: Composed, task_id: str) -> dict[str, Any]:
    """Return what the engine knows of the container of a task's sandbox."""
    label = f"label=branchline.task={task_id}"
    (found,) = json.loads(docker("inspect", docker("ps", "--quiet", "--filter", label)))
    return found


def address_of(found: dict[str, Any]) -> str:
    (network,) = found["NetworkSettings"]["Networks"].values()
    return network["IPAddress"]


async def test_a_sandbox_reaches_its_remote_and_the_door_and_nothing_else(
    installation: Composed, client: Client, repository: str
) -> None:  # SBX-3
    own = await create_task(client, repository, "say hello")
    other = await create_task(client, repository, "say hello")
    await finished(client, own.id)
    await finished(client, other.id)
    mine, theirs = sandbox_of(installation, own.id), sandbox_of(installation, other.id)

    containers = [installation.container(name) for name in (*OWNERS, "gateway", "postgres")]
    addresses = {one for name in containers for one in installation.addresses(name).values()}
    (network,) = mine["NetworkSettings"]["Networks"].values()
    host = docker("network", "inspect", "--format", "{{(index .IPAM.Config 0).Gateway}}", network["NetworkID"])
    bridge = docker("network", "inspect", "--format", "{{(index .IPAM.Config 0).Gateway}}", "bridge")
    git = set(installation.addresses(installation.git).values())
    service = installation.addresses(installation.container("sandbox"))
    dialled = sorted({*addresses, *git, *service.values(), address_of(theirs), host, bridge})
    places = [(address, port) for address in dialled for port in (*_PORTS, 8080)]
    dial = await execute(client, own.id, "python3", "-c", _DIAL, json.dumps(places))
    (door,) = {address for name, address in service.items() if name == next(iter(mine["NetworkSettings"]["Networks"]))}
    assert json.loads(dial.stdout) == [[door, 7710]], dial.stderr

    engine = await execute(client, own.id, "test", "-e", "/var/run/docker.sock")
    assert engine.end.exit_code == 1
    remote = await execute(client, own.id, "git", "ls-remote", REMOTE)
    assert "refs/heads/main" in remote.stdout, remote.stderr
    elsewhere = await execute(client, own.id, "git", "ls-remote", "http://example.com/other.git")
    assert elsewhere.end.exit_code


async def test_the_door_knows_a_sandbox_by_its_token_and_where_it_is(
    installation: Composed, client: Client, repository: str
) -> None:  # SBX-3
    own = await create_task(client, repository, "say hello")
    other = await create_task(client, repository, "say hello")
    await finished(client, own.id)
    await finished(client, other.id)
    mine, theirs = sandbox_of(installation, own.id), sandbox_of(installation, other.id)
    token = next(
        variable.partition("=")[2]
        for variable in theirs["Config"]["Env"]
        if variable.startswith("BRANCHLINE_DOOR_TOKEN=")
    )

    async def ask(*shown: str) -> str:
        return (await execute(client, own.id, "python3", "-c", _ASK_THE_DOOR, *shown)).stdout.strip()

    assert await ask(mine["Config"]["Labels"]["branchline.sandbox"]) == "200"
    assert await ask(theirs["Config"]["Labels"]["branchline.sandbox"], token) == "403"
    assert await ask(mine["Config"]["Labels"]["branchline.sandbox"], token) == "407"


def test_services_reach_whom_the_tree_lets_them_and_nobody_else(installation: Composed) -> None:  # OPS-7
    edges = {
        ("organization", "user"),
        ("organization", "github_data"),
        ("organization", "history"),
        ("organization", "repository"),
        ("repository", "task"),
        ("task", "sandbox"),
        *(("gateway", name) for name in ("organization", "repository", "task", "sandbox", "user")),
    }
    names = (*OWNERS, "gateway")
    reached: set[tuple[str, str]] = set()
    for name in names:
        others = {other: installation.reached_at(other) for other in names if other != name}
        places = [(address, 7700) for held in others.values() for address in held]
        dial = docker("exec", installation.container(name), "python", "-c", _DIAL, json.dumps(places))
        found = {address for address, _ in json.loads(dial)}
        reached |= {(name, other) for other, held in others.items() if found & held}
    assert {frozenset(one) for one in reached} == {frozenset(one) for one in edges}


def test_only_the_gateway_has_a_port_and_only_the_sandbox_service_the_engine(installation: Composed) -> None:  # OPS-7
    for name in (*OWNERS, "gateway", "postgres"):
        (found,) = json.loads(docker("inspect", installation.container(name)))
        host, published = found["HostConfig"], found["NetworkSettings"]["Ports"]
        mounted = {one["Destination"] for one in found["Mounts"]}
        assert any(published.values()) is (name == "gateway"), name
        assert ("/var/run/docker.sock" in mounted) is (name == "sandbox"), name
        assert host["ReadonlyRootfs"], name
        assert host["CapDrop"] == ["ALL"], name
        assert "no-new-privileges:true" in host["SecurityOpt"], name
        assert found["Config"]["User"] == "10001:10001", name
        keys = {one for one in mounted if one.startswith("/keys/")}
        assert keys == {f"/keys/{name}"} | ({"/keys/door"} if name == "gateway" else set()), name
