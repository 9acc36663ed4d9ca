"""Builds services from the settings: the one place that knows all of them."""

import shutil
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pydantic import SecretStr

import gateway
from cli.settings import Addresses, Settings, SettingsError
from services import github_data, history, organization, repository, sandbox, task, user
from services.runtime.secrets import read_or_create_key
from services.runtime.service import Service
from services.sandbox.providers.local import LocalProviderConfig

SERVICES = ("organization", "user", "github_data", "history", "repository", "task", "sandbox", "gateway")
"""In the order in which they are started: coordinators before their children, so that pushes find them."""

_ROOT = Path(__file__).parents[1]


class Installation:
    """All services of one installation, by name."""

    def __init__(self, settings: Settings, addresses: Addresses, signing_key: SecretStr) -> None:
        self.settings = settings
        self.addresses = addresses
        self.signing_key = signing_key

    def build(self, name: str) -> Service:
        """Build one service. Raise SettingsError if something is missing."""
        builders: dict[str, Callable[[], Service]] = {
            "organization": self._organization,
            "user": partial(self._child_of_organization, user.build, user.UserConfig, "user"),
            "history": partial(self._child_of_organization, history.build, history.HistoryConfig, "history"),
            "github_data": self._github_data,
            "repository": self._repository,
            "task": self._task,
            "sandbox": self._sandbox,
            "gateway": self._gateway,
        }
        return builders[name]()

    def _common(self, name: str) -> dict[str, object]:
        return {
            "listen": getattr(self.addresses, name),
            "data_dir": self.settings.data_dir.absolute() / name,
            "signing_key": self.signing_key,
        }

    def _child_of_organization(
        self, build: Callable[..., Service], config: Callable[..., object], name: str
    ) -> Service:
        return build(config(**self._common(name), organization_address=self.addresses.organization))

    def _organization(self) -> Service:
        addresses = self.addresses
        config = organization.OrganizationConfig.model_validate(
            {
                **self._common("organization"),
                "repository_address": addresses.repository,
                "user_address": addresses.user,
                "history_address": addresses.history,
                "github_data_address": addresses.github_data,
            }
        )
        return organization.build(config)

    def _github_data(self) -> Service:
        config = github_data.GithubDataConfig.model_validate(
            {
                **self._common("github_data"),
                "organization_address": self.addresses.organization,
                "github_url": self.settings.github.url,
                "github_token": self.settings.github.token,
            }
        )
        return github_data.build(config)

    def _repository(self) -> Service:
        config = repository.RepositoryConfig.model_validate(
            {
                **self._common("repository"),
                "organization_address": self.addresses.organization,
                "task_address": self.addresses.task,
            }
        )
        return repository.build(config)

    def _task(self) -> Service:
        config = task.TaskConfig.model_validate(
            {
                **self._common("task"),
                "repository_address": self.addresses.repository,
                "sandbox_address": self.addresses.sandbox,
            }
        )
        return task.build(config)

    def _sandbox(self) -> Service:
        local = self.settings.local
        config = sandbox.SandboxConfig.model_validate(
            {
                **self._common("sandbox"),
                "task_address": self.addresses.task,
                "stop_machines": local.stop_machines,
                "local": LocalProviderConfig(
                    sandbox_agent=find_sandbox_agent(local.sandbox_agent),
                    agents=local.agents,
                    isolation=local.isolation,
                    hidden_paths=[self.settings.data_dir.absolute(), Path.home()],
                    readable_paths=_readable_paths(),
                    writable_paths=[path.absolute() for path in local.writable_paths],
                ),
            }
        )
        return sandbox.build(config)

    def _gateway(self) -> Service:
        addresses = self.addresses
        config = gateway.GatewayConfig(
            listen=addresses.gateway,
            signing_key=self.signing_key,
            organization_address=addresses.organization,
            repository_address=addresses.repository,
            task_address=addresses.task,
            sandbox_address=addresses.sandbox,
            user_address=addresses.user,
            calls_per_minute=self.settings.calls_per_minute,
        )
        return gateway.build(config)


def local_installation(settings: Settings) -> Installation:
    """Return an installation on loopback: free ports for the services, keys made in the data folder."""
    given = settings.addresses.model_dump()
    addresses = Addresses(**{name: address or f"127.0.0.1:{_free_port()}" for name, address in given.items()})
    key = settings.signing_key.get_secret_value() or read_or_create_key(settings.data_dir / "signing.key")
    return Installation(settings, addresses, SecretStr(key))


def distributed_installation(settings: Settings) -> Installation:
    """Return an installation whose services run apart: everything they must agree on has to be given."""
    missing = [name for name, address in settings.addresses.model_dump().items() if not address]
    if missing or not settings.signing_key.get_secret_value():
        names = ", ".join([*(f"addresses.{name}" for name in missing), "signing_key"])
        raise SettingsError(f"services that run apart need these settings: {names}")
    return Installation(settings, settings.addresses, settings.signing_key)


def find_sandbox_agent(given: Path | None) -> Path:
    """Return the sandbox-agent program. Raise SettingsError saying how to install it."""
    if given is not None:
        return given
    for base in (Path.cwd(), _ROOT):
        packaged = sorted(base.glob("node_modules/@sandbox-agent/cli-*/bin/sandbox-agent"))
        if packaged:
            return packaged[0]
    found = shutil.which("sandbox-agent")
    if found:
        return Path(found)
    raise SettingsError("sandbox-agent is not installed: npm install @sandbox-agent/cli, or set local.sandbox_agent")


def _readable_paths() -> list[Path]:
    """Return what agents written in Python need: the interpreter and this project, wherever they are."""
    return sorted({Path(sys.prefix), Path(sys.base_prefix), _ROOT})


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
