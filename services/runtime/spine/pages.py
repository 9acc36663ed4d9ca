"""Pages of lists: bounded in number and in bytes, each followed by the place of its last row."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from services.runtime.errors import InvalidArgument
from services.runtime.spine.chunks import PART_BYTES
from services.runtime.spine.tokens import Value, page_token

M = TypeVar("M", bound=Message)
Order = TypeVar("Order")

MOST_ITEMS = 1000
"""Most items in a page; who asks for more gets these."""

_ITEMS = 100


@dataclass(frozen=True, slots=True)
class Page(Generic[M]):
    """Part of a list."""

    found: Sequence[M]
    last: Sequence[Value] = ()
    """Sort values of the last row if there are more behind it."""

    def next_token(self, request: Message) -> str:
        """Return the token of the page behind this one; empty if this is the last."""
        return page_token(request, self.last) if self.last else ""


def page_size(wanted: int, default: int = _ITEMS) -> int:
    """Return how many items a page has at most. `default` is for lists of which people see all at once."""
    return min(wanted or default, MOST_ITEMS)


def order(wanted: str, known: Mapping[str, Order], default: str) -> Order:
    """Return what an `order_by` stands for; raise InvalidArgument naming those that are known."""
    found = known.get(" ".join(wanted.split()) or default)
    if found is None:
        raise InvalidArgument("order_by", f"is none of: {', '.join(known)}")
    return found


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
