"""What agents ask, and what they are told."""

from typing import Any

import pytest
from branchline.v1.transcripts_pb2 import Decline, InputAnswer, InputRequest, ToolCall
from google.protobuf.struct_pb2 import Struct

from services.sandbox.questions import cancelled, permission, question, result, takes

SCHEMA = {"type": "object", "properties": {"count": {"type": "integer"}}}


def asks(*options: tuple[str, str]) -> InputRequest:
    listed = [{"optionId": option_id, "name": option_id.title(), "kind": kind} for option_id, kind in options]
    return InputRequest(permission=permission({"options": listed}, ToolCall(title="make")))


def form(**values: Any) -> InputAnswer:
    given = Struct()
    given.update(values)
    return InputAnswer(form=given)


def questioned() -> InputRequest:
    return InputRequest(question=question({"message": "How many?", "requestedSchema": SCHEMA}))


def told(request: InputRequest, answer: InputAnswer) -> dict[str, Any]:
    request.answer.CopyFrom(answer)
    return result(request)


DECLINE = InputAnswer(decline=Decline())


def test_an_option_that_was_chosen_is_told() -> None:
    answer = told(asks(("yes", "allow_once")), InputAnswer(option_id="yes"))
    assert answer == {"outcome": {"outcome": "selected", "optionId": "yes"}}


@pytest.mark.parametrize(
    ("options", "outcome"),
    [
        ([("a", "allow_once"), ("n", "reject_once")], {"outcome": "selected", "optionId": "n"}),
        ([("never", "reject_always"), ("n", "reject_once")], {"outcome": "selected", "optionId": "n"}),
        ([("a", "allow_once"), ("never", "reject_always")], {"outcome": "selected", "optionId": "never"}),
        ([("a", "allow_once"), ("odd", "nonesuch")], {"outcome": "cancelled"}),
    ],
)
def test_declining_is_the_option_that_refuses_or_else_a_cancel(
    options: list[tuple[str, str]], outcome: dict[str, str]
) -> None:
    assert told(asks(*options), DECLINE) == {"outcome": outcome}


def test_a_form_is_told_with_whole_numbers_whole() -> None:
    assert told(questioned(), form(count=3, share=0.5)) == {"action": "accept", "content": {"count": 3, "share": 0.5}}
    assert told(questioned(), DECLINE) == {"action": "decline"}


def test_what_nobody_answers_any_more_is_cancelled() -> None:
    assert cancelled(asks()) == {"outcome": {"outcome": "cancelled"}}
    assert cancelled(questioned()) == {"action": "cancel"}


def test_only_what_answers_a_request_is_taken() -> None:
    request = asks(("yes", "allow_once"))
    assert takes(request, InputAnswer(option_id="yes"))
    assert takes(request, DECLINE)
    assert not takes(request, InputAnswer(option_id="no"))
    assert not takes(request, form(count=1))
    assert takes(questioned(), form(count=1))
    assert not takes(questioned(), InputAnswer(option_id="yes"))


def test_a_form_that_cannot_be_kept_whole_is_no_question() -> None:
    large = {"type": "object", "description": "x" * 20_000}
    assert question({"message": "?", "requestedSchema": large}) is None
    assert question({"message": "?", "mode": "url", "requestedSchema": SCHEMA}) is None
    assert question({"message": "?"}) is None


def test_an_option_whose_id_would_have_to_be_cut_is_left_out() -> None:
    assert [option.id for option in asks(("x" * 300, "allow_once"), ("ok", "allow_once")).permission.options] == ["ok"]
