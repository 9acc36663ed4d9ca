"""Queries of the history service."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from branchline.v1.history_pb2 import HistoryEvent
from sqlalchemy import bindparam, delete, func, select, update

from services.history.tables import events, feeds
from services.runtime.database import Reader, Statement, Tx, insert, insert_new, is_in
from services.runtime.spine.chunks import parts
from services.runtime.spine.outbox import Mark, Outbox

_PAGE_EVENTS = 500

_IS_KNOWN = is_in(events.c.id, "ids")
_COUNT_KNOWN = select(func.count()).select_from(events).where(_IS_KNOWN).scalar_subquery()
_KNOWN = Statement(select(events.c.id).where(_IS_KNOWN))
_OPEN_FEED = Statement(insert_new(feeds, ["organization_id"]))
_TAKE_NUMBERS = Statement(
    update(feeds)
    .where(feeds.c.organization_id == bindparam("of"))
    .values(last_sequence=feeds.c.last_sequence + bindparam("count") - _COUNT_KNOWN)
    .returning(feeds.c.last_sequence, _COUNT_KNOWN.label("known"))
)
_ADD = Statement(insert(events))
_PAGE = Statement(
    select(events.c.payload)
    .where(events.c.organization_id == bindparam("of"), events.c.sequence > bindparam("after"))
    .order_by(events.c.sequence)
    .limit(bindparam("most"))
)
_DELETE_EVENTS = Statement(delete(events).where(events.c.organization_id == bindparam("of")))
_DELETE_FEED = Statement(delete(feeds).where(feeds.c.organization_id == bindparam("of")))


@dataclass(frozen=True, slots=True)
class HistoryStore:
    """The feed of every organization."""

    outbox: Outbox

    def append(self, tx: Tx, given: Sequence[HistoryEvent]) -> None:
        """Give numbers to, store and push up the events that are not stored yet."""
        by_feed: dict[str, dict[str, HistoryEvent]] = {}
        for event in given:
            by_feed.setdefault(event.organization_id, {})[event.id] = event
        new = [event for feed, found in sorted(by_feed.items()) for event in self._number(tx, feed, found)]
        tx.change_many(_ADD, [_row(event) for event in new])
        self.outbox.mark(tx, [Mark(event.id, 1, event) for event in new])

    def _number(self, tx: Tx, organization_id: str, found: Mapping[str, HistoryEvent]) -> Sequence[HistoryEvent]:
        """Give events of a feed its next numbers, but for those that are stored; return the others."""
        taken = {"of": organization_id, "count": len(found), "ids": list(found)}
        row: Any = tx.row(_TAKE_NUMBERS, taken)
        if row is None:
            tx.change(_OPEN_FEED, {"organization_id": organization_id, "last_sequence": 0})
            row = tx.row(_TAKE_NUMBERS, taken)
        known = {one.id for one in tx.rows(_KNOWN, taken)} if row.known else set[str]()
        new = [event for event in found.values() if event.id not in known]
        for sequence, event in enumerate(new, row.last_sequence - len(new) + 1):
            event.sequence = sequence
        return new

    def page(self, tx: Reader, organization_id: str, after_sequence: int) -> list[HistoryEvent]:
        """Return the next events of a feed, oldest first."""
        rows = tx.each(_PAGE, {"of": organization_id, "after": after_sequence, "most": _PAGE_EVENTS})
        payloads = next(parts((row.payload for row in rows), len, _PAGE_EVENTS), None) or []
        return [HistoryEvent.FromString(payload) for payload in payloads]

    def delete(self, tx: Tx, organization_id: str) -> None:
        """Forget a feed."""
        tx.change(_DELETE_EVENTS, {"of": organization_id})
        tx.change(_DELETE_FEED, {"of": organization_id})


def _row(event: HistoryEvent) -> dict[str, Any]:
    return {
        "id": event.id,
        "organization_id": event.organization_id,
        "sequence": event.sequence,
        "payload": event.SerializeToString(),
    }
