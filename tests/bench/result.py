"""What a measure says: ours beside a floor of the same run, as a ratio, with its target and whether the run counts."""

import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

NOISE = 1.15
"""A run counts when the floor differs from itself by no more than this."""


@dataclass(frozen=True, slots=True)
class Options:
    """How much is measured."""

    rounds: int = 5
    samples: int = 2000
    tasks: int = 100_000
    seconds: float = 10.0
    settle_seconds: float = 30.0


QUICK = Options(rounds=2, samples=200, tasks=5000, seconds=2.0, settle_seconds=5.0)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result. Without a floor of its own, `floor` is what the target is counted in."""

    name: str
    unit: str
    ours: float
    floor: float
    ratio: float
    bound: float
    at_least: bool = False
    counts: bool = True

    @property
    def verdict(self) -> str:
        """Whether the target is met, if the run counts."""
        if not self.counts:
            return "does not count"
        return "met" if (self.ratio >= self.bound if self.at_least else self.ratio <= self.bound) else "missed"


@dataclass(frozen=True, slots=True)
class Round:
    """One round: the floor before, ours, the floor after."""

    before: float
    ours: float
    after: float

    @property
    def ratio(self) -> float:
        """Ours against both floors."""
        return self.ours / ((self.before + self.after) / 2)


Figures = dict[str, float]
"""What one side measured in one round, by name."""

Measure = Callable[[], Awaitable[Figures]]


async def interleave(rounds: int, floor: Measure, ours: Measure) -> dict[str, list[Round]]:
    """Measure floor, ours and floor again, round by round; return the rounds of each figure."""
    found: dict[str, list[Round]] = {}
    for _ in range(rounds):
        before, mine, after = await floor(), await ours(), await floor()
        for name in mine:
            found.setdefault(name, []).append(Round(before[name], mine[name], after[name]))
    return found


def against(name: str, unit: str, rounds: Sequence[Round], bound: float, *, at_least: bool = False) -> list[Row]:
    """Return the row of a measure, and that of its floor against itself."""
    spread = statistics.median(one.after / one.before for one in rounds)
    spread = max(spread, 1 / spread)
    mine = statistics.median(one.ours for one in rounds)
    least = statistics.median((one.before + one.after) / 2 for one in rounds)
    ratio = statistics.median(one.ratio for one in rounds)
    counts = spread <= NOISE
    before, after = (statistics.median(getattr(one, side) for one in rounds) for side in ("before", "after"))
    return [
        Row(name, unit, mine, least, ratio, bound, at_least, counts),
        Row(f"{name}: floor against floor", unit, after, before, spread, NOISE),
    ]


def within(name: str, unit: str, value: float, limit: float) -> Row:
    """Return the row of a measure that is bounded by itself."""
    return Row(name, unit, value, limit, value / limit, 1.0)


def p50(seconds: Sequence[float]) -> float:
    """Return the median, in milliseconds."""
    return statistics.median(seconds) * 1000


def p99(seconds: Sequence[float]) -> float:
    """Return the 99th percentile, in milliseconds."""
    return sorted(seconds)[int(len(seconds) * 0.99)] * 1000


def latencies(seconds: Sequence[float]) -> Figures:
    """Return both."""
    return {"p50": p50(seconds), "p99": p99(seconds)}
