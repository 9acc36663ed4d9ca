"""What an installation is configured by: `BRANCHLINE_*` in the environment, or one TOML file; an unknown key fails.

`BRANCHLINE_DATA_DIR=/srv/branchline` and `data_dir = "/srv/branchline"` say the same; a service's own keys are under
its name: `BRANCHLINE_GITHUB_DATA__GITHUB_TOKEN` or `[github_data] github_token = ...`. The service says what they are.
"""

import contextlib
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, SecretStr
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

PREFIX = "BRANCHLINE_"
CLIENT_KEYS = frozenset({"BRANCHLINE_ADDRESS", "BRANCHLINE_TOKEN"})
CONFIG_VARIABLE = "BRANCHLINE_CONFIG"

TOKEN_FILE = "token"  # noqa: S105 - a file name
"""File in the data folder that keeps the first API token, readable by its owner alone."""


class SettingsError(Exception):
    """The settings do not suffice; the message says what to do."""


class Addresses(BaseModel):
    """Where each service listens and is reached by the others: "127.0.0.1:7701", or "unix:/run/branchline/task"."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gateway: str = "127.0.0.1:7700"
    organization: str = ""
    user: str = ""
    github_data: str = ""
    history: str = ""
    repository: str = ""
    task: str = ""
    sandbox: str = ""


class Settings(BaseSettings):
    """All settings of an installation."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        toml_file=os.environ.get(CONFIG_VARIABLE),
    )

    data_dir: Path = Path("data")
    signing_key: SecretStr = SecretStr("")
    """Key that services sign calls with; `branchline up` makes one in the data folder."""

    log_level: str = "info"
    log_json: bool = False
    addresses: Addresses = Addresses()

    gateway: dict[str, Any] = {}
    organization: dict[str, Any] = {}
    user: dict[str, Any] = {}
    github_data: dict[str, Any] = {}
    history: dict[str, Any] = {}
    repository: dict[str, Any] = {}
    task: dict[str, Any] = {}
    sandbox: dict[str, Any] = {}

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], *sources: PydanticBaseSettingsSource, **named: PydanticBaseSettingsSource
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read arguments first, then the environment, then the file."""
        given = sources or (named["init_settings"], named["env_settings"])
        return (*given[:2], TomlConfigSettingsSource(settings_cls))

    def section(self, service: str) -> dict[str, Any]:
        """Return what was set for one service."""
        return dict(getattr(self, service))


def load_settings(**given: Any) -> Settings:
    """Read the settings. Raise ValueError for a variable that means nothing."""
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
    for variable in os.environ:
        if not variable.startswith(PREFIX) or variable in CLIENT_KEYS or variable == CONFIG_VARIABLE:
            continue
        if variable.partition("__")[0].upper() not in known:
            raise ValueError(f"{variable} is not a setting of Branchline")
        if "__" in variable and os.environ[variable].lstrip().startswith("{"):
            raise ValueError(
                f"{variable} holds an object, of which nothing would be read: set {variable}__KEY for each key"
            )
    return Settings(**given)


def read_token(data_dir: Path) -> str:
    """Return the first API token, or nothing."""
    with contextlib.suppress(OSError):
        return (data_dir / TOKEN_FILE).read_text().strip()
    return ""
