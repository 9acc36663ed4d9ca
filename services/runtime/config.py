"""Configuration that every service has. Each service adds its own fields; an unknown one is an error.

msgspec (https://jcristharif.com/msgspec) reads it: it costs a service 0.2 MB, where pydantic would cost 6.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

C = TypeVar("C", bound="Config")


class Secret:
    """A text that shows itself only to who asks for its value."""

    __slots__ = ("value",)

    def __init__(self, value: str) -> None:
        self.value = value

    def __repr__(self) -> str:
        return "Secret(***)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other.value == self.value

    def __hash__(self) -> int:
        return hash(self.value)


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one part, typed."""


def read_config(kind: type[C], given: Mapping[str, Any]) -> C:
    """Return settings from what a file, the environment or a caller gave; texts become what they stand for.

    Raise ValueError, which names the setting and not its value, if one is unknown, missing or of another type.
    """
    try:
        return msgspec.convert(given, kind, strict=False, dec_hook=_read)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None


def _read(kind: type[Any], value: object) -> object:
    """Return a value of a type that msgspec does not know."""
    if isinstance(value, kind):
        return value
    if kind in (Path, Secret) and isinstance(value, str):
        return kind(value)
    raise ValueError(f"expected a text, got {type(value).__name__}")


def certified_name(service: str) -> str:
    """Return the name for which a service's certificate is made."""
    return f"{service.replace('_', '-')}.branchline.internal"


class TlsConfig(Config, frozen=True, kw_only=True):
    """What a process shows to the other services. In a path {service} stands for the name of the process."""

    ca: Path | None = None
    """Certificates of the authorities that all services of the installation trust."""

    certificate: Path | None = None
    """Certificate of this process, and what leads from it to an authority."""

    key: Path | None = None
    """Its key, in a file that nobody else can read."""

    insecure: bool = False
    """Whether services may speak plaintext off this host; without it their start is refused."""

    def of(self, service: str) -> "TlsConfig":
        """Return what one process shows, by its name."""

        def named(path: Path | None) -> Path | None:
            return path and Path(str(path).replace("{service}", service))

        return msgspec.structs.replace(
            self, certificate=named(self.certificate), key=named(self.key), ca=named(self.ca)
        )


class ServiceConfig(Config, frozen=True, kw_only=True):
    """Where the services are, where this one keeps its data, and what it shares with the others."""

    addresses: Mapping[str, str]
    """Where each service listens, by name, such as "127.0.0.1:7702" or "unix:/run/branchline/task"."""

    data_dir: Path
    """Folder of this service alone: its database and whatever else it keeps."""

    signing_key: Secret
    """Key that principals are signed with; the same for all services of an installation."""

    tls: TlsConfig = TlsConfig()
    """What this service shows to the others."""

    database_url: Secret = Secret("")
    """Its database on a PostgreSQL server, `postgresql://...`; a SQLite file in its folder where there is none."""

    drain_seconds: float = 5.0
    """Time that running calls get to end when the service stops."""


def database_url(given: Secret, data_dir: Path, name: str) -> str:
    """Return the URL of a service's database: the given one, or of a file in its data folder."""
    return given.value or f"sqlite:///{data_dir / f'{name}.sqlite'}"


def make_private(folder: Path) -> None:
    """Make a folder for data that only its user may enter, and such folders above it, where they are not there."""
    if not folder.is_dir():
        make_private(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
