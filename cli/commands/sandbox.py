"""`branchline sandbox`: what providers have and nobody knows, for the installation's operator."""

from pathlib import Path

import typer
from branchline_internal.sandbox.v1.sandbox_pb2 import ListOrphansRequest
from branchline_internal.sandbox.v1.sandbox_pb2_grpc import SandboxServiceStub
from rich.table import Table

from cli.calls import operated, operating
from cli.terminal import DEFAULT_DATA, DataDir, console, run

app = typer.Typer(no_args_is_help=True, help="Sandboxes, for the installation's operator.")

_TIMEOUT_SECONDS = 60.0


@app.callback()
def group() -> None:
    """Sandboxes, for the installation's operator."""


@app.command()
def orphans(data_dir: DataDir = DEFAULT_DATA) -> None:
    """List sandboxes that a provider has and no task knows, and leave them. The service stops them every hour."""
    run(_orphans(data_dir))


async def _orphans(data_dir: Path) -> int:
    async with operating(operated(data_dir), "sandbox", SandboxServiceStub) as sandbox:
        answer = await sandbox.ListOrphans(ListOrphansRequest(), timeout=_TIMEOUT_SECONDS)
    if not answer.orphans:
        console.print("There are none.")
        return 0
    table = Table("sandbox", "provider", box=None)
    for orphan in answer.orphans:
        table.add_row(orphan.sandbox_id, orphan.provider)
    console.print(table)
    return 0
