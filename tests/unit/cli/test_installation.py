"""How services are built from settings, and where they listen."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cli.installation import (
    SERVICES,
    Installation,
    distributed_installation,
    known_installation,
    local_installation,
    socket_folder,
)
from cli.settings import Addresses, Settings, SettingsError, load_settings
from services.runtime.config import Secret

ROOT = Path(__file__).parents[3]
KEY = "a key for tests, long enough for HS256"
LONGEST_SOCKET_PATH = 107

SERVE = """
import asyncio, json, sys
from pathlib import Path
from cli import server
from cli.settings import Settings
from cli.installation import SERVICES, Installation
from services.runtime.config import Secret

async def serve(service, folder):
    addresses = {name: f"unix:{folder}/{name}.sock" for name in SERVICES}
    local = {"sandbox_agent": "/bin/false", "isolation": "none", "user_ids": [0, 0]}
    settings = Settings(data_dir=Path(folder), sandbox={"local": local})
    installation = Installation(settings, addresses, Secret("a key for tests, long enough for HS256"))
    async with installation.build(service).running():
        import grpc
        from grpc_health.v1 import health_pb2, health_pb2_grpc

        async with grpc.aio.insecure_channel(addresses[service]) as channel:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), wait_for_ready=True)
        print(json.dumps(list(sys.modules)))

asyncio.run(serve(*sys.argv[1:]))
"""

OF_WORKFLOWS = {"dbos", "click", "psycopg", "sqlalchemy.dialects.postgresql"}
"""What DBOS brings with it, and so the one service that has workflows."""

NOT_IDLE = {
    "alembic": "migrations run in a process of their own",
    "mako": "of Alembic",
    "rich": "the command line's",
    "typer": "the command line's",
    "pygments": "of rich",
    "cli.commands": "the command line's",
    "cli.demo": "the command line's",
    "cli.views": "the command line's",
    "grpc_reflection.v1alpha": "the gateway's",
    "cryptography": "loaded with the first secret that is kept",
    "pydantic": "of githubkit",
    "githubkit": "loaded with the first account that is read",
    "jwt": "of githubkit",
    "hishel": "of githubkit",
    "httpx": "loaded with the first machine",
}
"""What a service that has nothing to do must not have loaded, and why it need not."""


def modules_of(service: str, folder: Path) -> set[str]:
    """Return what a process has imported that serves one service, once it answers."""
    ended = subprocess.run(
        [sys.executable, "-c", SERVE, service, str(folder)],
        cwd=ROOT,
        env={**os.environ, "GRPC_ENABLE_FORK_SUPPORT": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return set(json.loads(ended.stdout.splitlines()[-1]))


@pytest.mark.parametrize("service", SERVICES)
def test_an_idle_service_has_loaded_its_own_room_and_nothing_heavy_it_does_not_use(
    service: str, tmp_path: Path
) -> None:  # C7
    modules = modules_of(service, tmp_path)

    rooms = {name for name in SERVICES if f"services.{name}.service" in modules or f"{name}.service" in modules}
    assert rooms == {service}
    used = {"task": OF_WORKFLOWS, "gateway": {"grpc_reflection.v1alpha"}}.get(service, set[str]())
    assert not modules & ({*NOT_IDLE, *OF_WORKFLOWS} - used)


def test_a_setting_that_a_service_does_not_have_is_refused_without_its_value(tmp_path: Path) -> None:  # C7
    settings = Settings(data_dir=tmp_path, history={"tokn": "a secret"})
    installation = Installation(settings, dict.fromkeys(SERVICES, "unix:/nowhere"), Secret(KEY))

    with pytest.raises(ValueError, match="tokn") as refused:
        installation.build("history")
    assert "a secret" not in str(refused.value)


def test_inside_services_listen_on_sockets_that_only_their_user_reaches(tmp_path: Path) -> None:  # F13
    installation = local_installation(Settings(data_dir=tmp_path, addresses=Addresses(gateway="127.0.0.1:0")))

    inside = {name: address for name, address in installation.addresses.items() if name != "gateway"}
    folders = {Path(address.removeprefix("unix:")).parent for address in inside.values()}
    assert all(address.startswith("unix:/") for address in inside.values())
    assert [folder.stat().st_mode & 0o777 for folder in folders] == [0o700]


@pytest.mark.parametrize("depth", [1, 40])
def test_a_sockets_path_is_never_too_long_and_found_again(tmp_path: Path, depth: int) -> None:  # F13
    data_dir = tmp_path.joinpath(*["deeper"] * depth)

    folder = socket_folder(data_dir)

    assert len(os.fsencode(folder / max(SERVICES, key=len))) <= LONGEST_SOCKET_PATH
    assert folder.stat().st_mode & 0o777 == 0o700
    assert socket_folder(data_dir) == folder


def test_a_link_to_a_folder_that_others_can_enter_is_not_followed(tmp_path: Path) -> None:  # F13
    data_dir = tmp_path.joinpath(*["deeper"] * 40)
    first = socket_folder(data_dir)
    first.chmod(0o755)

    assert socket_folder(data_dir) != first


def test_an_operator_finds_a_running_installation_and_makes_none(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no installation"):
        known_installation(Settings(data_dir=tmp_path))
    running = local_installation(Settings(data_dir=tmp_path))

    found = known_installation(Settings(data_dir=tmp_path))

    assert found.addresses == running.addresses
    assert found.signing_key == running.signing_key


def test_services_that_run_apart_are_told_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"addresses\.task.*signing_key"):
        distributed_installation(Settings(data_dir=tmp_path))


def test_sandboxes_see_neither_the_file_of_settings_nor_data_behind_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # F14
    disk, link = tmp_path / "disk", tmp_path / "data"
    disk.mkdir()
    link.symlink_to(disk)
    monkeypatch.setenv("BRANCHLINE_CONFIG", str(tmp_path / "branchline.toml"))
    settings = Settings(data_dir=link, sandbox={"local": {"sandbox_agent": "/bin/false", "hidden_paths": [link]}})

    hidden = sandbox_configuration(settings)["local"]["hidden_paths"]

    assert {disk, tmp_path / "branchline.toml", Path.home().resolve()} == set(hidden)


def test_an_object_in_one_variable_is_read_and_not_dropped(  # F14
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BRANCHLINE_SANDBOX__LOCAL", '{"hidden_paths": ["/srv/keys"]}')

    settings = load_settings(data_dir=tmp_path, sandbox={"local": {"sandbox_agent": "/bin/true"}})

    assert Path("/srv/keys") in sandbox_configuration(settings)["local"]["hidden_paths"]


def sandbox_configuration(settings: Settings) -> dict[str, Any]:
    """Return what the sandbox service is built from."""
    return local_installation(settings)._configuration("sandbox")  # pyright: ignore[reportPrivateUsage]
