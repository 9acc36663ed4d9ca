"""`branchline certs`: certificates for a first installation."""

from pathlib import Path
from typing import Annotated

import typer

from cli.certificates import make_certificates
from cli.terminal import console, run

app = typer.Typer()


Folder = Annotated[Path, typer.Option("--dir", help="Where they are put, a folder for each process.")]
Names = Annotated[
    list[str] | None, typer.Option("--name", help="Name or address by which clients know the gateway; may be repeated.")
]


@app.command()
def certs(folder: Folder = Path("certs"), names: Names = None) -> None:
    """Make a private authority, a certificate for each service, and one that the gateway shows its clients.

    What is there and good stays; what ends within 60 days is made anew, and running services read it again.
    """

    async def job() -> None:
        for path, became in make_certificates(folder, names or []):
            console.print(f"{path}: {became}", markup=False, highlight=False, soft_wrap=True)

    run(job())
