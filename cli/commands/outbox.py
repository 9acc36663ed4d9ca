"""`branchline outbox`: what waits to leave each service, and what was given up, for the installation's operator."""

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from branchline_internal.admin.v1 import admin_pb2
from branchline_internal.admin.v1.admin_pb2_grpc import AdminServiceStub
from google.protobuf.json_format import MessageToDict
from rich.markup import escape
from rich.table import Table

from cli.calls import operated, operating
from cli.installation import GATEWAY, SERVICES, Installation
from cli.settings import SettingsError
from cli.terminal import DEFAULT_DATA, DataDir, console, print_failure, run

app = typer.Typer(no_args_is_help=True, help="What waits to leave each service, for the installation's operator.")

_OWNERS = tuple(name for name in SERVICES if name != GATEWAY)
_PAGE_ROWS = 1000
_TIMEOUT_SECONDS = 10.0

ServiceName = Annotated[str, typer.Option("--service", help="Only this service.")]
Rows = list[admin_pb2.OutboxRow]


@app.command("list")
def list_rows(
    service: ServiceName = "",
    parked: Annotated[bool, typer.Option("--parked", help="Only what was given up.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object a line.")] = False,
    data_dir: DataDir = DEFAULT_DATA,
) -> None:
    """List what waits, oldest first."""
    run(_list(data_dir, service, parked=parked, as_json=as_json))


@app.command()
def retry(
    rows: Annotated[list[int] | None, typer.Argument(help="Numbers of parked rows; all when none is given.")] = None,
    service: ServiceName = "",
    data_dir: DataDir = DEFAULT_DATA,
) -> None:
    """Have parked rows delivered again, now."""
    run(_retry(data_dir, service, rows or []))


@app.command()
def drop(
    rows: Annotated[list[int], typer.Argument(help="Numbers of parked rows.")],
    service: Annotated[str, typer.Option("--service", help="The service that holds them.")],
    data_dir: DataDir = DEFAULT_DATA,
) -> None:
    """Forget parked rows for good."""
    run(_drop(data_dir, service, rows))


async def _list(data_dir: Path, service: str, *, parked: bool, as_json: bool) -> int:
    installation, names = operated(data_dir), _chosen(service)
    found = await asyncio.gather(*(_rows(installation, name, parked=parked) for name in names), return_exceptions=True)
    table = Table("service", "row", "to", "type", "entity", "since", "attempts", "parked because", box=None)
    failed = 0
    for name, rows in zip(names, found, strict=True):
        if isinstance(rows, BaseException):
            failed += _told(rows, name)
            continue
        for row in rows:
            if as_json:
                given: dict[str, Any] = MessageToDict(row, preserving_proto_field_name=True)
                sys.stdout.write(json.dumps({"service": name, **given}) + "\n")
            table.add_row(name, *_words(row))
    if not as_json:
        console.print(table if table.row_count else "nothing waits")
    return 1 if failed else 0


async def _retry(data_dir: Path, service: str, seqs: Sequence[int]) -> int:
    if seqs and not service:
        raise SettingsError("rows are numbered in each service: name it with --service")
    installation, names, failed = operated(data_dir), _chosen(service), 0
    for name in names:
        try:
            async with operating(installation, name, AdminServiceStub) as admin:
                request = admin_pb2.RetryOutboxRequest(seqs=seqs)
                count = (await admin.RetryOutbox(request, timeout=_TIMEOUT_SECONDS)).count
        except grpc.aio.AioRpcError as error:
            failed += _told(error, name)
        else:
            console.print(f"{name}: {count} to be delivered again")
    return 1 if failed else 0


async def _drop(data_dir: Path, service: str, seqs: Sequence[int]) -> None:
    (name,) = _chosen(service)
    async with operating(operated(data_dir), name, AdminServiceStub) as admin:
        answer = await admin.DropOutbox(admin_pb2.DropOutboxRequest(seqs=seqs), timeout=_TIMEOUT_SECONDS)
    console.print(f"{name}: {answer.count} forgotten")


def _chosen(service: str) -> tuple[str, ...]:
    if service and service not in _OWNERS:
        raise SettingsError(f'there is no service "{service}" with an outbox; there are: {", ".join(_OWNERS)}')
    return (service,) if service else _OWNERS


async def _rows(installation: Installation, name: str, *, parked: bool) -> Rows:
    rows: Rows = []
    async with operating(installation, name, AdminServiceStub) as admin:
        request = admin_pb2.ListOutboxRequest(parked=parked, page_size=_PAGE_ROWS)
        while page := (await admin.ListOutbox(request, timeout=_TIMEOUT_SECONDS)).rows:
            rows += page
            request.after_seq = page[-1].seq
    return rows


def _words(row: admin_pb2.OutboxRow) -> tuple[str, ...]:
    since = row.mark_time.ToDatetime().strftime("%Y-%m-%d %H:%M:%S")
    kind = row.type.rpartition(".")[2]
    return str(row.seq), row.destination, kind, row.entity_id, since, str(row.attempts), escape(row.parked_reason)


def _told(error: BaseException, service: str) -> int:
    """Say why a service could not be asked, and count it."""
    if not isinstance(error, grpc.aio.AioRpcError):
        raise error
    print_failure(error, service)
    return 1
