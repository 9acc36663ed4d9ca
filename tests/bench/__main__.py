"""Runs the measures and prints ours, floor and ratio; `build/bench.json` has the same.

python -m tests.bench [NAME ...]
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import uvloop
from rich.console import Console
from rich.table import Table

from tests.bench import measures
from tests.bench.pipelines import floor, ours


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result. `target` bounds the ratio: from below for rates, from above for times."""

    name: str
    unit: str
    ours: float
    floor: float
    ratio: float
    target: float
    met: bool


def time_row(name: str, unit: str, mine: float, least: float, target: float) -> Row:
    """Compare times: the ratio must be at most the target."""
    return Row(name, unit, mine, least, mine / least, target, mine / least <= target)


def rate_row(name: str, unit: str, mine: float, most: float, target: float) -> Row:
    """Compare rates: the ratio must be at least the target."""
    return Row(name, unit, mine, most, mine / most, target, mine / most >= target)


async def latency(folder: Path) -> list[Row]:
    """Measure one change at a time, alone and with others in the background."""
    rows: list[Row] = []
    async with floor(folder / "floor", 1000) as low, ours(folder / "ours", 1000) as own:
        for name, background, targets in (
            ("one change", 0, (2.0, 3.0)),
            ("one change, 300/s beside it", 300, (3.0, 6.0)),
        ):
            least = await measures.one_at_a_time(low, 300, background)
            mine = await measures.one_at_a_time(own, 300, background)
            rows.append(time_row(f"{name}, p50", "ms", mine.p50, least.p50, targets[0]))
            rows.append(time_row(f"{name}, p99", "ms", mine.p99, least.p99, targets[1]))
    return rows


async def throughput(folder: Path) -> list[Row]:
    """Measure what goes through all levels for ten seconds."""
    async with floor(folder / "floor", 1000) as low:
        most = await measures.sustained(low, 10)
    async with ours(folder / "ours", 1000) as own:
        mine = await measures.sustained(own, 10)
    return [rate_row("sustained changes, 1,000 tasks", "1/s", mine, most, 0.4)]


MEASURES: dict[str, Callable[[Path], Awaitable[list[Row]]]] = {"latency": latency, "throughput": throughput}


async def main(names: list[str]) -> None:
    """Run the measures named, or all."""
    rows: list[Row] = []
    for name in names or MEASURES:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            try:
                rows += await MEASURES[name](Path(folder))
            except Exception:
                for log in Path(folder).rglob("*.log"):
                    print(log.name, log.read_text()[-3000:], file=sys.stderr)
                raise
    table = Table("what", "unit", "ours", "floor", "ratio", "target", "met")
    for row in rows:
        figures = (f"{row.ours:.2f}", f"{row.floor:.2f}", f"{row.ratio:.2f}", f"{row.target:.2f}")
        table.add_row(row.name, row.unit, *figures, "yes" if row.met else "no")
    Console(width=120).print(table)
    path = Path("build/bench.json")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", choices=[*MEASURES, []])
    uvloop.run(main(parser.parse_args().names))
