"""How often each caller may call."""

from collections.abc import Callable
from time import monotonic

from branchline.resource.v1.vocabulary_pb2 import ERROR_REASON_RATE_LIMITED
from cachetools import TTLCache

from services.runtime.errors import ResourceExhausted

_MINUTE_SECONDS = 60.0
_CALLERS = 100_000


class Allowance:
    """So many calls a minute for each caller: unused ones gather up to a minute's worth.

    One number for each caller: when all that was taken will have grown back (the generic cell rate algorithm,
    ITU-T I.371).
    """

    def __init__(self, calls_per_minute: int, now: Callable[[], float] = monotonic) -> None:
        self._calls = calls_per_minute
        self._each_seconds = _MINUTE_SECONDS / calls_per_minute
        self._now = now
        self._whole_again = TTLCache[str, float](_CALLERS, _MINUTE_SECONDS, now)

    def take(self, caller: str) -> None:
        """Take one call; raise ResourceExhausted if there is none left."""
        now = self._now()
        whole_again = max(now, self._whole_again.get(caller, now)) + self._each_seconds
        wait = whole_again - now - _MINUTE_SECONDS
        if wait > 1e-6:
            sentence = f"more than {self._calls} calls in a minute; go on in {wait:.1f} s"
            raise ResourceExhausted(ERROR_REASON_RATE_LIMITED, sentence)
        self._whole_again[caller] = whole_again
