"""Queries of the history service."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from branchline.resource.v1.history_pb2 import HistoryEvent
from sqlalchemy import bindparam, delete, select, update

from services.history.tables import events, feeds
from services.runtime.database import Reader, Statement, Tx, insert, insert_new, is_in
from services.runtime.spine.chunks import parts
from services.runtime.spine.outbox import Mark, Outbox

_PAGE_EVENTS = 500

_KNOWN = Statement(select(events.c.id).where(is_in(events.c.id, "ids")))
_OPEN_FEED = Statement(insert_new(feeds, ["organization_id"]))
_TAKE_NUMBERS = Statement(
    update(feeds)
    .where(feeds.c.organization_id == bindparam("of"))
    .values(last_sequence=feeds.c.last_sequence + bindparam("count"))
    .returning(feeds.c.last_sequence)
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
        known = {row.id for row in tx.rows(_KNOWN, {"ids": [event.id for event in given]})}
        new = {event.id: event for event in given if event.id not in known}
        by_feed: dict[str, list[HistoryEvent]] = {}
        for event in new.values():
            by_feed.setdefault(event.organization_id, []).append(event)
        for organization_id, found in sorted(by_feed.items()):
            first = self._take_numbers(tx, organization_id, len(found))
            for place, event in enumerate(found):
                event.sequence = first + place
        tx.change_many(_ADD, [_row(event) for event in new.values()])
        self.outbox.mark(tx, [Mark(event.id, 1, event) for event in new.values()])

    def _take_numbers(self, tx: Tx, organization_id: str, count: int) -> int:
        """Take numbers of a feed; return the first."""
        taken = {"of": organization_id, "count": count}
        last = tx.value(_TAKE_NUMBERS, taken)
        if last is None:
            tx.change(_OPEN_FEED, {"organization_id": organization_id, "last_sequence": 0})
            last = tx.value(_TAKE_NUMBERS, taken)
        return last - count + 1

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
