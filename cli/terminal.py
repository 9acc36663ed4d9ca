"""Where commands write, what options they share, and how errors are told to people."""

import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
import uvloop
from branchline import BranchlineError, TlsError
from branchline.v1.errors_pb2 import ErrorReason
from google.protobuf.json_format import MessageToJson
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from rich.console import Console

from cli.settings import SettingsError

_PIPE_WIDTH = 160
_DETAIL_TYPES = error_details_pb2.DESCRIPTOR.pool

console = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)
errors = Console(stderr=True, soft_wrap=True)

DataDir = Annotated[Path, typer.Option("--data-dir", envvar="BRANCHLINE_DATA_DIR", help="Data folder.")]
DEFAULT_DATA = Path("data")


def run(main: Coroutine[Any, Any, int | None]) -> None:
    """Run a command to its end; errors for people go to standard error."""
    try:
        code = uvloop.run(main)
    except (SettingsError, ValueError) as error:
        errors.print(str(error), style="red", markup=False)
        raise typer.Exit(2) from error
    except grpc.aio.AioRpcError as error:
        print_failure(error)
        raise typer.Exit(1) from error
    except TlsError as error:
        errors.print("[red]no safe connection[/red] to", end=" ")
        errors.print(error.message, markup=False)
        raise typer.Exit(1) from error
    except BranchlineError as error:
        errors.print(
            f"[red]{error.code.name}[/red] {ErrorReason.Name(error.reason).removeprefix('ERROR_REASON_')}:", end=" "
        )
        errors.print(error.message, markup=False)
        facts = {name: value for name, value in error.metadata.items() if value not in error.message}
        if facts:
            errors.print(*(f"{name}: {value}" for name, value in facts.items()), sep=", ", style="dim", markup=False)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    raise typer.Exit(code or 0)


def print_failure(error: grpc.aio.AioRpcError, of: str = "") -> None:
    """Say why a call failed, its details included."""
    errors.print(f"{of + ': ' if of else ''}[red]{error.code().name}[/red]", end=" ")
    errors.print(error.details(), markup=False)
    status = rpc_status.from_call(error)
    for detail in status.details if status else ():
        errors.print(
            MessageToJson(detail, indent=None, descriptor_pool=_DETAIL_TYPES),
            style="dim",
            markup=False,
            highlight=False,
        )
