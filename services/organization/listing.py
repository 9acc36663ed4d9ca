"""Lists that are read page by page: a query, its order, and the place of its last row."""

from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message
from sqlalchemy import ColumnElement, Select, bindparam, tuple_

from services.runtime.database import Reader, Statement
from services.runtime.spine.pages import Page, page_of, page_size
from services.runtime.spine.tokens import Value, parse_page_token

M = TypeVar("M", bound=Message)


class Listing(Generic[M]):
    """One list. `query` selects a `payload`; `keys` order it, are unique together, and are texts or times."""

    def __init__(
        self,
        message: type[M],
        query: Select[Any],
        keys: Sequence[ColumnElement[Any]],
        kinds: Sequence[type[Value]],
        *,
        descending: bool = False,
    ) -> None:
        self._message = message
        self._kinds = kinds
        self._names = [f"key_{number}" for number in range(len(keys))]
        labelled = [key.label(name) for key, name in zip(keys, self._names, strict=True)]
        listed = (
            query.add_columns(*labelled)
            .order_by(*(key.desc() if descending else key for key in keys))
            .limit(bindparam("most"))
        )
        place = tuple_(*keys)
        last = tuple_(
            *(bindparam(f"after_{name}", type_=key.type) for key, name in zip(keys, self._names, strict=True))
        )
        self.first = Statement(listed)
        self.next = Statement(listed.where(place < last if descending else place > last))

    def after(self, request: Message, token: str) -> Sequence[Value] | None:
        """Return the place that a page begins behind. Raise InvalidArgument if the token is none of this list."""
        return parse_page_token(request, token, *self._kinds)

    def page(self, tx: Reader, given: Mapping[str, Any], after: Sequence[Value] | None, wanted: int) -> Page[M]:
        """Return what is behind a place."""
        most = page_size(wanted)
        bound = dict(given) | {"most": most + 1}
        if after is not None:
            bound |= {f"after_{name}": value for name, value in zip(self._names, after, strict=True)}
        return page_of(self._message, tx.each(self.first if after is None else self.next, bound), self._names, most)
