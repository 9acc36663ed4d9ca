"""The last changes of what is watched: bounded in number and in bytes, the newest state of each entity once."""

from collections import OrderedDict
from collections.abc import Iterator

from branchline_internal.spine.v1.push_pb2 import WatchChange

from services.runtime.spine.chunks import parts
from services.runtime.spine.tokens import Position
from services.runtime.spine.watch import FRAME_CHANGES, Page, size_of

RING_CHANGES = 4096
RING_BYTES = 8 * 1024 * 1024


class Ring:
    """Holds every change behind `floor`, up to `position`, of one sequence."""

    def __init__(self, position: Position, most: int = RING_CHANGES, most_bytes: int = RING_BYTES) -> None:
        self.position = position
        self.floor = position.change_seq
        self._most = most
        self._most_bytes = most_bytes
        self._changes: OrderedDict[tuple[int, str], WatchChange] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._changes)

    def add(self, change: WatchChange) -> None:
        """Hold a change that follows all that are held; forget the oldest where there are too many."""
        key = (change.kind, change.id)
        older = self._changes.pop(key, None)
        self._bytes += size_of(change) - (size_of(older) if older is not None else 0)
        self._changes[key] = change
        self.reach(change.change_seq)
        while len(self._changes) > self._most or self._bytes > self._most_bytes:
            _, oldest = self._changes.popitem(last=False)
            self._bytes -= size_of(oldest)
            self.floor = oldest.change_seq

    def reach(self, change_seq: int) -> None:
        """Move the position: whatever changed up to there is known."""
        if change_seq > self.position.change_seq:
            self.position = Position(self.position.epoch, change_seq)

    def page(self, after: Position) -> Page | None:
        """Return the first changes behind a position, or None if they are not all held."""
        known = after.epoch == self.position.epoch and self.floor <= after.change_seq <= self.position.change_seq
        if not known:
            return None
        missed = list(self._behind(after.change_seq))
        missed.reverse()
        first = next(parts(missed, size_of, FRAME_CHANGES), None) or []
        if len(first) < len(missed):
            return Page(Position(after.epoch, first[-1].change_seq), first, more=True)
        return Page(self.position, first)

    def _behind(self, change_seq: int) -> Iterator[WatchChange]:
        """Yield the changes behind a number, newest first."""
        for change in reversed(self._changes.values()):
            if change.change_seq <= change_seq:
                return
            yield change
