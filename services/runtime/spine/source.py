"""An index as a source of watches: what a coordinator's `WatchIndex` serves."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from branchline_internal.spine.v1.push_pb2 import WatchChange, WatchFrame, WatchSelection

from services.runtime.spine.hub import Hub, Kind
from services.runtime.spine.index import Index, Narrow, Narrowed
from services.runtime.spine.tokens import Position, parse_resume_token
from services.runtime.spine.watch import EVERYBODY, Page, Watch, watch


@dataclass(frozen=True, slots=True)
class IndexSource:
    """One scope of an index, as one viewer sees it."""

    index: Index
    scope: str
    kinds: Sequence[Kind]
    viewer_id: str
    tail: bool = False
    """Whether a watch that cannot be resumed begins at the present, without a snapshot."""

    narrow: Narrow = field(default_factory=dict[Kind, Narrowed])
    """What makes its snapshots smaller."""

    live: bool = True

    @property
    def hub(self) -> Hub:
        """Where changes are published."""
        return self.index.hub

    def catch_up(self, position: Position | None) -> AsyncIterator[Page]:
        """Yield what brings a watcher from a position to the present."""
        return self.index.catch_up(self.scope, self.kinds, position, self.viewer_id, tail=self.tail, narrow=self.narrow)

    def start_over(self) -> None:
        """Nothing is remembered of what was seen."""

    def see(self, change: WatchChange) -> WatchChange | None:
        """Return a change if the viewer watches it."""
        mine = not change.viewer_id or self.viewer_id in {EVERYBODY, change.viewer_id}
        return change if mine and change.kind in self.kinds else None


def watch_index(
    index: Index, topic: str, scope: str, kinds: Sequence[Kind], selection: WatchSelection, narrow: Narrow | None = None
) -> AsyncIterator[WatchFrame]:
    """Watch a scope as selected. Raise InvalidArgument if the resume token is none of this topic."""
    begin = parse_resume_token(selection.resume_token, topic)
    source = IndexSource(index, scope, kinds, selection.viewer_id, selection.tail, narrow or {})
    wanted = Watch(topic, position=begin.position, sight=source, until_synced=selection.until_synced)
    return watch(source, wanted)
