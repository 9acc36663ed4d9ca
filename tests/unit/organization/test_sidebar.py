"""The sidebar: pages in every order from an index, ended tasks aside, a batch in a handful of statements."""

from typing import Any

import pytest
from branchline.v1 import tasks_pb2
from branchline.v1.common_pb2 import ENTITY_KIND_TASK
from branchline.v1.tasks_pb2 import TaskFilter, TaskState

from services.organization.tables import WATCHED
from services.organization.tasks import BY_CREATE_TIME, BY_TITLE, BY_UPDATE_TIME, Chosen, Order, Shape, page_statement
from services.runtime.errors import InvalidArgument
from tests.unit.organization.conftest import Calling, Room, call_as, summary

CONTEXT: Any = Calling()
ORDERS = [BY_UPDATE_TIME, BY_CREATE_TIME, BY_TITLE]
ACTIVE, ARCHIVED, KILLED = tasks_pb2.TASK_STATE_ACTIVE, tasks_pb2.TASK_STATE_ARCHIVED, tasks_pb2.TASK_STATE_KILLED


async def fill(room: Room, count: int, *, state: TaskState.ValueType = ACTIVE, first: int = 0) -> None:
    for start in range(first, first + count, 1000):
        tasks = [
            summary("org_1", f"repo_{number % 7}", number, title=f"T{number * 7919 % 1000:04}", state=state)
            for number in range(start, min(start + 1000, first + count))
        ]
        refused = await room.push(*((task, False) for task in tasks))
        assert not refused


async def listed(room: Room, order_by: str = "", page_size: int = 0, **wanted: Any) -> list[str]:
    """Return the ids of all pages."""
    call_as("usr_1", "org_1")
    found: list[str] = []
    token = ""
    while True:
        request = tasks_pb2.ListTasksRequest(
            organization_id="org_1",
            page_token=token,
            order_by=order_by,
            page_size=page_size,
            filter=TaskFilter(**wanted),
        )
        answer = await room.tasks.ListTasks(request, CONTEXT)
        found += [task.id for task in answer.tasks]
        token = answer.next_page_token
        if not token:
            return found


@pytest.mark.parametrize("order_by", ["update_time desc", "create_time desc", "title"])
async def test_pages_of_every_order_hold_each_task_once(room: Room, order_by: str) -> None:
    await fill(room, 120)
    await fill(room, 30, state=KILLED, first=1000)

    pages = await listed(room, order_by=order_by, page_size=17)

    assert sorted(pages) == [f"task_{number:06}" for number in range(120)]
    assert pages == await listed(room, order_by=order_by, page_size=1000)


@pytest.mark.parametrize("order_by", ["update_time desc", "create_time desc", "title"])
async def test_tasks_that_ended_are_merged_with_the_others_when_asked_for(room: Room, order_by: str) -> None:
    await fill(room, 40)
    await fill(room, 20, state=ARCHIVED, first=40)

    both = await listed(room, order_by=order_by, states=[ACTIVE, ARCHIVED], page_size=7)

    assert sorted(both) == [f"task_{number:06}" for number in range(60)]
    assert both == await listed(room, order_by=order_by, states=[ACTIVE, ARCHIVED], page_size=1000)
    assert len(await listed(room, states=[ARCHIVED])) == 20


async def test_filters_are_combined(room: Room) -> None:  # ORG-6
    await fill(room, 20)
    pulled = summary("org_1", "repo_1", 100, title="100% done", owner_user_id="usr_2")
    pulled.pull_request.number = 7
    await room.push((pulled, False))

    assert await listed(room, repository_ids=["repo_1"], has_pull_request=True) == [pulled.id]
    assert len(await listed(room, repository_ids=["repo_1", "repo_2"], has_pull_request=False)) == 6
    assert await listed(room, owner_user_ids=["usr_2"], query="100%") == [pulled.id]
    assert await listed(room, query="1%d") == []
    assert pulled.id not in await listed(room, has_pull_request=False)


async def test_a_page_token_is_good_for_the_same_list_alone(room: Room) -> None:
    await fill(room, 10)
    call_as("usr_1", "org_1")
    first = await room.tasks.ListTasks(
        tasks_pb2.ListTasksRequest(organization_id="org_1", page_size=3),
        CONTEXT,
    )

    others: list[dict[str, Any]] = [
        {"organization_id": "org_2"},
        {"organization_id": "org_1", "order_by": "title"},
        {"organization_id": "org_1", "filter": tasks_pb2.TaskFilter(query="task")},
    ]
    for other in others:
        request = tasks_pb2.ListTasksRequest(page_size=3, page_token=first.next_page_token, **other)
        with pytest.raises(InvalidArgument, match="another request"):
            await room.tasks.ListTasks(request, CONTEXT)


async def test_a_page_ends_at_a_mebibyte(room: Room) -> None:  # F22
    tasks = [summary("org_1", "repo_1", number, branch="x" * 200_000) for number in range(12)]
    await room.push(*((task, False) for task in tasks))
    call_as("usr_1", "org_1")

    answer = await room.tasks.ListTasks(tasks_pb2.ListTasksRequest(organization_id="org_1"), CONTEXT)

    assert answer.ByteSize() < 1024 * 1024 + 4096
    assert len(await listed(room)) == 12


def page_plan(room: Room, order: Order, *, after: bool, repository: bool) -> str:
    statement = page_statement(Shape(order, Chosen(repository=repository), after=after))
    return room.plan(statement, of="o", ended=False, after_value=1.0, after_id="x", most=51, repository="r")


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.column)
@pytest.mark.parametrize("after", [False, True])
async def test_every_order_is_read_from_its_index(room: Room, order: Order, after: bool) -> None:
    """Nothing is sorted and nothing is passed over, so a page costs the same however many tasks there are."""
    found = page_plan(room, order, after=after, repository=False)

    assert f"USING INDEX task_summaries_{order.column} (scope=? AND ended=?" in found
    assert "TEMP B-TREE" not in found


async def test_the_tasks_of_a_repository_are_read_from_their_index(room: Room) -> None:
    found = page_plan(room, BY_UPDATE_TIME, after=True, repository=True)

    assert "USING INDEX task_summaries_repository (scope=? AND repository_id=? AND ended=?" in found
    assert "TEMP B-TREE" not in found


async def test_a_snapshot_passes_over_no_task_that_ended(room: Room) -> None:  # F27
    spec = next(table for table in WATCHED if table.kind == ENTITY_KIND_TASK)
    found = room.plan(spec.snapshot, of="o", after=0, upto=9, viewer="*", most=5)

    assert "USING INDEX task_summaries_shown" in found
    await fill(room, 5)
    await fill(room, 3, state=KILLED, first=10)
    pages = [page async for page in room.stores.index.catch_up("org_1", [ENTITY_KIND_TASK], None, "*")]
    assert sum(len(page.changes) for page in pages) == 5


async def test_a_batch_of_summaries_is_a_handful_of_statements(room: Room) -> None:
    await fill(room, 1)
    before = room.database.statements
    await fill(room, 10, first=100)
    of_ten = room.database.statements - before
    before = room.database.statements
    await fill(room, 500, first=1000)

    assert room.database.statements - before == of_ten <= 5


async def test_a_task_that_is_gone_leaves_with_its_route(room: Room) -> None:
    await fill(room, 2)

    await room.push((summary("org_1", "repo_0", 0, revision=2), True))

    assert await listed(room) == ["task_000001"]
    assert await room.database.read(room.stores.tasks.route, "task_000000") is None
    assert await room.database.read(room.stores.tasks.route, "task_000001") == ("org_1", "repo_1")


async def test_a_time_beyond_all_years_stops_nothing(room: Room) -> None:  # F9
    poison = summary("org_1", "repo_1", 1)
    poison.update_time.seconds = 2**63 - 1
    poison.create_time.seconds = -(2**63)

    assert await room.push((poison, False), (summary("org_1", "repo_1", 2), False)) == {}
    assert len(await listed(room)) == 2
