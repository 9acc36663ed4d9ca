"""`branchline setup`: the keys of services that run apart, made where they are missing.

They lie in one folder, in a folder of its name for each service, so that each can be given its own and no other's:
`signing.key`, `database.password`, and the certificates as `branchline certs` makes them. `postgres/password` is the
database server's.
"""

import secrets
from pathlib import Path
from typing import Annotated

import typer

from cli.certificates import make_certificates
from cli.installation import GATEWAY, SERVICES
from cli.terminal import console, run
from services.runtime.config import make_private
from services.runtime.principal import OPERATOR
from services.runtime.secrets import read_or_create_key

app = typer.Typer()

_PASSWORD_BYTES = 32

Folder = Annotated[Path, typer.Option("--dir", help="Folder of the keys.")]
Names = Annotated[
    list[str] | None, typer.Option("--name", help="Name or address by which clients know the gateway; may be repeated.")
]


@app.command()
def setup(folder: Folder = Path("keys"), names: Names = None) -> None:
    """Make all keys of services that run apart: certificates, the key that calls are signed with, passwords.

    What is there and good stays; certificates that end within 60 days are made anew.
    """

    async def job() -> None:
        make_keys(folder)
        for path, became in make_certificates(folder, names or []):
            console.print(f"{path}: {became}", markup=False, highlight=False, soft_wrap=True)

    run(job())


def make_keys(folder: Path) -> None:
    """Make what is missing of the keys that are no certificates."""
    signing_key = read_or_create_key(folder / OPERATOR / "signing.key")
    for name in SERVICES:
        _write(folder / name / "signing.key", signing_key)
    passwords = [folder / name / "database.password" for name in SERVICES if name != GATEWAY]
    for path in (folder / "postgres" / "password", *passwords):
        if not path.exists():
            _write(path, secrets.token_urlsafe(_PASSWORD_BYTES))


def _write(path: Path, text: str) -> None:
    """Put a secret, whole, into a file that its owner alone can read."""
    make_private(path.parent)
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    new.touch(mode=0o600)
    new.write_text(text)
    new.replace(path)
