"""The catalogue and the feed in pages: from an index, bounded in bytes."""

from typing import Any

import pytest
from branchline.v1 import history_pb2, repositories_pb2
from branchline.v1.history_pb2 import EVENT_KIND_AGENT_FINISHED, EVENT_KIND_TASK_CREATED, HistoryEvent, HistoryFilter
from google.protobuf.timestamp_pb2 import Timestamp

from services.organization.repositories import FIRST_PAGE, NEXT_PAGE
from services.runtime.errors import InvalidArgument
from tests.unit.organization.conftest import Room

CONTEXT: Any = None


async def feed(room: Room, count: int, **fields: Any) -> str:
    organization = await room.found()
    events = [
        HistoryEvent(
            id=f"evt_{number:04}",
            organization_id=organization.id,
            sequence=number,
            task_id=f"task_{number % 3}",
            kind=EVENT_KIND_TASK_CREATED if number % 2 else EVENT_KIND_AGENT_FINISHED,
            event_time=Timestamp(seconds=1_700_000_000 + number),
            **fields,
        )
        for number in range(1, count + 1)
    ]
    assert not await room.push(*((event, False) for event in events))
    return organization.id


async def sequences(
    room: Room, organization_id: str, *, page_size: int = 0, order_by: str = "", **fields: Any
) -> list[int]:
    found: list[int] = []
    token = ""
    while True:
        request = history_pb2.ListHistoryEventsRequest(
            organization_id=organization_id,
            page_token=token,
            page_size=page_size,
            order_by=order_by,
            filter=HistoryFilter(**fields),
        )
        answer = await room.history.ListHistoryEvents(request, CONTEXT)
        found += [event.sequence for event in answer.events]
        token = answer.next_page_token
        if not token:
            return found


@pytest.mark.parametrize("order_by", ["sequence", "sequence desc", ""])
async def test_the_feed_is_paged_both_ways(room: Room, order_by: str) -> None:  # HIS-3
    organization_id = await feed(room, 25)

    found = await sequences(room, organization_id, page_size=7, order_by=order_by)

    assert found == sorted(range(1, 26), reverse=order_by != "sequence")


async def test_the_feed_is_filtered(room: Room) -> None:  # HIS-3
    organization_id = await feed(room, 12)
    since, before = Timestamp(seconds=1_700_000_004), Timestamp(seconds=1_700_000_008)

    assert await sequences(room, organization_id, task_ids=["task_1"], page_size=2) == [10, 7, 4, 1]
    assert await sequences(room, organization_id, start_time=since, end_time=before) == [7, 6, 5, 4]
    assert await sequences(room, organization_id, kinds=[EVENT_KIND_AGENT_FINISHED]) == [12, 10, 8, 6, 4, 2]
    assert await sequences(room, organization_id, kinds=[EVENT_KIND_TASK_CREATED], task_ids=["task_0"]) == [9, 3]
    assert await sequences(room, organization_id, task_ids=["task_1", "task_2"], kinds=[EVENT_KIND_TASK_CREATED]) == [
        11,
        7,
        5,
        1,
    ]
    with pytest.raises(InvalidArgument, match="order_by"):
        await sequences(room, organization_id, order_by="nonsense")


async def test_a_page_of_the_feed_ends_at_a_mebibyte(room: Room) -> None:  # F22
    organization_id = await feed(room, 8, summary="x" * 300_000)

    answer = await room.history.ListHistoryEvents(
        history_pb2.ListHistoryEventsRequest(organization_id=organization_id), CONTEXT
    )

    assert len(answer.events) == 3
    assert await sequences(room, organization_id) == list(range(8, 0, -1))


async def test_the_catalogue_is_paged_by_name(room: Room) -> None:  # ORG-4
    organization = await room.found()
    for name in ("c", "a", "b", "e", "d"):
        await room.repository(organization.id, f"acme/{name}")
    found: list[str] = []
    token = ""

    while True:
        request = repositories_pb2.ListRepositoriesRequest(
            organization_id=organization.id, page_size=2, page_token=token
        )
        answer = await room.repositories.ListRepositories(request, CONTEXT)
        found += [repository.display_name[-1] for repository in answer.repositories]
        token = answer.next_page_token
        if not token:
            break

    assert found == ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize("statement", [FIRST_PAGE, NEXT_PAGE])
async def test_the_catalogue_is_read_from_its_index(room: Room, statement: Any) -> None:
    found = room.plan(statement, of="o", most=9, after_name="a", after_id="b")

    assert "USING INDEX repositories_name" in found
    assert "TEMP B-TREE" not in found
