"""Backoff with jitter for loops that must not give up."""

import random

_MOST_DOUBLED = 64


def pause_seconds(attempts: int, first_seconds: float, most_seconds: float) -> float:
    """Return how long to wait after so many attempts: doubled with each, drawn between half and whole (equal jitter).

    Source: "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """
    whole = min(first_seconds * 2.0 ** (attempts - 1), most_seconds)
    return random.uniform(whole / 2, whole)


class Backoff:
    """Waiting times of one who tries again and again."""

    def __init__(self, first_seconds: float = 0.05, most_seconds: float = 2.0) -> None:
        self._first = first_seconds
        self._most = most_seconds
        self._attempts = 0

    def next_seconds(self) -> float:
        """Return how long to wait now."""
        self._attempts = min(self._attempts + 1, _MOST_DOUBLED)
        return pause_seconds(self._attempts, self._first, self._most)

    def reset(self) -> None:
        """Begin again with the shortest time; call it after a success."""
        self._attempts = 0
