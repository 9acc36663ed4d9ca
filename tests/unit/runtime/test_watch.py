"""The one watch over a source: heartbeats and checks by the clock, frames cut by bytes. API-4."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field

import pytest
from branchline.v1 import watches_pb2
from branchline.v1.common_pb2 import ENTITY_KIND_TASK
from branchline.v1.errors_pb2 import ERROR_REASON_TOKEN_INVALID
from branchline_internal.spine.v1.push_pb2 import WatchChange, WatchFrame

from services.runtime.errors import Unauthenticated
from services.runtime.spine.chunks import PART_BYTES
from services.runtime.spine.hub import Hub
from services.runtime.spine.tokens import Position, parse_resume_token
from services.runtime.spine.watch import Page, Watch, watch

HEARTBEAT, CHANGES, SYNCED = (
    watches_pb2.FRAME_KIND_HEARTBEAT,
    watches_pb2.FRAME_KIND_CHANGES,
    watches_pb2.FRAME_KIND_SYNCED,
)
TOPIC = "topic"


@dataclass
class Source:
    """A source that is at its present, and says what is published."""

    hub: Hub = field(default_factory=Hub)
    scope: str = "scope"
    live: bool = True
    seq: int = 0
    caught_up: int = 0

    async def catch_up(self, position: Position | None) -> AsyncIterator[Page]:
        self.caught_up += 1
        yield Page(Position("epoch", self.seq))

    def publish(self, name: str, size: int = 10) -> None:
        self.seq += 1
        change = WatchChange(kind=ENTITY_KIND_TASK, id=name, change_seq=self.seq, entity=b"x" * size)
        self.hub.publish(self.scope, [change])


class Blind:
    """Sees nothing."""

    def start_over(self) -> None:
        pass

    def see(self, change: WatchChange) -> WatchChange | None:
        return None


async def busy(source: Source, name: str, every_seconds: float = 0.01) -> None:
    while True:
        source.publish(name)
        await asyncio.sleep(every_seconds)


async def first(source: Source, wanted: Watch, kind: int, seconds: float = 5.0) -> WatchFrame:
    """Return the first frame of a kind."""
    async with asyncio.timeout(seconds), aclosing(watch(source, wanted)) as frames:
        async for frame in frames:
            if frame.kind == kind:
                return frame
    raise AssertionError("a watch does not end")


async def test_a_watch_that_may_see_nothing_of_a_busy_scope_gets_heartbeats_with_its_place() -> None:  # F7
    source = Source()
    writing = asyncio.create_task(busy(source, "hidden"))
    heartbeat = await first(source, Watch(TOPIC, sight=Blind(), heartbeat_seconds=0.2), HEARTBEAT)
    writing.cancel()

    place = parse_resume_token(heartbeat.resume_token, TOPIC).position
    assert place is not None
    assert place.change_seq > 5


async def test_an_idle_watch_gets_heartbeats_and_one_whose_source_is_cut_off_does_not() -> None:
    source = Source()
    assert await first(source, Watch(TOPIC, heartbeat_seconds=0.05), HEARTBEAT)

    source.live = False
    with pytest.raises(TimeoutError):
        await first(source, Watch(TOPIC, heartbeat_seconds=0.05), HEARTBEAT, seconds=0.4)


@pytest.mark.parametrize("writes", [True, False])
async def test_who_may_no_longer_watch_is_told_by_the_clock_busy_or_not(writes: bool) -> None:  # F6
    source, checks = Source(), 0

    async def check() -> None:
        nonlocal checks
        checks += 1
        if checks == 3:
            raise Unauthenticated(ERROR_REASON_TOKEN_INVALID, "revoked")

    writing = asyncio.create_task(busy(source, "a")) if writes else None
    started = asyncio.get_running_loop().time()
    with pytest.raises(Unauthenticated):
        await first(source, Watch(TOPIC, check=check, check_seconds=0.1), HEARTBEAT)
    elapsed = asyncio.get_running_loop().time() - started
    if writing is not None:
        writing.cancel()

    assert 0.3 <= elapsed < 3


async def test_frames_end_at_a_mebibyte_and_at_two_hundred_changes() -> None:  # F22
    source = Source()
    sizes: list[int] = []
    counts: list[int] = []
    async with aclosing(watch(source, Watch(TOPIC))) as frames:
        await anext(frames)
        for number in range(12):
            source.publish(f"large{number}", 300_000)
        for number in range(450):
            source.publish(f"small{number}", 10)
        while sum(counts) < 462:
            frame = await anext(frames)
            assert frame.kind == CHANGES
            sizes.append(frame.ByteSize())
            counts.append(len(frame.changes))

    assert max(sizes) <= PART_BYTES
    assert max(counts) == 200
    assert source.caught_up == 1


async def test_a_watcher_that_reads_too_slowly_catches_up_and_is_synced_again() -> None:
    source = Source()
    async with aclosing(watch(source, Watch(TOPIC))) as frames:
        await anext(frames)
        source.publish("a")
        await anext(frames)
        for number in range(2000):
            source.publish(f"e{number}")
        again = await anext(frames)

    assert (again.kind, again.change_seq) == (SYNCED, 2001)


async def test_what_changes_while_a_watcher_pauses_comes_with_its_next_frame_once() -> None:
    source = Source()
    wanted = Watch(TOPIC, position=Position("epoch", 0), pause_seconds=lambda: 0.5)
    async with asyncio.timeout(5), aclosing(watch(source, wanted)) as frames:
        assert (await anext(frames)).kind == SYNCED
        source.publish("first")
        assert [change.id for change in (await anext(frames)).changes] == ["first"]
        following = asyncio.create_task(anext(frames))
        for _ in range(20):
            source.publish("busy")
            await asyncio.sleep(0.01)
        source.publish("other")
        frame = await following

    assert [(change.id, change.change_seq) for change in frame.changes] == [("busy", 21), ("other", 22)]
