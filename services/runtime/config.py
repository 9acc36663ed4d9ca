"""Configuration that every service has. Each service adds its own fields; an unknown one is an error."""

from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, SecretStr


class ServiceConfig(BaseModel):
    """Where the services are, where this one keeps its data, and what it shares with the others."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    addresses: Mapping[str, str]
    """Where each service listens, by name, such as "127.0.0.1:7702" or "unix:/run/branchline/task"."""

    data_dir: Path
    """Folder of this service alone: its database and whatever else it keeps."""

    signing_key: SecretStr
    """Key that principals are signed with; the same for all services of an installation."""

    drain_seconds: float = 5.0
    """Time that running calls get to end when the service stops."""


def database_url(data_dir: Path, name: str) -> str:
    """Return the URL of a service's database, which is in its data folder."""
    return f"sqlite:///{data_dir / f'{name}.sqlite'}"


def make_private(folder: Path) -> None:
    """Make a folder for data, if it is not there, that only its user may enter."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
