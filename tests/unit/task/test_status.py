"""The status machine. TSK-1."""

import pytest
from branchline.v1.tasks_pb2 import TaskStatus

from services.runtime.errors import FailedPrecondition
from services.runtime.statuses import ENDING
from services.task.status import TRANSITIONS, Status, check_transition, status_name

STATUSES = [status for status in TaskStatus.values() if status]


def test_every_status_has_its_transitions() -> None:
    assert set(TRANSITIONS) == set(STATUSES)


@pytest.mark.parametrize("old", STATUSES)
@pytest.mark.parametrize("new", STATUSES)
def test_a_change_is_allowed_or_refused_with_both_names(old: Status, new: Status) -> None:
    if new in TRANSITIONS[old]:
        check_transition(old, new)
        return
    with pytest.raises(FailedPrecondition, match=f"{status_name(old)} cannot become {status_name(new)}"):
        check_transition(old, new)


@pytest.mark.parametrize("status", [status for status in STATUSES if status not in ENDING])
def test_there_is_a_way_out_of_every_status(status: Status) -> None:
    assert TRANSITIONS[status] & ENDING
