"""Fan-out in one process. API-4."""

from branchline.resource.v1.watch_pb2 import WatchChange

from services.runtime.spine.hub import Hub, Watcher


def change(entity: str, seq: int) -> WatchChange:
    return WatchChange(kind="task", id=entity, change_seq=seq, revision=seq)


async def test_a_slow_watcher_gets_the_newest_state_of_each_entity_in_order() -> None:
    watcher = Watcher()
    for seq, entity in enumerate(["a", "b", "a", "c", "b"], start=1):
        watcher.offer(change(entity, seq))

    taken = await watcher.take(1)

    assert [(one.id, one.change_seq) for one in taken] == [("a", 3), ("c", 4), ("b", 5)]


async def test_a_watcher_that_outgrows_its_limit_holds_nothing_and_is_told_to_catch_up() -> None:
    watcher = Watcher(limit=10)
    for seq in range(1, 1000):
        watcher.offer(change(f"e{seq}", seq))

    assert watcher.lagging
    assert await watcher.take(1) == []


def test_a_watcher_that_left_gets_nothing() -> None:
    hub = Hub()
    with hub.watcher("scope") as watcher:
        pass
    hub.publish("scope", [change("a", 1)])

    assert watcher.drain() == []
