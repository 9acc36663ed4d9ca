"""Cuts what travels into parts that are bounded in number and in bytes."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

PART_BYTES = 1024 * 1024
"""Where batches, frames and pages end; each holds at least one entity."""

T = TypeVar("T")


def parts(items: Iterable[T], size: Callable[[T], int], most: int, most_bytes: int = PART_BYTES) -> Iterator[list[T]]:
    """Cut items into parts of at most so many, and of at most so many bytes unless one alone has more."""
    part: list[T] = []
    total = 0
    for item in items:
        item_bytes = size(item)
        if part and (len(part) >= most or total + item_bytes > most_bytes):
            yield part
            part, total = [], 0
        part.append(item)
        total += item_bytes
    if part:
        yield part
