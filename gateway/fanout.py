"""One upstream watch per topic, any number of watchers below it.

A topic holds the newest state of every entity that its upstream showed, tombstones included, so late joiners and
returning clients are served from here. It closes a while after its last watcher has left.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import grpc
import structlog
from branchline.resource.v1 import watch_pb2
from branchline.resource.v1.watch_pb2 import WatchChange, WatchFrame
from branchline.spine.v1.push_pb2 import ConsistencyPoint, ResumePoint

from services.runtime.errors import DeadlineExceeded, DomainError, Unavailable
from services.runtime.retry import Backoff
from services.runtime.spine.hub import Hub
from services.runtime.spine.tokens import parse_resume_token, resume_token
from services.runtime.spine.watch import HEARTBEAT_SECONDS, chunks

log = structlog.get_logger()

LINGER_SECONDS = 30.0
READY_SECONDS = 10.0
_SCOPE = "topic"


class UpstreamResponse(Protocol):
    """A response of an internal `WatchIndex`."""

    @property
    def frame(self) -> WatchFrame:
        """The frame."""
        ...

    @property
    def horizon_seq(self) -> int:
        """Oldest position that can be resumed from."""
        ...


OpenUpstream = Callable[[str], AsyncIterator[UpstreamResponse]]
Visible = Callable[[WatchChange], bool]


@dataclass(slots=True)
class Topic:
    """What one upstream watch shows, and those who watch it here."""

    name: str
    kinds: frozenset[str]
    open_upstream: OpenUpstream
    connected: bool = False
    generation: int = 0
    watchers: int = 0
    _hub: Hub = field(default_factory=Hub)
    _view: dict[tuple[str, str], WatchChange] = field(default_factory=dict[tuple[str, str], WatchChange])
    _epoch: str = ""
    _position: int = 0
    _horizon: int = 0
    _token: str = ""

    async def follow(self) -> None:
        """Follow the upstream for ever."""
        backoff = Backoff(first_seconds=0.1, most_seconds=2.0)
        while True:
            try:
                await self._follow_once(backoff)
            except grpc.aio.AioRpcError as error:
                log.info("upstream watch broke", topic=self.name, code=error.code().name)
            finally:
                self.connected = False
            await asyncio.sleep(backoff.next_seconds())

    async def _follow_once(self, backoff: Backoff) -> None:
        fresh: dict[tuple[str, str], WatchChange] | None = None
        horizon = 0
        async for response in self.open_upstream(self._token):
            frame = response.frame
            if frame.kind == watch_pb2.WATCH_FRAME_KIND_RESET:
                fresh, horizon = {}, response.horizon_seq
                continue
            if fresh is not None:
                fresh.update({(change.kind, change.id): change for change in frame.changes})
            else:
                self._apply(frame)
            if frame.resume_token:
                news = list(frame.changes)
                if fresh is not None:
                    self._view, self._horizon, fresh = fresh, horizon, None
                    self.generation += 1
                    news = list(self._view.values())  # wakes all who watch: they begin again
                point = parse_resume_token(frame.resume_token, self.name)
                assert point is not None
                self._token, self._epoch, self._position = frame.resume_token, point.epoch, point.change_seq
                self.connected = True
                backoff.reset()
                self._hub.publish(_SCOPE, news)

    def _apply(self, frame: WatchFrame) -> None:
        for change in frame.changes:
            self._view[(change.kind, change.id)] = change

    async def watch(self, watch: "Watch") -> AsyncIterator[WatchFrame]:
        """Yield frames to one watcher for ever."""
        point = parse_resume_token(watch.resume_token, self.name)
        with self._hub.watcher(_SCOPE) as watcher:
            await self._until(lambda: bool(self._epoch), Unavailable("INDEX_UNREACHABLE", "the index does not answer"))
            await self._catch_up(watch.consistency)
            if point is not None and point.epoch == self._epoch and point.change_seq > self._position:
                behind = Unavailable("INDEX_BEHIND", "the index is behind the resume token")
                wanted = point.change_seq
                await self._until(lambda: wanted <= self._position, behind)
            while True:
                generation, position = self.generation, self._position
                watcher.drain()
                watcher.lagging = False
                for frame in self._opening(point, watch.visible):
                    yield frame
                point = None
                yield self._frame(watch_pb2.WATCH_FRAME_KIND_SYNCED, position)
                while generation == self.generation:
                    taken = await watcher.take(HEARTBEAT_SECONDS)
                    if generation != self.generation:
                        break
                    if not taken and not watcher.lagging:
                        await watch.still_allowed()
                        if self.connected:  # else say nothing: silence is how a client knows
                            position = self._position
                            yield self._frame(watch_pb2.WATCH_FRAME_KIND_HEARTBEAT, position)
                        continue
                    if watcher.lagging:
                        watcher.lagging = False
                        watcher.drain()
                        taken = self._after(position)
                    news = [change for change in taken if change.change_seq > position and watch.visible(change)]
                    position = max([position, *(change.change_seq for change in taken)])
                    for chunk in chunks(news):
                        yield self._frame(watch_pb2.WATCH_FRAME_KIND_CHANGES, chunk[-1].change_seq, chunk)

    def _opening(self, point: ResumePoint | None, visible: Visible) -> Iterator[WatchFrame]:
        """Yield what a watcher must be told first: exactly what it missed, or everything."""
        known = point is not None and point.epoch == self._epoch
        if point is not None and known and self._horizon <= point.change_seq <= self._position:
            for chunk in chunks([change for change in self._after(point.change_seq) if visible(change)]):
                yield WatchFrame(kind=watch_pb2.WATCH_FRAME_KIND_CHANGES, changes=chunk)
            return
        yield WatchFrame(kind=watch_pb2.WATCH_FRAME_KIND_RESET)
        for chunk in chunks([change for change in self._after(0) if not change.deleted and visible(change)]):
            yield WatchFrame(kind=watch_pb2.WATCH_FRAME_KIND_SNAPSHOT, changes=chunk)

    def _after(self, change_seq: int) -> list[WatchChange]:
        found = [change for change in self._view.values() if change.change_seq > change_seq]
        return sorted(found, key=lambda change: change.change_seq)

    def _frame(
        self, kind: watch_pb2.WatchFrameKind.ValueType, position: int, changes: Sequence[WatchChange] = ()
    ) -> WatchFrame:
        token = resume_token(self.name, self._epoch, position)
        return WatchFrame(kind=kind, changes=changes, change_seq=position, resume_token=token)

    async def _catch_up(self, consistency: ConsistencyPoint) -> None:
        for wanted in consistency.entities:
            key = (wanted.kind, wanted.id)
            words = f"the index does not yet hold revision {wanted.revision} of {wanted.kind} {wanted.id}"
            if wanted.kind in self.kinds:
                await self._until(
                    lambda key=key, wanted=wanted: key in self._view and self._view[key].revision >= wanted.revision,
                    DeadlineExceeded("INDEX_BEHIND", words, kind=wanted.kind, id=wanted.id),
                )

    async def _until(self, holds: Callable[[], bool], error: DomainError) -> None:
        deadline = asyncio.get_running_loop().time() + READY_SECONDS
        while True:
            ticket = self._hub.changed.ticket
            if holds():
                return
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0 or not await self._hub.changed.wait(ticket, left):
                raise error


@dataclass(frozen=True, slots=True)
class Watch:
    """What one watcher asked for. `still_allowed` raises when the caller may no longer watch."""

    resume_token: str
    consistency: ConsistencyPoint
    visible: Visible
    still_allowed: Callable[[], Awaitable[None]]


class FanOut:
    """All topics of the gateway. Runs in the gateway's task group."""

    def __init__(self) -> None:
        self._topics: dict[str, Topic] = {}
        self._opened: asyncio.Queue[Topic] = asyncio.Queue()

    async def run(self) -> None:
        """Follow the upstreams of open topics, for ever."""
        async with asyncio.TaskGroup() as group:
            while True:
                topic = await self._opened.get()
                group.create_task(self._serve(topic))

    async def _serve(self, topic: Topic) -> None:
        following = asyncio.create_task(topic.follow())
        try:
            await self._until_abandoned(topic, following)
        finally:
            following.cancel()

    async def _until_abandoned(self, topic: Topic, following: "asyncio.Task[None]") -> None:
        while True:
            done, _ = await asyncio.wait({following}, timeout=LINGER_SECONDS)
            if done:
                following.result()
            if not topic.watchers:
                del self._topics[topic.name]
                return

    @contextmanager
    def topic(self, name: str, kinds: frozenset[str], open_upstream: OpenUpstream) -> Generator[Topic, None, None]:
        """Hold a topic open for the length of the block."""
        topic = self._topics.get(name)
        if topic is None:
            topic = self._topics[name] = Topic(name, kinds, open_upstream)
            self._opened.put_nowait(topic)
        topic.watchers += 1
        try:
            yield topic
        finally:
            topic.watchers -= 1
