"""Fan-out in one process. API-4."""

import gc

from branchline.v1.common_pb2 import ENTITY_KIND_TASK
from branchline_internal.spine.v1.push_pb2 import WatchChange

from services.runtime.spine.hub import PENDING_BYTES, PENDING_CHANGES, Hub, Watcher


def change(entity: str, seq: int, size: int = 0) -> WatchChange:
    return WatchChange(kind=ENTITY_KIND_TASK, id=entity, change_seq=seq, revision=seq, entity=b"x" * size)


async def test_a_slow_watcher_gets_the_newest_state_of_each_entity_in_order() -> None:
    watcher = Watcher()
    for seq, entity in enumerate(["a", "b", "a", "c", "b"], start=1):
        watcher.offer(change(entity, seq))
    watcher.wake()

    taken = await watcher.take(1)

    assert [(one.id, one.change_seq) for one in taken] == [("a", 3), ("c", 4), ("b", 5)]


async def test_a_watcher_that_outgrows_its_limit_holds_nothing_and_is_told_to_catch_up() -> None:
    watcher = Watcher()
    for seq in range(PENDING_CHANGES + 100):
        watcher.offer(change(f"e{seq}", seq))

    watcher.wake()

    assert watcher.lagging
    assert await watcher.take(1) == []


async def test_a_watcher_is_bounded_in_bytes_too() -> None:
    watcher = Watcher()
    for seq in range(5):
        watcher.offer(change("same", seq, PENDING_BYTES // 2))
    fits = not watcher.lagging
    for seq in range(3):
        watcher.offer(change(f"e{seq}", seq, PENDING_BYTES // 2))

    assert fits
    assert watcher.lagging


async def test_a_watcher_that_starts_over_hears_what_comes_after() -> None:
    watcher = Watcher()
    watcher.lag()
    watcher.offer(change("missed", 1))
    watcher.start_over()
    watcher.offer(change("heard", 2))
    watcher.wake()

    assert [one.id for one in await watcher.take(1)] == ["heard"]


async def test_a_watcher_takes_nothing_before_its_turn_although_it_is_ready() -> None:
    watcher = Watcher()
    watcher.offer(change("a", 1))
    before = await watcher.take(0.01)
    watcher.wake()

    assert before == []
    assert len(await watcher.take(1)) == 1


async def test_a_watcher_that_left_gets_nothing() -> None:
    hub = Hub()
    with hub.watcher("scope") as watcher:
        pass
    hub.publish("scope", [change("a", 1)])

    assert await watcher.take(0.01) == []


async def test_an_entity_that_nobody_waits_for_any_more_is_forgotten() -> None:  # F17, F31: names are the client's
    hub = Hub()
    for number in range(1000):
        hub.awaited(ENTITY_KIND_TASK, f"forged{number}")
    awaited = hub.awaited(ENTITY_KIND_TASK, "a")
    gc.collect()
    remembered = len(hub._waiting)  # pyright: ignore[reportPrivateUsage]
    hub.touch(ENTITY_KIND_TASK, "a")

    assert remembered == 1
    assert awaited.is_set()
