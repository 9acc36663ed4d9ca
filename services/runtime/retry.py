"""Backoff with jitter for loops that must not give up."""

import random


class Backoff:
    """Waiting times that double up to a limit, each drawn between half and whole (equal jitter).

    Source: "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """

    def __init__(self, first_seconds: float = 0.05, most_seconds: float = 2.0) -> None:
        self._first = first_seconds
        self._most = most_seconds
        self._next = first_seconds

    def next_seconds(self) -> float:
        """Return how long to wait now."""
        whole = self._next
        self._next = min(self._next * 2, self._most)
        return random.uniform(whole / 2, whole)

    def reset(self) -> None:
        """Begin again with the shortest time; call it after a success."""
        self._next = self._first
