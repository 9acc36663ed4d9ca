"""The sidebar's filters, and that a watch's snapshot is narrowed the way a list is."""

from typing import Any

from branchline.v1 import tasks_pb2
from branchline.v1.common_pb2 import ENTITY_KIND_TASK
from branchline.v1.tasks_pb2 import ListTasksRequest, TaskFilter

from tests.unit.organization.conftest import Calling, Room, summary

CONTEXT: Any = Calling()


async def test_lists_and_snapshots_agree(room: Room) -> None:
    organization = await room.found()
    repository = await room.repository(organization.id)
    states = [tasks_pb2.TASK_STATE_ACTIVE, tasks_pb2.TASK_STATE_ARCHIVED, tasks_pb2.TASK_STATE_FAILED]
    for number, state in enumerate(states):
        await room.push(
            (summary(organization.id, repository.id, number, state=state, owner_user_id=f"u{number}"), False)
        )
    wanted = [
        (TaskFilter(), {0, 2}),
        (TaskFilter(include_ended=True), {0, 1, 2}),
        (TaskFilter(states=[tasks_pb2.TASK_STATE_ARCHIVED]), {1}),
        (TaskFilter(owner_user_ids=["u0", "u1"]), {0}),
        (TaskFilter(repository_ids=["repo_other"]), set[int]()),
        (TaskFilter(query="task 2", has_pull_request=False), {2}),
    ]
    for given, expected in wanted:
        request = ListTasksRequest(organization_id=organization.id, filter=given)
        listed = await room.tasks.ListTasks(request, CONTEXT)
        ids = {f"task_{number:06}" for number in expected}
        assert {task.id for task in listed.tasks} == ids
        assert listed.resume_token
        narrow = {ENTITY_KIND_TASK: room.stores.tasks.narrowed(given)}
        pages = room.stores.index.catch_up(organization.id, [ENTITY_KIND_TASK], None, "u", narrow=narrow)
        assert {change.id async for page in pages for change in page.changes} == ids
