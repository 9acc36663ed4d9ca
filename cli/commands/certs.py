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
        show_certificates(folder, names)

    run(job())


def show_certificates(folder: Path, names: list[str] | None) -> None:
    """Make what is missing of the certificates in a folder, and say what became of each."""
    for path, became in make_certificates(folder, names or []):
        console.print(f"{path}: {became}", markup=False, highlight=False, soft_wrap=True)
