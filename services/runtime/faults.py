"""Moments at which tests end a service. Without `TEST_KILL_AT` in the environment nothing happens."""

import asyncio
import os
import signal
from collections import Counter

_WANTED, _, _rest = os.environ.get("TEST_KILL_AT", "").partition("/")
_COUNT, _, _HOW = _rest.partition("/")
_seen: Counter[str] = Counter()


def reached(moment: str) -> None:
    """End here, if `TEST_KILL_AT` is "MOMENT" or, for the nth time that it is reached, "MOMENT/n".

    That is by SIGKILL. With "MOMENT/n/stop" it is an ordinary stop, which finds the running task exactly here.
    """
    if moment != _WANTED:
        return
    _seen[moment] += 1
    if _seen[moment] != int(_COUNT or 1):
        return
    if _HOW != "stop":
        os.kill(os.getpid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGTERM)
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    raise asyncio.CancelledError
