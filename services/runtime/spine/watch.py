"""The one watch: reset and snapshot, or exactly what was missed; then changes and heartbeats for ever.

It runs over any source: a coordinator's index, or the gateway's replica of one. The watcher's queue is opened before
the source is asked to catch up, so nothing falls between; a queue that overflows means to catch up again. A position
never passes a change that was not delivered.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from branchline.v1 import watches_pb2
from branchline.v1.watches_pb2 import (
    RESET_REASON_NO_TOKEN,
    RESET_REASON_REQUEST_CHANGED,
    RESET_REASON_UNSPECIFIED,
    ResetReason,
)
from branchline_internal.spine.v1.push_pb2 import WatchChange, WatchFrame
from google.protobuf.duration_pb2 import Duration

from services.runtime.spine.chunks import parts
from services.runtime.spine.hub import Hub
from services.runtime.spine.tokens import Position, resume_token

HEARTBEAT_SECONDS = 10.0
_SHORTEST_HEARTBEAT_SECONDS, _LONGEST_HEARTBEAT_SECONDS = 1.0, 60.0
FRAME_CHANGES = 200
EVERYBODY = "*"
"""Viewer that sees every user's own entities."""

_OVERHEAD_BYTES = 200


@dataclass(frozen=True, slots=True)
class Page:
    """Part of what brings a watcher to the present.

    `position` is where the watcher stands once it has it; none within a snapshot. With `reset`, which says why, it must
    forget what it holds first.
    """

    position: Position | None
    changes: Sequence[WatchChange] = ()
    reset: ResetReason.ValueType = RESET_REASON_UNSPECIFIED
    snapshot: bool = False
    more: bool = False


class Source(Protocol):
    """What can be watched: one scope of an index, or a replica of it."""

    @property
    def hub(self) -> Hub:
        """Where its changes are published."""
        ...

    @property
    def scope(self) -> str:
        """Under which name they are."""
        ...

    @property
    def live(self) -> bool:
        """Whether it would hear of a change now. If not, silence is how a client knows."""
        ...

    def catch_up(self, position: Position | None) -> AsyncIterator[Page]:
        """Yield what brings a watcher from a position to the present; the last page has a position."""
        ...


async def _allowed() -> None:
    return


class Sight(Protocol):
    """What one watcher sees of a source."""

    def start_over(self) -> None:
        """Forget what was seen: a reset goes out."""
        ...

    def see(self, change: WatchChange) -> WatchChange | None:
        """Return a change as the watcher sees it, or None."""
        ...


class Everything:
    """Sees every change as it is."""

    def start_over(self) -> None:
        """Nothing is remembered."""

    def see(self, change: WatchChange) -> WatchChange | None:
        """Return the change."""
        return change


def _none() -> float:
    return 0.0


@dataclass(frozen=True, slots=True)
class Watch:
    """What one watcher asked for."""

    topic: str
    """What its resume tokens are bound to."""

    selection: bytes = b""
    """What of it is selected: its resume tokens are bound to that, too."""

    position: Position | None = None
    changed: bool = False
    """Whether it brought a resume token that was made for another selection."""

    sight: Sight = field(default_factory=Everything)
    until_synced: bool = False
    heartbeat_seconds: float = HEARTBEAT_SECONDS
    check: Callable[[], Awaitable[None]] = _allowed
    """Raises when the watcher may no longer watch; asked every `check_seconds`, busy or not."""
    check_seconds: float = 5.0
    pause_seconds: Callable[[], float] = _none
    """How long it waits after a frame of changes before the next: what changes meanwhile comes with it, once."""


async def watch(source: Source, wanted: Watch) -> AsyncGenerator[WatchFrame, None]:
    """Yield frames for ever, or until synced."""
    clock = asyncio.get_running_loop().time
    position = wanted.position
    checked = clock()
    with source.hub.watcher(source.scope) as watcher:
        while True:
            watcher.start_over()
            async for page in source.catch_up(position):
                position = page.position or position
                if clock() - checked >= wanted.check_seconds:
                    await wanted.check()
                    checked = clock()
                for frame in _opening(wanted, page):
                    yield frame
            assert position is not None, "the last page of a source has a position"
            yield _frame(wanted, watches_pb2.FRAME_KIND_SYNCED, position)
            if wanted.until_synced:
                return
            sent = clock()
            told = False
            while not watcher.lagging:
                if told:
                    await asyncio.sleep(wanted.pause_seconds())
                    told = False
                soonest = min(sent + wanted.heartbeat_seconds, checked + wanted.check_seconds)
                taken = await watcher.take(max(0.0, soonest - clock()))
                if clock() - checked >= wanted.check_seconds:
                    await wanted.check()
                    checked = clock()
                if watcher.lagging:
                    break
                fresh = [change for change in taken if change.change_seq > position.change_seq]
                fresh.sort(key=lambda change: change.change_seq)
                for chunk in parts(_seen(wanted, fresh), size_of, FRAME_CHANGES):
                    position = Position(position.epoch, chunk[-1].change_seq)
                    yield _frame(wanted, watches_pb2.FRAME_KIND_CHANGES, position, chunk)
                    sent = clock()
                    told = True
                if fresh:
                    position = Position(position.epoch, fresh[-1].change_seq)
                if clock() - sent >= wanted.heartbeat_seconds:
                    if source.live:
                        yield _frame(wanted, watches_pb2.FRAME_KIND_HEARTBEAT, position)
                    sent = clock()


def heartbeat_seconds(asked: Duration) -> float:
    """Return the seconds between heartbeats that a request asks for."""
    seconds = asked.ToNanoseconds() / 1e9 or HEARTBEAT_SECONDS
    return min(max(seconds, _SHORTEST_HEARTBEAT_SECONDS), _LONGEST_HEARTBEAT_SECONDS)


def size_of(change: WatchChange) -> int:
    """Return about how many bytes a change takes in a frame."""
    return len(change.entity) + _OVERHEAD_BYTES


def _opening(wanted: Watch, page: Page) -> list[WatchFrame]:
    frames: list[WatchFrame] = []
    if page.reset:
        wanted.sight.start_over()
        frames.append(WatchFrame(kind=watches_pb2.FRAME_KIND_RESET, reset_reason=_reason(wanted, page)))
    changes = list(_seen(wanted, page.changes))
    if changes and page.snapshot:
        frames.append(WatchFrame(kind=watches_pb2.FRAME_KIND_SNAPSHOT, changes=changes))
    elif changes and page.position is not None:
        frames.append(_frame(wanted, watches_pb2.FRAME_KIND_CHANGES, page.position, changes))
    return frames


def _seen(wanted: Watch, changes: Sequence[WatchChange]) -> Iterator[WatchChange]:
    return (seen for seen in map(wanted.sight.see, changes) if seen is not None)


def _reason(wanted: Watch, page: Page) -> ResetReason.ValueType:
    """Return why a watch begins anew. The source does not know of a token that was not given to it."""
    return RESET_REASON_REQUEST_CHANGED if wanted.changed and page.reset == RESET_REASON_NO_TOKEN else page.reset


def _frame(
    wanted: Watch, kind: watches_pb2.FrameKind.ValueType, position: Position, changes: Sequence[WatchChange] = ()
) -> WatchFrame:
    token = resume_token(wanted.topic, position, wanted.selection)
    return WatchFrame(kind=kind, changes=changes, change_seq=position.change_seq, resume_token=token)
