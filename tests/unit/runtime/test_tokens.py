"""Tokens that clients carry. API-4, API-5."""

from collections.abc import Callable

import pytest
from branchline.v1 import tasks_pb2
from branchline.v1.vocabulary_pb2 import ENTITY_KIND_TASK
from hypothesis import given
from hypothesis import strategies as st

from services.runtime.errors import InvalidArgument
from services.runtime.spine.tokens import (
    Position,
    consistency_token,
    page_token,
    parse_consistency_token,
    parse_page_token,
    parse_resume_token,
    resume_token,
)

LIST = tasks_pb2.ListTasksRequest(organization_id="org_1", page_size=10)
STORABLE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
VALUES = st.one_of(STORABLE, st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False))


@given(STORABLE, STORABLE, st.integers(0, 2**60))
def test_a_resume_token_comes_back_as_it_went(topic: str, epoch: str, seq: int) -> None:
    token = resume_token(topic, Position(epoch, seq))

    assert parse_resume_token(token, topic) == (Position(epoch, seq) if token else None)


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


@given(st.text(min_size=1, max_size=60))
def test_a_garbled_token_is_an_error_of_its_field_and_nothing_else(text: str) -> None:
    fields: dict[str, Callable[[], object]] = {
        "resume_token": lambda: parse_resume_token(text, "topic"),
        "consistency_token": lambda: parse_consistency_token(text),
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
        lambda: parse_consistency_token(consistency_token([(ENTITY_KIND_TASK, "task_\0", 3)])),
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


def test_a_consistency_token_comes_back_as_it_went() -> None:
    (entity,) = parse_consistency_token(consistency_token([(ENTITY_KIND_TASK, "task_1", 3)])).entities

    assert (entity.kind, entity.id, entity.revision) == (ENTITY_KIND_TASK, "task_1", 3)
