"""`branchline call`: its help comes from the contract, for every method. OPS-5."""

import pytest
from branchline.contract import words
from google.protobuf.descriptor import MethodDescriptor
from typer.testing import CliRunner

from cli.commands.call import app, services

METHODS = [pytest.param(method, id=method.full_name) for service in services() for method in service.methods]


@pytest.mark.parametrize("method", METHODS)
def test_the_help_of_every_method_is_what_the_contract_says(method: MethodDescriptor) -> None:
    shown = CliRunner().invoke(app, [method.containing_service.name, method.name, "--help"], terminal_width=10_000)

    assert shown.exit_code == 0, shown.output
    said = " ".join(shown.output.split())
    assert words(method)
    assert words(method) in said
    assert "Access: " in said
    for field in method.input_type.fields:
        assert words(field), field.full_name
        assert f"{field.name} (" in said


def test_every_thing_of_the_contract_has_words() -> None:
    assert all(words(service) for service in services())
    messages = {
        one for service in services() for method in service.methods for one in (method.input_type, method.output_type)
    }
    assert not [field.full_name for message in messages for field in message.fields if not words(field)]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"task_idx": 1}', '{"task_id": 1}'])
def test_what_is_no_request_is_refused_before_anything_is_called(text: str) -> None:
    refused = CliRunner().invoke(app, ["TaskService", "GetTask", text])

    assert refused.exit_code == 2
    assert "GetTaskRequest" in refused.output
