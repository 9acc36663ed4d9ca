"""`branchline setup`: the keys of services that run apart, made where they are missing.

They lie in one folder, in a folder of its name for each service, so that each can be given its own and no other's:
`signing.key`, `database.password`, and the certificates as `branchline certs` makes them. `postgres/password` is the
database server's.
"""

import secrets
from pathlib import Path
from typing import Annotated

import typer

from cli.commands.certs import Names, show_certificates
from cli.installation import GATEWAY, SERVICES
from cli.terminal import run
from services.runtime.principal import OPERATOR
from services.runtime.secrets import read_or_create_key, write_whole

app = typer.Typer()

_PASSWORD_BYTES = 32

Folder = Annotated[Path, typer.Option("--dir", help="Folder of the keys.")]


@app.command()
def setup(folder: Folder = Path("keys"), names: Names = None) -> None:
    """Make all keys of services that run apart: certificates, the key that calls are signed with, passwords.

    What is there and good stays; certificates that end within 60 days are made anew.
    """

    async def job() -> None:
        make_keys(folder)
        show_certificates(folder, names)

    run(job())


def make_keys(folder: Path) -> None:
    """Make what is missing of the keys that are no certificates."""
    signing_key = read_or_create_key(folder / OPERATOR / "signing.key")
    for name in SERVICES:
        write_whole(folder / name / "signing.key", signing_key.encode())
    passwords = [folder / name / "database.password" for name in SERVICES if name != GATEWAY]
    for path in (folder / "postgres" / "password", *passwords):
        if not path.exists():
            write_whole(path, secrets.token_urlsafe(_PASSWORD_BYTES).encode())
