"""Serves a watch of one scope: reset and snapshot, or exactly what was missed; then changes and heartbeats."""

from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass

from branchline.resource.v1 import watch_pb2
from branchline.resource.v1.watch_pb2 import WatchChange, WatchFrame

from services.runtime.spine.index import Index
from services.runtime.spine.tokens import parse_resume_token, resume_token

HEARTBEAT_SECONDS = 10.0
FRAME_CHANGES = 200


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame and, on resets, the oldest position that the snapshot's reader can resume others from."""

    frame: WatchFrame
    horizon: int = 0


async def watch(
    index: Index,
    scope: str,
    topic: str,
    kinds: Sequence[str],
    token: str,
    heartbeat_seconds: float = HEARTBEAT_SECONDS,
) -> AsyncIterator[Frame]:
    """Yield frames for ever. Raise InvalidArgument for a token that is not of this topic."""
    wanted = frozenset(kinds)
    point = parse_resume_token(token, topic)
    with index.hub.watcher(scope) as watcher:
        view = await index.view(scope, kinds, after=(point.epoch, point.change_seq)) if point else None
        if view is None:
            view = await index.view(scope, kinds)
            assert view is not None
            yield Frame(WatchFrame(kind=watch_pb2.WATCH_FRAME_KIND_RESET), view.horizon)
            for chunk in chunks(view.changes):
                yield Frame(WatchFrame(kind=watch_pb2.WATCH_FRAME_KIND_SNAPSHOT, changes=chunk))
        else:
            for chunk in chunks(view.changes):
                yield Frame(WatchFrame(kind=watch_pb2.WATCH_FRAME_KIND_CHANGES, changes=chunk))
        epoch, position = view.epoch, view.change_seq

        def frame(kind: watch_pb2.WatchFrameKind.ValueType, changes: Sequence[WatchChange] = ()) -> Frame:
            token = resume_token(topic, epoch, position)
            return Frame(WatchFrame(kind=kind, changes=changes, change_seq=position, resume_token=token))

        yield frame(watch_pb2.WATCH_FRAME_KIND_SYNCED)
        while True:
            taken = await watcher.take(heartbeat_seconds)
            changes = [change for change in taken if change.change_seq > position]
            if watcher.lagging or not epoch:
                # Fell behind, or watched a scope before its first change: the table knows.
                watcher.lagging = False
                watcher.drain()
                view = await index.view(scope, kinds, after=(epoch, position) if epoch else None)
                if view is None:  # compacted beyond our position: the client begins again
                    return
                changes, epoch = view.changes, view.epoch
                position = max(position, view.change_seq)
            fresh = [change for change in changes if change.kind in wanted]
            position = max([position, *(change.change_seq for change in changes)])
            if fresh or not taken:
                kind = watch_pb2.WATCH_FRAME_KIND_CHANGES if fresh else watch_pb2.WATCH_FRAME_KIND_HEARTBEAT
                yield frame(kind, fresh)


def chunks(changes: Sequence[WatchChange], size: int = FRAME_CHANGES) -> Iterator[Sequence[WatchChange]]:
    """Cut changes into frames of bounded size."""
    for start in range(0, len(changes), size):
        yield changes[start : start + size]
