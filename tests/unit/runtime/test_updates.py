"""Masks and etags of updates: one way for all of them."""

import pytest
from branchline.v1.common_pb2 import Prompt
from branchline.v1.errors_pb2 import ERROR_REASON_ETAG_MISMATCH
from branchline.v1.organizations_pb2 import Organization, OrganizationSettings
from branchline.v1.sessions_pb2 import QueuedMessage
from branchline.v1.tasks_pb2 import TASK_STATE_ACTIVE, TASK_STATE_FAILED, Task
from google.protobuf.field_mask_pb2 import FieldMask
from hypothesis import given
from hypothesis import strategies as st

from services.runtime.errors import Aborted, InvalidArgument, error_reason
from services.runtime.updates import check_etag, etag_of, update

SETTABLE = ("display_name", "settings")
WORDS = st.text(max_size=5)


def organization(name: str, agent: str = "", model: str = "") -> Organization:
    settings = OrganizationSettings(default_agent=agent, default_model=model)
    return Organization(id="org_1", display_name=name, settings=settings)


def test_an_etag_changes_with_what_people_set_and_not_with_what_agents_move() -> None:
    task = Task(id="task_1", title="a", state=TASK_STATE_ACTIVE, revision=1)
    tag = etag_of(task, ["title"])
    task.state, task.revision, task.branch = TASK_STATE_FAILED, 9, "b"
    moved = etag_of(task, ["title"])
    task.title = "b"

    assert tag == moved
    assert etag_of(task, ["title"]) != tag
    assert len(tag) == 16


def test_an_etag_is_asked_for_only_where_it_is_given() -> None:
    held = Task(title="a", etag="1")
    check_etag(held, Task())
    check_etag(held, Task(etag="1"))

    with pytest.raises(Aborted) as refused:
        check_etag(held, Task(etag="0"))
    assert error_reason(refused.value) == ERROR_REASON_ETAG_MISMATCH
    assert refused.value.metadata == {"etag": "1"}


def test_without_a_mask_what_is_set_is_taken_over_and_nothing_is_cleared() -> None:
    held = organization("old", "agent", "model")
    changed = update(held, Organization(display_name="new"), FieldMask(), SETTABLE, "organization")

    assert changed == ["display_name"]
    assert held == organization("new", "agent", "model")


def test_a_mask_clears_what_it_names_and_leaves_what_it_does_not() -> None:
    held = organization("old", "agent", "model")
    mask = FieldMask(paths=["settings.default_agent"])
    changed = update(held, organization("new", "", "other"), mask, SETTABLE, "organization")

    assert changed == ["settings.default_agent"]
    assert held == organization("old", "", "model")


def test_what_is_the_same_is_no_change() -> None:
    held = organization("same", "agent")

    assert update(held, organization("same", "agent"), FieldMask(), SETTABLE, "organization") == []


@pytest.mark.parametrize(
    "path", ["id", "state", "nothing", "settings.nothing", "display_name.x", "", "*", "settings.default_agent.x"]
)
def test_a_path_that_cannot_be_changed_is_refused_by_name_and_nothing_is_changed(path: str) -> None:
    held = organization("old")
    with pytest.raises(InvalidArgument) as refused:
        update(held, organization("new"), FieldMask(paths=["display_name", path]), SETTABLE, "organization")

    assert refused.value.violations[0][0] == "update_mask"
    assert held == organization("old")


def test_an_update_that_says_nothing_is_refused() -> None:
    with pytest.raises(InvalidArgument) as refused:
        update(organization("old"), Organization(id="org_1"), FieldMask(), SETTABLE, "organization")

    assert refused.value.violations[0][0] == "organization"


def test_a_message_is_taken_over_whole_and_cleared_by_a_mask() -> None:
    held = QueuedMessage(prompt=Prompt(text="old"), place=2)
    update(held, QueuedMessage(prompt=Prompt(text="new")), FieldMask(), ["prompt", "place"], "queued_message")
    assert held == QueuedMessage(prompt=Prompt(text="new"), place=2)

    mask = FieldMask(paths=["prompt"])
    assert update(held, QueuedMessage(), mask, ["prompt", "place"], "queued_message") == ["prompt"]
    assert not held.HasField("prompt")


@given(WORDS, WORDS, WORDS, WORDS, st.sets(st.sampled_from(["display_name", "settings.default_agent"]), min_size=1))
def test_what_a_mask_names_is_as_given_and_the_rest_as_it_was(
    name: str, agent: str, other_name: str, other_agent: str, paths: set[str]
) -> None:
    held, given_ = organization(name, agent), organization(other_name, other_agent)
    changed = update(held, given_, FieldMask(paths=sorted(paths)), SETTABLE, "organization")

    assert held.display_name == (other_name if "display_name" in paths else name)
    assert held.settings.default_agent == (other_agent if "settings.default_agent" in paths else agent)
    assert set(changed) <= paths
    assert update(held, given_, FieldMask(paths=sorted(paths)), SETTABLE, "organization") == []
