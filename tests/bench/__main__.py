"""Runs the measures and prints ours, floor, ratio, target and verdict; `build/bench.json` has the same.

python -m tests.bench [--quick] [ROW ...]
"""

import argparse
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.table import Table

from services.runtime.logging import configure_logging
from tests.bench.result import QUICK, Options, Row

ROWS = {
    "write": "write.one_caller",
    "writes": "write.many_callers",
    "message": "message.statements",
    "change": "spine.one_change",
    "changes": "spine.sustained",
    "change-postgres": "spine.one_change_on_postgres",
    "changes-postgres": "spine.sustained_on_postgres",
    "page": "reads.page",
    "snapshot": "reads.snapshot",
    "get": "reads.get_task",
    "tls": "encrypted.get_task",
    "service-memory": "memory.services",
    "up-memory": "memory.everything",
    "hold-git": "hold.hanging_git",
    "hold-agent": "hold.stopped_agent",
    "hold-poison": "hold.poison",
    "hold-watchers": "hold.deaf_watchers",
    "hold-calls": "hold.many_calls",
    "hold-tasks": "hold.large_organization",
    "docker": "sandbox.ready",
}
"""Where the measure of each row is."""

Measured = Callable[[Options, Path], Awaitable[list[Row]]]


def measure_of(row: str) -> Measured:
    """Return a row's measure; only what is measured is imported."""
    module, _, name = ROWS[row].partition(".")
    return getattr(importlib.import_module(f"tests.bench.{module}"), name)


async def measure(row: str, options: Options) -> list[Row]:
    """Measure one row in a folder of its own. What the processes wrote is shown if it fails."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            return await measure_of(row)(options, Path(folder))
        except Exception:
            for log in Path(folder).rglob("*.log"):
                print(log.name, log.read_text()[-3000:], file=sys.stderr)
            raise


def show(rows: list[Row]) -> None:
    """Print the rows."""
    table = Table("what", "unit", "ours", "floor", "ratio", "target", "verdict")
    for row in rows:
        target = f"{'≥' if row.at_least else '≤'} {row.bound:.2f}"
        table.add_row(
            row.name, row.unit, f"{row.ours:.2f}", f"{row.floor:.2f}", f"{row.ratio:.2f}", target, row.verdict
        )
    Console(width=140).print(table)


def keep(rows: list[Row]) -> None:
    """Write the rows to `build/bench.json`; those of other measures stay."""
    path = Path("build/bench.json")
    path.parent.mkdir(exist_ok=True)
    known: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    fresh = [{**asdict(row), "verdict": row.verdict} for row in rows]
    names = {row["name"] for row in fresh}
    path.write_text(json.dumps([row for row in known if row["name"] not in names] + fresh, indent=1) + "\n")


async def main(names: list[str], options: Options) -> int:
    """Run the measures named, or all; return how many could not be taken."""
    found: list[Row] = []
    failed: list[str] = []
    for name in names:
        try:
            rows = await measure(name, options)
        except Exception as error:
            if len(names) == 1:
                raise
            print(f"{name} could not be measured: {error!r}", file=sys.stderr)
            failed.append(name)
            continue
        show(rows)
        found += rows
        keep(rows)
    if len(names) > 1:
        show(found)
    return len(failed)


if __name__ == "__main__":
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # servers of the floor go away under their clients
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"  # processes are started beside open channels; some would never begin
    configure_logging(level="warning")
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", nargs="*", metavar="ROW", help=" ".join(ROWS))
    parser.add_argument("--quick", action="store_true", help="fewer samples, for development: no verdict stands")
    given = parser.parse_args()
    unknown = set(given.rows) - set(ROWS)
    if unknown:
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    sys.exit(uvloop.run(main(given.rows or list(ROWS), QUICK if given.quick else Options())))
