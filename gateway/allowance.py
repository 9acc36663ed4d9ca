"""How often each caller may call, and how many of its calls run at once."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack, asynccontextmanager
from time import monotonic
from weakref import WeakValueDictionary

from branchline.v1.errors_pb2 import ERROR_REASON_RATE_LIMITED
from cachetools import TTLCache

from services.runtime.errors import ResourceExhausted

_MINUTE_SECONDS = 60.0
_GATHERED_SECONDS = 10.0
_CALLERS = 100_000

RUNNING = 16
"""Calls of one caller that run at once."""

LONG_SECONDS = 1.0
"""A call that takes longer waits for something else than the gateway, and others of its caller may run."""


class Allowance:
    """So many calls a minute for each caller: unused ones gather up to ten seconds' worth, at least one.

    One number for each caller: when all that was taken will have grown back (the generic cell rate algorithm,
    ITU-T I.371).
    """

    def __init__(self, calls_per_minute: int, now: Callable[[], float] = monotonic) -> None:
        self._calls = calls_per_minute
        self._each_seconds = _MINUTE_SECONDS / calls_per_minute
        self._most_seconds = max(_GATHERED_SECONDS, self._each_seconds)
        self._now = now
        self._whole_again = TTLCache[str, float](_CALLERS, _MINUTE_SECONDS, now)

    def take(self, caller: str) -> None:
        """Take one call; raise ResourceExhausted if there is none left."""
        now = self._now()
        whole_again = max(now, self._whole_again.get(caller, now)) + self._each_seconds
        wait = whole_again - now - self._most_seconds
        if wait > 1e-6:
            sentence = f"more than {self._calls} calls in a minute; go on in {wait:.1f} s"
            raise ResourceExhausted(ERROR_REASON_RATE_LIMITED, sentence)
        self._whole_again[caller] = whole_again


class CallersLanes:
    """A lane for each caller: so many of its calls run at once. Its others wait behind them, and nobody else does."""

    def __init__(self) -> None:
        self._lanes = WeakValueDictionary[str, asyncio.Semaphore]()

    @asynccontextmanager
    async def hold(self, caller: str) -> AsyncGenerator[None, None]:
        """Run in the caller's lane for the length of the block; one that takes long leaves its place to the next."""
        lane = self._lanes.setdefault(caller, asyncio.Semaphore(RUNNING))
        await lane.acquire()
        with ExitStack() as place:
            place.callback(lane.release)
            leaving = asyncio.get_running_loop().call_later(LONG_SECONDS, place.close)
            place.callback(leaving.cancel)
            yield
