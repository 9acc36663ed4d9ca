"""What has no rule in the contract is held to its size all the same. Item 7."""

from typing import Any

import pytest
from branchline.v1.processes_pb2 import ProcessSpec, StartProcessRequest
from branchline.v1.sessions_pb2 import AnswerInputRequestRequest
from branchline.v1.tasks_pb2 import Task, UpdateTaskRequest
from branchline.v1.transcripts_pb2 import ToolCall, ToolOutput
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import NULL_VALUE, ListValue, Value

from services.runtime import limits
from services.runtime.errors import InvalidArgument
from services.runtime.validation import validate


def answer(form: str) -> Message:
    made = AnswerInputRequestRequest(task_id="task_1", input_request_id="inp_1")
    made.answer.form["text"] = form
    return made


def update(path: str) -> Message:
    made = UpdateTaskRequest(task=Task(id="task_1"))
    made.update_mask.paths.append(path)
    return made


def start(*words: str) -> Message:
    return StartProcessRequest(task_id="task_1", spec=ProcessSpec(command=words))


def call(output: str) -> Message:
    return ToolCall(outputs=[ToolOutput(text=output)] * 5)


TOO_LARGE = [
    (answer("a" * limits.STRUCT_BYTES), "answer.form"),
    (update("a" * limits.MASK_BYTES), "update_mask"),
    (start("a" * 40_000, "a" * 40_000), "spec.command"),
    (call("a" * 16384), "outputs"),
]


@pytest.mark.parametrize(("message", "field"), TOO_LARGE, ids=[field for _, field in TOO_LARGE])
def test_what_is_larger_than_its_limit_is_refused_by_its_path(message: Message, field: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        validate(message)

    assert [path for path, _ in refused.value.violations] == [field]


@pytest.mark.parametrize(
    "message", [answer("a" * 16_000), update("title"), start("a" * 60_000, "a" * 5_000), call("a" * 13_000)]
)
def test_what_fits_is_taken(message: Message) -> None:
    validate(message)


def form(**value: Any) -> Message:
    made = AnswerInputRequestRequest(task_id="task_1", input_request_id="inp_1")
    made.answer.form.fields["a"].CopyFrom(Value(**value))
    return made


def nested(levels: int) -> Value:
    value = Value(string_value="deep")
    for _ in range(levels):
        value = Value(list_value=ListValue(values=[value]))
    return value


@pytest.mark.parametrize(
    "message",
    [
        form(number_value=float("nan")),
        form(number_value=float("-inf")),
        form(),
        form(string_value="a\0"),
        form(list_value=ListValue(values=[Value()])),
        form(list_value=nested(limits.STRUCT_DEPTH).list_value),
    ],
    ids=["nan", "infinity", "no kind", "nul", "no kind within", "too deep"],
)
def test_what_is_no_json_or_too_deep_for_decoders_is_refused(message: Message) -> None:
    with pytest.raises(InvalidArgument) as refused:
        validate(message)

    assert refused.value.violations[0][0] == "answer.form"


def test_json_of_any_kind_is_taken() -> None:
    validate(form(null_value=NULL_VALUE))
    validate(form(bool_value=False))
    validate(form(list_value=nested(limits.STRUCT_DEPTH - 1).list_value))
