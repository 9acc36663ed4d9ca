"""What an installation is configured by: `BRANCHLINE_*` in the environment, or one TOML file; an unknown key fails.

`BRANCHLINE_DATA_DIR=/srv/branchline` and `data_dir = "/srv/branchline"` say the same; a service's own keys are under
its name: `BRANCHLINE_GITHUB_DATA__GITHUB_TOKEN` or `[github_data] github_token = ...`. The service says what they are.
`BRANCHLINE_SIGNING_KEY_FILE=/keys/signing.key`, and so for any other, gives what the file holds: for secrets.
"""

import contextlib
import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import msgspec

from services.runtime.config import Config, Secret, TlsConfig, read_config
from services.runtime.secrets import require_private

PREFIX = "BRANCHLINE_"
CLIENT_KEYS = frozenset(
    {"BRANCHLINE_ADDRESS", "BRANCHLINE_TOKEN", "BRANCHLINE_CA", "BRANCHLINE_INSECURE", "BRANCHLINE_ADMIN_URL"}
)
CONFIG_VARIABLE = "BRANCHLINE_CONFIG"
_LEVELS = "__"
_FILE = "_FILE"

TOKEN_FILE = "token"  # noqa: S105 - a file name
"""File in the data folder that keeps the first API token, readable by its owner alone."""


class SettingsError(Exception):
    """The settings do not suffice; the message says what to do."""


class Addresses(Config, frozen=True, kw_only=True):
    """Where each service listens and is reached by the others: "127.0.0.1:7701", or "unix:/run/branchline/task"."""

    gateway: str = "127.0.0.1:7700"
    organization: str = ""
    user: str = ""
    github_data: str = ""
    history: str = ""
    repository: str = ""
    task: str = ""
    sandbox: str = ""

    def by_name(self) -> dict[str, str]:
        """Return the addresses by the names of the services."""
        return msgspec.structs.asdict(self)


class Databases(Config, frozen=True, kw_only=True):
    """The database of each service on a PostgreSQL server, `postgresql://...`; the others are in the data folder."""

    organization: Secret = Secret("")
    user: Secret = Secret("")
    github_data: Secret = Secret("")
    history: Secret = Secret("")
    repository: Secret = Secret("")
    task: Secret = Secret("")
    sandbox: Secret = Secret("")

    def of(self, service: str) -> Secret:
        """Return what was set for a service; raise SettingsError if it names no server."""
        url: Secret = getattr(self, service)
        if url.value and not url.value.startswith("postgresql://"):
            raise SettingsError(f"databases.{service} is not postgresql://ROLE@HOST/DATABASE")
        return url


class Settings(Config, frozen=True, kw_only=True):
    """All settings of an installation."""

    data_dir: Path = Path("data")
    signing_key: Secret = Secret("")
    """Key that services sign calls with; `branchline up` makes one in the data folder."""

    log_level: str = "info"
    log_json: bool = False
    addresses: Addresses = Addresses()
    tls: TlsConfig = TlsConfig()
    databases: Databases = Databases()

    gateway: dict[str, Any] = {}
    organization: dict[str, Any] = {}
    user: dict[str, Any] = {}
    github_data: dict[str, Any] = {}
    history: dict[str, Any] = {}
    repository: dict[str, Any] = {}
    task: dict[str, Any] = {}
    sandbox: dict[str, Any] = {}

    def section(self, service: str) -> dict[str, Any]:
        """Return what was set for one service."""
        return dict(getattr(self, service))


def load_settings(**given: Any) -> Settings:
    """Read arguments first, then the environment, then the file.

    Raise ValueError for what means nothing, SettingsError for a file that cannot be read, or by too many.
    """
    path = os.environ.get(CONFIG_VARIABLE)
    found: dict[str, Any] = tomllib.loads(Path(path).read_text()) if path else {}
    for variable, value in os.environ.items():
        if not variable.startswith(PREFIX) or variable in CLIENT_KEYS or variable == CONFIG_VARIABLE:
            continue
        name = variable.removesuffix(_FILE)
        keys = name.removeprefix(PREFIX).lower().split(_LEVELS)
        if keys[0] not in Settings.__struct_fields__:
            raise ValueError(f"{variable} is not a setting of Branchline")
        if name == variable:
            _set(found, keys, _value(value))
        elif name in os.environ:
            raise ValueError(f"{name} is set twice: by itself, and by {variable}")
        else:
            _set(found, keys, _read_private(variable, Path(value)))
    return read_config(Settings, _merged(found, given))


def _read_private(variable: str, path: Path) -> str:
    """Return what a file holds without the end of its line; raise SettingsError if it is nothing, or others read it."""
    try:
        require_private(path)
        text = path.read_text().rstrip("\n")
    except (OSError, ValueError) as error:
        raise SettingsError(f"{variable}: {error}") from error
    if not text:
        raise SettingsError(f"{variable}: {path} is empty")
    return text


def _set(settings: dict[str, Any], keys: list[str], value: Any) -> None:
    """Set what is under keys, level by level."""
    *sections, name = keys
    for section in sections:
        if not isinstance(settings.setdefault(section, {}), dict):
            raise ValueError(f"{section} is set twice: as a whole, and in part")  # noqa: TRY004 - of a text
        settings = settings[section]
    settings[name] = value


def _value(text: str) -> Any:
    """Return a list or an object that a variable holds as JSON, or its text."""
    if text[:1] in ("[", "{"):
        with contextlib.suppress(ValueError):
            return json.loads(text)
    return text


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        held = merged.get(key)
        if isinstance(held, Mapping) and isinstance(value, Mapping):
            merged[key] = _merged(cast("Mapping[str, Any]", held), cast("Mapping[str, Any]", value))
        else:
            merged[key] = value
    return merged


def read_token(data_dir: Path) -> str:
    """Return the first API token, or nothing."""
    with contextlib.suppress(OSError):
        return (data_dir / TOKEN_FILE).read_text().strip()
    return ""
