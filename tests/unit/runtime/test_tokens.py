"""Tokens that clients carry. API-4, API-5."""

from collections.abc import Callable
from typing import Any

import pytest
from branchline.v1 import organizations_pb2, tasks_pb2
from branchline.v1.common_pb2 import ENTITY_KIND_REPOSITORY, ENTITY_KIND_TASK, Consistency
from hypothesis import given
from hypothesis import strategies as st

from services.runtime.errors import InvalidArgument
from services.runtime.spine.tokens import (
    AWAIT_SECONDS,
    Begin,
    Position,
    consistency_token,
    page_token,
    parse_consistency,
    parse_page_token,
    parse_resume_token,
    resume_token,
    selection_of,
)

LIST = tasks_pb2.ListTasksRequest(organization_id="org_1", page_size=10)
STORABLE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
VALUES = st.one_of(STORABLE, st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False))


SELECTIONS = st.binary(max_size=12)


@given(STORABLE, STORABLE, st.integers(0, 2**60), SELECTIONS)
def test_a_resume_token_comes_back_as_it_went(topic: str, epoch: str, seq: int, selection: bytes) -> None:
    token = resume_token(topic, Position(epoch, seq), selection)

    assert parse_resume_token(token, topic, selection) == Begin(Position(epoch, seq) if token else None)


@given(SELECTIONS, SELECTIONS)
def test_a_resume_token_of_another_selection_begins_anew_and_says_so(made_for: bytes, given_to: bytes) -> None:
    begin = parse_resume_token(resume_token("task/a", Position("e", 1), made_for), "task/a", given_to)

    assert begin == (Begin(Position("e", 1)) if made_for == given_to else Begin(changed=True))


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ({"transcripts": {"session_ids": ["ses_1"]}}, False),
        ({"transcripts": {"tail_entries": 0}}, False),
        ({"transcripts": {}}, False),
        ({"task_id": "task_2"}, False),
        ({"resume_token": "x"}, True),
        ({"consistency": {"at_least_as_fresh": ["x"]}}, True),
        ({"heartbeat_interval": {"seconds": 3}}, True),
    ],
)
def test_a_selection_is_what_is_shown_and_neither_place_freshness_nor_heartbeat(
    other: dict[str, Any], same: bool
) -> None:
    plain = tasks_pb2.WatchTaskRequest(task_id="task_1")
    fields: dict[str, Any] = {"task_id": "task_1", **other}

    assert (selection_of(tasks_pb2.WatchTaskRequest(**fields)) == selection_of(plain)) is same


def test_a_selection_names_its_method() -> None:
    task = tasks_pb2.WatchTaskRequest(task_id="a")
    organization = organizations_pb2.WatchOrganizationRequest(organization_id="a")

    assert task.SerializeToString() == organization.SerializeToString()
    assert selection_of(task) != selection_of(organization)


@given(st.lists(VALUES, max_size=4))
def test_a_page_token_comes_back_as_it_went_to_the_same_list(values: list[str | int | float]) -> None:
    token = page_token(LIST, values)
    following = tasks_pb2.ListTasksRequest(organization_id="org_1", page_size=50, page_token=token)

    assert parse_page_token(following, token, *map(type, values)) == values


def test_a_page_token_of_another_list_or_with_values_of_another_type_is_refused() -> None:
    token = page_token(LIST, ["a", 1])

    with pytest.raises(InvalidArgument, match="another request"):
        parse_page_token(tasks_pb2.ListTasksRequest(organization_id="org_2"), token, str, int)
    with pytest.raises(InvalidArgument, match="not one of ours"):
        parse_page_token(LIST, token, int, str)


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ({"order_by": "create_time"}, False),
        ({"filter": {"query": "a"}}, False),
        ({"filter": {"repository_ids": ["repo_1"]}}, False),
        ({"page_size": 7}, True),
        ({"consistency": {"at_least_as_fresh": ["x"]}}, True),
    ],
)
def test_a_page_token_is_good_for_what_is_listed_in_that_order_alone(other: dict[str, Any], same: bool) -> None:
    token = page_token(tasks_pb2.ListTasksRequest(organization_id="org_1"), ["a"])
    fields: dict[str, Any] = {"organization_id": "org_1", **other}
    following = tasks_pb2.ListTasksRequest(**fields)

    if same:
        assert parse_page_token(following, token, str) == ["a"]
    else:
        with pytest.raises(InvalidArgument, match="another request"):
            parse_page_token(following, token, str)


@given(st.text(min_size=1, max_size=60))
def test_a_garbled_token_is_an_error_of_its_field_and_nothing_else(text: str) -> None:
    fields: dict[str, Callable[[], object]] = {
        "resume_token": lambda: parse_resume_token(text, "topic"),
        "consistency.at_least_as_fresh": lambda: parse_consistency(Consistency(at_least_as_fresh=[text])),
        "page_token": lambda: parse_page_token(LIST, text),
    }
    blamed = {field: blamed_field(parse) for field, parse in fields.items()}

    assert all(said in {None, field} for field, said in blamed.items())


@pytest.mark.parametrize(
    "parse",
    [
        lambda: parse_resume_token(resume_token("task/a\0", Position("e", 1)), "task/a\0"),
        lambda: parse_resume_token(resume_token("task/a", Position("e\0", 1)), "task/a"),
        lambda: parse_page_token(LIST, page_token(LIST, ["a\0"]), str),
        lambda: parse_consistency(
            Consistency(at_least_as_fresh=[consistency_token([(ENTITY_KIND_TASK, "task_\0", 3)])])
        ),
    ],
)
def test_a_token_that_no_store_could_take_is_refused(parse: Callable[[], object]) -> None:  # F16
    with pytest.raises(InvalidArgument, match="is not one of ours"):
        parse()


def blamed_field(parse: Callable[[], object]) -> str | None:
    try:
        parse()
    except InvalidArgument as error:
        return error.violations[0][0]
    return None


def test_a_token_of_another_watch_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="another watch"):
        parse_resume_token(resume_token("task/a", Position("e", 1)), "task/b")


def test_consistency_tokens_come_back_as_they_went_all_of_them() -> None:
    tokens = [
        consistency_token([(ENTITY_KIND_TASK, "task_1", 3)]),
        consistency_token([(ENTITY_KIND_REPOSITORY, "repo_1", 1), (ENTITY_KIND_TASK, "task_1", 2)]),
    ]
    fresh = parse_consistency(Consistency(at_least_as_fresh=tokens))

    assert [(entity.kind, entity.id, entity.revision) for entity in fresh.point.entities] == [
        (ENTITY_KIND_TASK, "task_1", 3),
        (ENTITY_KIND_REPOSITORY, "repo_1", 1),
        (ENTITY_KIND_TASK, "task_1", 2),
    ]


@pytest.mark.parametrize(
    ("asked", "waits"), [(None, AWAIT_SECONDS), (0.0, 0.0), (0.25, 0.25), (30.0, 30.0), (3600.0, 30.0)]
)
def test_a_read_waits_as_long_as_it_says_but_no_longer_than_half_a_minute(asked: float | None, waits: float) -> None:
    consistency = Consistency()
    if asked is not None:
        consistency.max_wait.FromNanoseconds(round(asked * 1e9))

    assert parse_consistency(consistency).wait_seconds == waits


def test_a_token_fits_what_a_read_takes_however_many_entities_a_command_names() -> None:
    token = consistency_token([(ENTITY_KIND_TASK, f"task_{number:059}", 10**7) for number in range(500)])

    assert len(token) <= 4096
    assert len(parse_consistency(Consistency(at_least_as_fresh=[token])).point.entities) == 40
