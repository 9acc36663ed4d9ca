"""Tokens that clients carry. API-4, API-5."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.runtime.errors import InvalidArgument
from services.runtime.spine.tokens import (
    consistency_token,
    page_token,
    parse_consistency_token,
    parse_page_token,
    parse_resume_token,
    resume_token,
)


@given(st.text(max_size=20), st.text(max_size=20), st.integers(0, 2**60))
def test_a_resume_token_comes_back_as_it_went(topic: str, epoch: str, seq: int) -> None:
    point = parse_resume_token(resume_token(topic, epoch, seq) or "", topic)

    assert point is None or (point.topic, point.epoch, point.change_seq) == (topic, epoch, seq)


@given(st.text(min_size=1, max_size=60))
def test_a_garbled_token_is_an_error_of_its_field_and_nothing_else(text: str) -> None:
    fields = {
        "resume_token": lambda: parse_resume_token(text, "topic"),
        "consistency_token": lambda: parse_consistency_token(text),
        "page_token": lambda: parse_page_token(text),
    }
    blamed = {field: blamed_field(parse) for field, parse in fields.items()}

    assert all(said in (None, field) for field, said in blamed.items())


def blamed_field(parse: Callable[[], object]) -> str | None:
    try:
        parse()
    except InvalidArgument as error:
        return error.violations[0][0]
    return None


def test_a_token_of_another_watch_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="another watch"):
        parse_resume_token(resume_token("task/a", "e", 1), "task/b")


def test_consistency_and_page_tokens_come_back_as_they_went() -> None:
    (entity,) = parse_consistency_token(consistency_token([("task", "task_1", 3)])).entities

    assert (entity.kind, entity.id, entity.revision) == ("task", "task_1", 3)
    assert parse_page_token(page_token("12")) == "12"
