"""Watches through the gateway: real sockets, a real index, upstreams that break. API-4, API-5."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from branchline.v1 import history_pb2, watches_pb2

from gateway import replica as replicas
from gateway import ring as rings
from services.runtime.spine.tokens import Position, resume_token
from tests.support.databases import created
from tests.unit.gateway.backend import (
    ORGANIZATION_ID,
    Backend,
    View,
    as_new_as,
    event_entry,
    eventually,
    follow,
    metadata,
    opened,
    opened_task,
    place_of,
    state_entry,
    task_entry,
    until_synced,
)

RESET, SNAPSHOT, SYNCED = (
    watches_pb2.FRAME_KIND_RESET,
    watches_pb2.FRAME_KIND_SNAPSHOT,
    watches_pb2.FRAME_KIND_SYNCED,
)
CHANGES = watches_pb2.FRAME_KIND_CHANGES


@pytest.fixture
def backend(tmp_path: Path) -> Backend:
    return Backend(tmp_path)


@pytest_asyncio.fixture
async def gateway(backend: Backend) -> AsyncGenerator[None, None]:
    async with backend.gateway():
        yield


async def test_what_changed_while_the_upstream_was_away_is_told_before_any_newer_token(
    backend: Backend, gateway: None
) -> None:  # F2
    view = View()
    async with backend.client() as client:
        async with backend.running():
            await backend.put(*(task_entry(f"t{n}", 1) for n in range(5)))
            following = asyncio.create_task(follow(opened(client), view))
            await eventually(lambda: SYNCED in view.kinds)
        await backend.put_unheard(task_entry("t1", 2), task_entry("t2", 2, deleted=True), task_entry("new", 1))
        async with backend.running():
            await eventually(lambda: view.held == {"t0": 1, "t1": 2, "t3": 1, "t4": 1, "new": 1})
            await backend.put(task_entry("t0", 2))
            await eventually(lambda: view.held["t0"] == 2)
    following.cancel()

    assert view.kinds.count(RESET) == 1
    sequences = [place_of(token).change_seq for token, _ in view.places]
    assert sequences == sorted(sequences)


async def test_a_token_taken_at_any_moment_of_an_outage_leads_to_the_same_view(
    backend: Backend, gateway: None
) -> None:  # F2
    view = View()
    async with backend.client() as client:
        async with backend.running():
            await backend.put(*(task_entry(f"t{n}", 1) for n in range(3)))
            following = asyncio.create_task(follow(opened(client), view))
            await eventually(lambda: SYNCED in view.kinds)
        await backend.put_unheard(*(task_entry(f"t{n}", 2) for n in range(3)))
        async with backend.running():
            await eventually(lambda: set(view.held.values()) == {2})
            for token, held in view.places:
                resumed = await until_synced(opened(client, token), View(dict(held)))
                assert resumed.held == view.held
                assert RESET not in resumed.kinds
    following.cancel()
    assert len(view.places) >= 2


async def test_a_returning_watcher_within_the_ring_costs_the_coordinator_nothing(
    backend: Backend, gateway: None
) -> None:
    async with backend.running(), backend.client() as client:
        first = await until_synced(opened(client))
        staying = View()
        following = asyncio.create_task(follow(opened(client), staying))
        await eventually(lambda: SYNCED in staying.kinds)
        await backend.put(task_entry("a", 1), task_entry("b", 1), task_entry("a", 2))
        await eventually(lambda: staying.held == {"a": 2, "b": 1})
        before = len(backend.selections)

        resumed = await until_synced(opened(client, first.token))
        following.cancel()

    assert resumed.held == {"a": 2, "b": 1}
    assert resumed.kinds == [CHANGES, SYNCED]
    assert len(backend.selections) == before


async def test_a_returning_watcher_behind_the_ring_is_caught_up_by_the_coordinator(
    backend: Backend, gateway: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas.Replica.__init__, "__defaults__", _with_ring_of(4))
    async with backend.running(), backend.client() as client:
        first = await until_synced(opened(client))
        staying = View()
        following = asyncio.create_task(follow(opened(client), staying))
        await eventually(lambda: SYNCED in staying.kinds)
        for n in range(20):
            await backend.put(task_entry(f"t{n}", 1))
        await eventually(lambda: len(staying.held) == 20)
        before = len(backend.selections)

        resumed = await until_synced(opened(client, first.token))
        following.cancel()

    assert resumed.held == staying.held
    assert RESET not in resumed.kinds
    (own,) = backend.selections[before:]
    assert (own.viewer_id, own.until_synced, own.tail) == ("usr_1", True, False)


def _with_ring_of(most: int) -> tuple[object, ...]:
    def small(position: Position) -> rings.Ring:
        return rings.Ring(position, most)

    defaults = replicas.Replica.__init__.__defaults__ or ()
    return tuple(small if default is rings.Ring else default for default in defaults)


async def test_a_database_in_another_life_resets_every_watcher(backend: Backend, gateway: None) -> None:
    view = View()
    async with backend.client() as client:
        async with backend.running():
            await backend.put(*(task_entry(f"old{n}", 1) for n in range(9)))
            following = asyncio.create_task(follow(opened(client), view))
            await eventually(lambda: len(view.held) == 9 and SYNCED in view.kinds)
        backend.url = created(metadata, backend.folder / "another.sqlite")
        await backend.put_unheard(task_entry("new", 1))
        async with backend.running():
            await eventually(lambda: view.held == {"new": 1})
            await backend.put(task_entry("newer", 1))
            await eventually(lambda: view.held == {"new": 1, "newer": 1})
    following.cancel()

    assert view.kinds.count(RESET) == 2


async def test_a_token_ahead_of_the_replica_is_the_coordinators_to_judge(backend: Backend, gateway: None) -> None:
    async with backend.running(), backend.client() as client:
        await backend.put(task_entry("a", 1))
        first = await until_synced(opened(client))
        place = place_of(first.token)
        beyond = resume_token(place.topic, Position(place.epoch, place.change_seq + 1000), place.selection)

        ahead = await until_synced(opened(client, beyond))

    assert ahead.kinds[0] == RESET
    assert ahead.resets == [watches_pb2.RESET_REASON_INDEX_REBUILT]
    assert ahead.held == {"a": 1}


async def test_a_consistency_token_is_seen_by_the_coordinator_even_within_the_ring(
    backend: Backend, gateway: None
) -> None:
    async with backend.running(), backend.client() as client:
        first = await until_synced(opened(client))
        waiting = asyncio.create_task(until_synced(opened(client, first.token, consistency=as_new_as("a", 2))))
        await backend.put(task_entry("a", 1))
        done, _ = await asyncio.wait({waiting}, timeout=0.3)
        await backend.put(task_entry("a", 2))
        view = await waiting

    assert not done
    assert view.held == {"a": 2}


async def test_watchers_of_an_index_that_never_answers_are_told_so(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "READY_SECONDS", 0.5)
    backend.answering.clear()
    async with backend.running(), backend.gateway(), backend.client() as client:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await until_synced(opened(client))

    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "the index does not answer" in (refused.value.details() or "")


async def test_a_watch_of_what_the_coordinator_refuses_ends_with_its_words(backend: Backend, gateway: None) -> None:
    async with backend.running(), backend.client() as client:
        backend.placed.add("task_2")
        call = opened_task(client, task_id="task_2")
        await until_synced(call)
        call.cancel()
        backend.placed.remove("task_1")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await until_synced(opened_task(client))

    assert refused.value.code() == grpc.StatusCode.NOT_FOUND


async def test_a_user_sees_no_others_own_state_and_positions_pass_it(backend: Backend, gateway: None) -> None:
    backend.add_caller("other", "usr_2")
    view, others = View(), View()
    async with backend.running(), backend.client() as client, backend.client("other") as other:
        await backend.put(state_entry("s1", 1, "usr_2"))
        following = asyncio.create_task(follow(opened(client), view))
        following_too = asyncio.create_task(follow(opened(other), others))
        await eventually(lambda: SYNCED in view.kinds and SYNCED in others.kinds)
        await backend.put(state_entry("s2", 1, "usr_1"), state_entry("s3", 1, "usr_2"), task_entry("a", 1))
        await eventually(lambda: "a" in view.held and "a" in others.held)
        following.cancel()
        following_too.cancel()

    assert view.held == {"s2": 1, "a": 1}
    assert others.held == {"s1": 1, "s3": 1, "a": 1}


async def test_a_resume_token_is_good_for_the_same_watch_of_the_same_person_alone(
    backend: Backend, gateway: None
) -> None:
    backend.add_caller("other", "usr_2")
    async with backend.running(), backend.client() as client, backend.client("other") as other:
        token = (await until_synced(opened(client))).token
        of_task = opened_task(client, token)
        codes: list[grpc.StatusCode] = []
        for call in (opened(other, token), of_task):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await until_synced(call)
            codes.append(refused.value.code())

    assert codes == [grpc.StatusCode.INVALID_ARGUMENT] * 2


async def test_many_watchers_share_one_upstream(backend: Backend, gateway: None) -> None:
    views = [View() for _ in range(20)]
    async with backend.running(), backend.client() as client:
        await backend.put(task_entry("a", 1))
        following = [asyncio.create_task(follow(opened(client), view)) for view in views]
        await eventually(lambda: all(SYNCED in view.kinds for view in views))
        before = len(backend.selections)
        for revision in range(2, 50):
            await backend.put(task_entry("a", revision), task_entry(f"t{revision}", 1))
        await eventually(lambda: all(view.held.get("t49") for view in views))
        for task in following:
            task.cancel()

    assert [view.held for view in views] == [views[0].held] * 20
    assert len([one for one in backend.selections if one.tail]) == 1
    assert len(backend.selections) == before


async def test_a_filtered_feed_shows_its_part_and_with_its_token_another_part_begins_anew(
    backend: Backend, gateway: None
) -> None:
    def feed(*task_ids: str, token: str = "") -> history_pb2.WatchHistoryRequest:
        chosen = history_pb2.HistoryFilter(task_ids=task_ids)
        return history_pb2.WatchHistoryRequest(organization_id=ORGANIZATION_ID, filter=chosen, resume_token=token)

    async with backend.running(), backend.client() as client:
        await backend.put(event_entry("a", 1, "task_1"), event_entry("b", 2))
        part = await until_synced(client.history.WatchHistory(feed("task_1")))
        await backend.put(event_entry("c", 3), event_entry("d", 4, "task_1"))
        again = await until_synced(client.history.WatchHistory(feed("task_1", token=part.token)))
        whole = await until_synced(client.history.WatchHistory(feed(token=part.token)))

    assert part.held == {"a": 1}
    assert again.held == {"d": 4}
    assert again.resets == []
    assert whole.resets == [watches_pb2.RESET_REASON_REQUEST_CHANGED]
    assert whole.held == {"a": 1, "b": 2, "c": 3, "d": 4}
