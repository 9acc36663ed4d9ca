"""Moments at which tests kill the service. Without `BRANCHLINE_KILL_AT` in the environment nothing happens."""

import os
import signal
from collections import Counter

_WANTED, _, _COUNT = os.environ.get("BRANCHLINE_KILL_AT", "").partition("/")
_seen: Counter[str] = Counter()


def reached(moment: str) -> None:
    """Die here, if `BRANCHLINE_KILL_AT` is "MOMENT" or, for the nth time that it is reached, "MOMENT/n"."""
    if moment != _WANTED:
        return
    _seen[moment] += 1
    if _seen[moment] == int(_COUNT or 1):
        os.kill(os.getpid(), signal.SIGKILL)
