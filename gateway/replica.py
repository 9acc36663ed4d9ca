"""What one upstream watch has shown last, and those who watch it here.

A replica follows the present of one coordinator's scope and forgets: it holds the last changes alone. A watcher whose
place lies within them is served from them. Any other is brought to the present by the coordinator itself, page by page
and never held, over an upstream watch of its own; since its queue was opened before, what changes meanwhile waits
there, and the two join at the position where its own upstream was synced.
"""

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc
from branchline.v1.common_pb2 import Consistency
from branchline.v1.errors_pb2 import ERROR_REASON_INDEX_UNREACHABLE
from branchline.v1.watches_pb2 import FRAME_KIND_RESET, FRAME_KIND_SNAPSHOT, FRAME_KIND_SYNCED
from branchline_internal.spine.v1.push_pb2 import WatchChange, WatchFrame, WatchSelection
from grpc_status import rpc_status

from gateway.ring import Ring
from services.runtime.errors import Unavailable, is_permanent, reason_of
from services.runtime.logging import get_logger
from services.runtime.loops import being_cancelled
from services.runtime.retry import Backoff
from services.runtime.spine.hub import Hub
from services.runtime.spine.tokens import Position, parse_resume_token, resume_token
from services.runtime.spine.watch import EVERYBODY, HEARTBEAT_SECONDS, Page

log = get_logger(__name__)

READY_SECONDS = 10.0
"""How long a watcher waits for an upstream that does not answer."""

FOLLOW_SILENCE_SECONDS = 3 * HEARTBEAT_SECONDS
"""After which an upstream that should send heartbeats is taken for dead."""

CATCH_UP_SILENCE_SECONDS = 45.0
"""After which one that catches up is; longer than a coordinator makes anybody wait."""

_REJOIN_SECONDS = 0.1

_TURNS = 16
"""How many watchers of a replica read from the coordinator at the same moment."""

_SPREAD_SECONDS = 5.0
_SPREAD_SECONDS_EACH = 0.005
"""Over how long watchers are spread that must all catch up: so much for each, at most `_SPREAD_SECONDS`."""


class Upstream(Protocol):
    """Opens a coordinator's watch of one scope."""

    def __call__(self, selection: WatchSelection) -> Any:
        """Return the call; its responses hold a `frame`."""
        ...


@dataclass(slots=True)
class Replica:
    """The last changes of one scope, and the hub that its watchers hang on."""

    topic: str
    """What is watched: the topic of the coordinator's resume tokens."""

    upstream: Upstream
    new_ring: Callable[[Position], Ring] = Ring
    hub: Hub = field(default_factory=Hub)
    ring: Ring | None = None
    watchers: int = 0
    live: bool = False
    """Whether it would hear of a change now."""

    turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_TURNS))
    """To be taken for each read from the coordinator."""

    _spread_until: float = 0.0
    _refusal: grpc.aio.AioRpcError | None = None
    _settled: asyncio.Event = field(default_factory=asyncio.Event)

    async def follow(self) -> None:
        """Follow the upstream for ever."""
        backoff = Backoff(first_seconds=0.1, most_seconds=2.0)
        while True:
            try:
                await self._follow_once(backoff)
                reason, self._refusal = "it ended", None
            except (Exception, asyncio.CancelledError) as error:
                if being_cancelled():
                    raise
                reason = reason_of(error)
                self._refusal = error if isinstance(error, grpc.aio.AioRpcError) and is_permanent(error) else None
            self._unsettle()
            log.info("upstream watch broke", topic=self.topic, reason=reason)
            await asyncio.sleep(backoff.next_seconds())

    async def until_live(self) -> Ring:
        """Return the ring once the upstream answers.

        Raise Unavailable if it does not, or what the coordinator says where it refuses.
        """
        try:
            async with asyncio.timeout(READY_SECONDS):
                await self._settled.wait()
        except TimeoutError as error:
            raise unreachable() from error
        if self._refusal is not None:
            raise self._refusal.with_traceback(None)  # raised to each watcher: it would grow
        assert self.ring is not None
        return self.ring

    async def spread(self) -> None:
        """Wait a part of the time over which those are spread who must all catch up, if that is now."""
        left = self._spread_until - asyncio.get_running_loop().time()
        if left > 0:
            await asyncio.sleep(random.uniform(0, left))

    async def _follow_once(self, backoff: Backoff) -> None:
        token = resume_token(self.topic, self.ring.position) if self.ring is not None else ""
        selection = WatchSelection(resume_token=token, tail=True, viewer_id=EVERYBODY)
        beginning = self.ring is None
        async with aclosing(_frames(self.upstream, selection, FOLLOW_SILENCE_SECONDS)) as frames:
            async for frame in frames:
                if frame.kind == FRAME_KIND_RESET:
                    beginning = True
                    self._unsettle()
                position = parse_resume_token(frame.resume_token, self.topic).position
                if position is None:
                    continue
                if beginning:
                    self._begin(position)
                    beginning = False
                else:
                    self._apply(frame, position)
                if frame.kind == FRAME_KIND_SYNCED:
                    backoff.reset()
                    self._settle()

    def _begin(self, position: Position) -> None:
        """Begin anew: what was held does not lead here. Who watches must catch up from the coordinator."""
        if self.ring is not None:
            seconds = min(self.watchers * _SPREAD_SECONDS_EACH, _SPREAD_SECONDS)
            self._spread_until = asyncio.get_running_loop().time() + seconds
            self.hub.lag(self.topic)
        self.ring = self.new_ring(position)

    def _apply(self, frame: WatchFrame, position: Position) -> None:
        """Hold and publish changes. A position is reached only with the changes that lead to it."""
        ring = self.ring
        assert ring is not None
        fresh = [_alone(change) for change in frame.changes if change.change_seq > ring.position.change_seq]
        for change in fresh:
            ring.add(change)
        ring.reach(position.change_seq)
        self.hub.publish(self.topic, fresh)

    def _settle(self) -> None:
        self.live, self._refusal = True, None
        self._settled.set()

    def _unsettle(self) -> None:
        self.live = False
        if self._refusal is None:
            self._settled.clear()
        else:
            self._settled.set()


@dataclass(slots=True)
class View:
    """A replica as one watcher sees it: the source of its watch."""

    replica: Replica
    upstream: Upstream
    """Asks the coordinator in the watcher's name."""

    viewer_id: str
    consistency: Consistency = field(default_factory=Consistency)
    """To be seen by the coordinator first; what the replica holds does not prove it."""

    @property
    def hub(self) -> Hub:
        """Where changes are published."""
        return self.replica.hub

    @property
    def scope(self) -> str:
        """Under which name they are."""
        return self.replica.topic

    @property
    def live(self) -> bool:
        """Whether the replica would hear of a change now."""
        return self.replica.live

    async def catch_up(self, position: Position | None) -> AsyncIterator[Page]:
        """Yield what brings the watcher, whose queue is open, from a position to the present."""
        clock = asyncio.get_running_loop().time
        deadline: float | None = None
        while True:
            ring = await self.replica.until_live()
            joined = ring.position  # what the watcher's queue may lack lies before this
            page = ring.page(position) if position is not None and not self.consistency.at_least_as_fresh else None
            if page is not None:
                yield page
                if not page.more:
                    return
                position = page.position
                continue
            await self.replica.spread()
            async with aclosing(self._from_coordinator(position)) as pages:
                async for page in pages:
                    position = page.position or position
                    yield page
            self.consistency = Consistency()
            assert position is not None
            if self._joins(position, joined):
                return
            deadline = deadline or clock() + READY_SECONDS
            if clock() > deadline:
                raise unreachable()
            await asyncio.sleep(_REJOIN_SECONDS)

    def _joins(self, position: Position, joined: Position) -> bool:
        """Say whether the watcher's queue holds, or will hold, everything behind the position.

        It does not while the replica still follows another life of the coordinator's database, or where the coordinator
        answered from an older state than the replica has seen. A replica that began anew meanwhile had it lag.
        """
        ring = self.replica.ring
        if ring is None or ring.position.epoch != position.epoch:
            return False
        return joined.epoch != position.epoch or position.change_seq >= joined.change_seq

    async def _from_coordinator(self, position: Position | None) -> AsyncGenerator[Page, None]:
        topic = self.replica.topic
        selection = WatchSelection(
            resume_token=resume_token(topic, position) if position is not None else "",
            until_synced=True,
            consistency=self.consistency,
            viewer_id=self.viewer_id,
        )
        turns = (
            nullcontext() if self.consistency.at_least_as_fresh else self.replica.turns
        )  # who waits for a point holds none up
        try:
            async with aclosing(_frames(self.upstream, selection, CATCH_UP_SILENCE_SECONDS, turns)) as frames:
                async for frame in frames:
                    yield Page(
                        parse_resume_token(frame.resume_token, topic).position,
                        frame.changes,
                        reset=frame.reset_reason,
                        snapshot=frame.kind == FRAME_KIND_SNAPSHOT,
                        more=frame.kind != FRAME_KIND_SYNCED,
                    )
                    if frame.kind == FRAME_KIND_SYNCED:
                        return
        except grpc.aio.AioRpcError as error:
            explained = rpc_status.from_call(error)
            if error.code() == grpc.StatusCode.UNAVAILABLE and explained is None:
                raise unreachable() from error
            raise
        except TimeoutError as error:
            raise unreachable() from error
        raise unreachable()  # ended before it was synced


def unreachable() -> Unavailable:
    """Return the error of a watch whose coordinator cannot be reached."""
    return Unavailable(ERROR_REASON_INDEX_UNREACHABLE, "the index does not answer; connect again")


def _alone(change: WatchChange) -> WatchChange:
    """Return a copy: a part of a message keeps the whole of it in memory."""
    copy = WatchChange()
    copy.CopyFrom(change)
    return copy


async def _frames(
    upstream: Upstream,
    selection: WatchSelection,
    silence_seconds: float,
    turns: AbstractAsyncContextManager[object] | None = None,
) -> AsyncGenerator[WatchFrame, None]:
    """Yield the frames of an upstream call, each read in a turn; raise TimeoutError after a silence."""
    call: Any = None
    turns = turns or nullcontext()
    try:
        while True:
            async with asyncio.timeout(silence_seconds), turns:
                call = call or upstream(selection)
                response = await call.read()
            if response is grpc.aio.EOF:
                return
            yield response.frame
    finally:
        if call is not None:
            call.cancel()
