"""The state machine. TSK-1."""

import pytest
from branchline.v1.tasks_pb2 import TaskActivity, TaskState

from services.runtime.errors import FailedPrecondition
from services.task.standing import (
    ARCHIVED,
    ARCHIVING,
    FAILED,
    KILLED,
    KILLING,
    TRANSITIONS,
    TURN_FAILED,
    Standing,
    check_transition,
    refused,
)

STANDINGS = sorted(TRANSITIONS)
ENDING = {ARCHIVING, ARCHIVED, KILLING, KILLED}


def name_of(standing: Standing) -> str:
    return standing.name


def test_every_state_and_activity_has_its_transitions() -> None:
    assert {one.state for one in STANDINGS} == set(TaskState.values()) - {0}
    assert {one.activity for one in STANDINGS} == set(TaskActivity.values())


def test_every_standing_has_a_name_of_its_own() -> None:
    assert len({one.name for one in STANDINGS}) == len(STANDINGS)
    assert (FAILED.name, TURN_FAILED.name) == ("failed", "turn_failed")


@pytest.mark.parametrize("old", STANDINGS, ids=name_of)
@pytest.mark.parametrize("new", STANDINGS, ids=name_of)
def test_a_change_is_allowed_or_refused_with_both_names(old: Standing, new: Standing) -> None:
    if new in TRANSITIONS[old]:
        check_transition(old, new)
        return
    with pytest.raises(FailedPrecondition, match=f"{old.name} cannot become {new.name}"):
        check_transition(old, new)


@pytest.mark.parametrize("standing", [one for one in STANDINGS if one not in ENDING], ids=name_of)
def test_there_is_a_way_out_of_every_standing(standing: Standing) -> None:
    assert TRANSITIONS[standing] & ENDING


def test_a_refusal_says_where_it_stands_and_what_would_do() -> None:
    error = refused(TURN_FAILED, "no", FAILED)

    assert error.reason == "STATE_FORBIDS"
    assert error.metadata == {"state": "turn_failed", "allowed_states": "failed"}
