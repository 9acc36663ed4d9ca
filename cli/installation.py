"""An installation: what its services share, and how one is built from the settings by its name alone."""

import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

from cli.settings import CONFIG_VARIABLE, Settings, SettingsError
from services.runtime.client import Neighbours
from services.runtime.config import Config, Secret, database_url, read_config
from services.runtime.secrets import read_or_create_key
from services.runtime.service import Service

SERVICES = ("organization", "user", "github_data", "history", "repository", "task", "sandbox", "gateway")
"""In the order in which they are started: coordinators before their children, so that pushes find them."""

GATEWAY = "gateway"
"""The one service without a database, and outside `services`."""

ROOT = Path(__file__).parents[1]

LOCAL, DOCKER = "local", "docker"
"""Sandbox providers that come with the installation; `sandbox.provider` names the one that tasks have by default."""

_KEY_FILE = "signing.key"
_SOCKETS = "run"
_LONGEST_SOCKET_PATH = 107
"""Bytes of `sun_path` in unix(7), without the zero at its end."""


class Installation:
    """All services of one installation, by name."""

    def __init__(self, settings: Settings, addresses: Mapping[str, str], signing_key: Secret) -> None:
        self.settings = settings
        self.addresses = dict(addresses)
        self.signing_key = signing_key

    def build(self, name: str) -> Service:
        """Build one service, importing its room alone. Raise ValueError if its settings are wrong."""
        room = GATEWAY if name == GATEWAY else f"services.{name}"
        build: Callable[[Config], Service] = importlib.import_module(f"{room}.service").build
        config: type[Config] = get_type_hints(build)["config"]
        return build(read_config(config, self._configuration(name)))

    def neighbours(self, caller: str) -> Neighbours:
        """Return the services as a process with a name reaches them. Raise ValueError if its settings are wrong."""
        return Neighbours(caller, self.addresses, self.signing_key, self.settings.tls.of(caller))

    def databases(self) -> dict[Path, str]:
        """Return the URL of each service's database, by the folder of its migrations."""
        folders = {name: ROOT / "services" / name / "migrations" for name in SERVICES if name != GATEWAY}
        return {
            folder: database_url(self.settings.databases.of(name), self._data_dir(name), name)
            for name, folder in folders.items()
        }

    def _configuration(self, name: str) -> dict[str, Any]:
        section = self.settings.section(name)
        if name == "sandbox":
            section.pop("provider", None)
            if uses(self.settings, LOCAL):
                section[LOCAL] = self._local_provider(section.get(LOCAL, {}))
            if uses(self.settings, DOCKER):
                section.setdefault(DOCKER, {})
        if name == "repository":
            section.setdefault("sandbox_provider", sandbox_provider(self.settings))
        shared = {"addresses": self.addresses, "signing_key": self.signing_key, "tls": self.settings.tls.of(name)}
        if name == GATEWAY:
            return {**section, **shared}
        return {**section, **shared, "data_dir": self._data_dir(name), "database_url": self.settings.databases.of(name)}

    def _data_dir(self, name: str) -> Path:
        return self.settings.data_dir.resolve() / name

    def _secret_paths(self) -> list[Path]:
        """Return where keys and data are: the data folder, the user's home, the file of settings."""
        settings_file = os.environ.get(CONFIG_VARIABLE)
        return [self.settings.data_dir, Path.home(), *([Path(settings_file)] if settings_file else ())]

    def _local_provider(self, given: dict[str, Any]) -> dict[str, Any]:
        """Add what only an installation knows: where sandbox-agent is, what to hide from agents, what to show."""
        return {
            **given,
            "sandbox_agent": given.get("sandbox_agent") or find_sandbox_agent(),
            "hidden_paths": [
                path.resolve() for path in (*self._secret_paths(), *map(Path, given.get("hidden_paths", ())))
            ],
            "readable_paths": [*python_paths(), *map(Path, given.get("readable_paths", ()))],
            "writable_paths": [Path(path).resolve() for path in given.get("writable_paths", ())],
        }


def sandbox_provider(settings: Settings) -> str:
    """Return the sandbox provider of tasks for which neither they nor their organization name one."""
    return str(settings.sandbox.get("provider", LOCAL))


def uses(settings: Settings, provider: str) -> bool:
    """Say whether an installation has a sandbox provider: its default one, and any that has settings."""
    return provider == sandbox_provider(settings) or provider in settings.sandbox


def local_installation(settings: Settings, *, make: bool = True) -> Installation:
    """Return an installation of one process: unix sockets for the services, a key made in the data folder.

    Unless it may be made, raise SettingsError where there is none.
    """
    key, path = settings.signing_key.value, settings.data_dir / _KEY_FILE
    if not key and not make and not path.exists():
        raise SettingsError(f"there is no installation in {settings.data_dir}: name its data folder, or its settings")
    sockets = socket_folder(settings.data_dir.absolute())
    given = settings.addresses.by_name()
    addresses = {name: address or f"unix:{sockets / name}" for name, address in given.items()}
    return Installation(settings, addresses, Secret(key or read_or_create_key(path)))


def distributed_installation(settings: Settings) -> Installation:
    """Return an installation whose services run apart: everything they must agree on has to be given."""
    given = settings.addresses.by_name()
    missing = [name for name, address in given.items() if not address]
    if missing or not settings.signing_key.value:
        names = ", ".join([*(f"addresses.{name}" for name in missing), "signing_key"])
        raise SettingsError(f"services that run apart need these settings: {names}")
    return Installation(settings, given, settings.signing_key)


def known_installation(settings: Settings) -> Installation:
    """Return the installation that the settings speak of, whether its services run in one process or apart."""
    apart = all(settings.addresses.by_name().values())
    return distributed_installation(settings) if apart else local_installation(settings, make=False)


def socket_folder(data_dir: Path) -> Path:
    """Return a folder for sockets that only this user can enter: in the data folder, or linked from there.

    A socket's path has a bound that a deep data folder exceeds; then the folder is a temporary one.
    """
    folder = data_dir / _SOCKETS
    if len(os.fsencode(folder / max(SERVICES, key=len))) <= _LONGEST_SOCKET_PATH:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder
    if not _is_private(folder):
        data_dir.mkdir(parents=True, exist_ok=True)
        folder.unlink(missing_ok=True)
        folder.symlink_to(tempfile.mkdtemp(prefix="branchline-"))  # made with mode 0700
    return folder.readlink()


def _is_private(folder: Path) -> bool:
    """Say whether a link leads to a folder of this user's that nobody else can enter."""
    try:
        state = folder.stat()
    except OSError:
        return False
    return folder.is_symlink() and state.st_uid == os.getuid() and not state.st_mode & 0o077


def find_sandbox_agent() -> Path:
    """Return the sandbox-agent program. Raise SettingsError saying how to install it."""
    for base in (Path.cwd(), ROOT):
        packaged = sorted(base.glob("node_modules/@sandbox-agent/cli-*/bin/sandbox-agent"))
        if packaged:
            return packaged[0]
    found = shutil.which("sandbox-agent")
    if found:
        return Path(found)
    raise SettingsError(
        "sandbox-agent is not installed: npm install @sandbox-agent/cli, or set sandbox.local.sandbox_agent"
    )


def with_scripted_agents(settings: Settings) -> dict[str, Any]:
    """Return the section of the sandbox service with the scripted agent, where it names no agents."""
    section = settings.section("sandbox")
    for provider, agents in ((LOCAL, scripted_agents()), (DOCKER, {"mock": ["branchline-scripted-agent"]})):
        if uses(settings, provider):
            section[provider] = {"agents": agents, **section.get(provider, {})}
    return section


def scripted_agents() -> dict[str, list[str]]:
    """Return the scripted agent under the name by which the sandbox-agent server starts it, if it is installed."""
    program = Path(sys.executable).with_name("branchline-scripted-agent")
    return {"mock": [str(program)]} if program.exists() else {}


def python_paths() -> list[Path]:
    """Return what agents written in Python need: the interpreter and this project, wherever they are."""
    return sorted({Path(sys.prefix), Path(sys.base_prefix), ROOT})
