"""What a watcher with a filter sees of tasks that come to match it and leave it. API-4."""

from typing import Any

import pytest
from branchline.v1.history_pb2 import HistoryFilter, WatchHistoryResponse
from branchline.v1.organizations_pb2 import WatchOrganizationResponse
from branchline.v1.tasks_pb2 import TaskFilter, TaskSummary, WatchTaskResponse
from branchline.v1.watches_pb2 import CHANGE_TYPE_DELETED, CHANGE_TYPE_REMOVED, CHANGE_TYPE_UPSERTED, ChangeType
from branchline_internal.spine.v1.push_pb2 import WatchChange, WatchFrame

from gateway.frames import FrameWriter
from gateway.selection import HistoryView, OrganizationView, TaskView, event_matcher, task_matcher
from services.runtime.spine.hub import Kind
from tests.unit.gateway.backend import ENTRY, EVENT, STATE, TASK

UPSERTED, REMOVED, DELETED = CHANGE_TYPE_UPSERTED, CHANGE_TYPE_REMOVED, CHANGE_TYPE_DELETED


def seen(
    titles: str, *, resumed: bool, last: ChangeType.ValueType = CHANGE_TYPE_UPSERTED
) -> list[ChangeType.ValueType | None]:
    """Return what is seen of a task that has these titles, a letter each, where those that are "y" are watched."""
    view = OrganizationView("usr_1", (), task_matcher(TaskFilter(query="y")), resumed)
    changes: list[WatchChange | None] = []
    for revision, title in enumerate(titles, 1):
        task = TaskSummary(id="task_1", title=title, revision=revision)
        kind = last if revision == len(titles) else UPSERTED
        change = WatchChange(
            kind=TASK, id=f"{titles}{resumed}", revision=revision, type=kind, entity=task.SerializeToString()
        )
        changes.append(view.see(change))
    return [change.type if change is not None else None for change in changes]


@pytest.mark.parametrize(
    ("titles", "resumed", "fresh"),
    [
        ("nnn", [REMOVED, None, None], [None, None, None]),
        ("nynn", [REMOVED, UPSERTED, REMOVED, None], [None, UPSERTED, REMOVED, None]),
        ("yny", [UPSERTED, REMOVED, UPSERTED], [UPSERTED, REMOVED, UPSERTED]),
    ],
)
def test_a_task_that_does_not_match_is_removed_once_and_only_where_it_may_be_shown(
    titles: str, resumed: list[int | None], fresh: list[int | None]
) -> None:
    assert seen(titles, resumed=True) == resumed
    assert seen(titles, resumed=False) == fresh


def test_the_deletion_of_a_task_is_told_where_it_may_be_shown() -> None:
    assert seen("n", resumed=True, last=DELETED) == [DELETED]
    assert seen("yn", resumed=False, last=DELETED) == [UPSERTED, DELETED]
    assert seen("nn", resumed=True, last=DELETED) == [REMOVED, None]


NO_MESSAGE = b"\xff\xff\xff"
ORGANIZATION = OrganizationView("usr_1", (), task_matcher(TaskFilter()), resumed=False)


@pytest.mark.parametrize(
    ("response", "view", "kind"),
    [
        (WatchOrganizationResponse, ORGANIZATION, TASK),
        (WatchOrganizationResponse, ORGANIZATION, STATE),
        (WatchTaskResponse, TaskView(()), ENTRY),
        (WatchTaskResponse, TaskView(("ses_1",)), ENTRY),
        (WatchHistoryResponse, HistoryView(event_matcher(HistoryFilter())), EVENT),
        (WatchHistoryResponse, HistoryView(event_matcher(HistoryFilter(task_ids=["task_1"]))), EVENT),
    ],
)
def test_what_a_coordinator_has_serialized_goes_out_unread(response: Any, view: Any, kind: Kind) -> None:
    change = WatchChange(
        kind=kind, id="one", revision=1, type=UPSERTED, task_id="task_1", session_id="ses_1", entity=NO_MESSAGE
    )

    seen = view.see(change)

    assert NO_MESSAGE in FrameWriter(response.DESCRIPTOR).write(WatchFrame(changes=[seen]), 10.0)
