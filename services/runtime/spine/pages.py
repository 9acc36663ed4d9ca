"""Pages of lists: bounded in number and in bytes, each followed by the place of its last row."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from services.runtime.spine.chunks import PART_BYTES
from services.runtime.spine.tokens import Value, page_token

M = TypeVar("M", bound=Message)


@dataclass(frozen=True, slots=True)
class Page(Generic[M]):
    """Part of a list."""

    found: Sequence[M]
    last: Sequence[Value] = ()
    """Sort values of the last row if there are more behind it."""

    def next_token(self, request: Message) -> str:
        """Return the token of the page behind this one; empty if this is the last."""
        return page_token(request, self.last) if self.last else ""


def page_of(message: type[M], rows: Iterable[Any], keys: Sequence[str], most: int) -> Page[M]:
    """Make a page of rows with a `payload`, of which no more are read than it takes. `keys` are the sort columns."""
    cut: list[Any] = []
    size = 0
    for row in rows:
        size += len(row.payload)
        if cut and (len(cut) == most or size > PART_BYTES):
            return Page(_parsed(message, cut), [getattr(cut[-1], key) for key in keys])
        cut.append(row)
    return Page(_parsed(message, cut))


def _parsed(message: type[M], rows: Sequence[Any]) -> list[M]:
    return [message.FromString(row.payload) for row in rows]
