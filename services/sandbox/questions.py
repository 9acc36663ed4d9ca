"""What agents ask people, and how they are told the answer. Pure.

Source: https://agentclientprotocol.com/protocol/tool-calls#requesting-permission, and elicitation, which ACP takes from
https://modelcontextprotocol.io/specification/draft/client/elicitation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from branchline.v1 import transcripts_pb2 as transcripts
from branchline.v1.transcripts_pb2 import (
    InputAnswer,
    InputRequest,
    PermissionOption,
    PermissionOptionKind,
    PermissionRequest,
    Question,
    ToolCall,
)

from services.sandbox.members import member, members, text_of
from services.sandbox.structs import fits, from_struct, to_struct
from services.sandbox.words import head

PERMISSION, ELICITATION = "session/request_permission", "elicitation/create"

Json = dict[str, Any]

_TEXT_BYTES = 4096
_OPTION_ID_BYTES = 256
_OPTION_NAME_BYTES = 1024
_MOST_OPTIONS = 32

_KINDS: Mapping[str, PermissionOptionKind.ValueType] = {
    "allow_once": transcripts.PERMISSION_OPTION_KIND_ALLOW_ONCE,
    "allow_always": transcripts.PERMISSION_OPTION_KIND_ALLOW_ALWAYS,
    "reject_once": transcripts.PERMISSION_OPTION_KIND_REJECT_ONCE,
    "reject_always": transcripts.PERMISSION_OPTION_KIND_REJECT_ALWAYS,
}


@dataclass(slots=True)
class Asked:
    """Something that an agent waits for. It is answered once its request holds an answer."""

    request: InputRequest
    rpc_id: str
    """Id of the agent's own request, as JSON."""

    @property
    def answered(self) -> bool:
        """Whether somebody has answered."""
        return self.request.HasField("answer")


def permission(params: Mapping[str, Any], call: ToolCall) -> PermissionRequest:
    """Return what an agent asks permission for; `call` is the tool call that it names."""
    asked = PermissionRequest(tool_call=call)
    for option in members(params, "options")[:_MOST_OPTIONS]:
        option_id = text_of(option, "optionId")
        if not option_id or len(option_id.encode()) > _OPTION_ID_BYTES:  # one that is cut could not be answered with
            continue
        name = head(text_of(option, "name"), _OPTION_NAME_BYTES)
        kind = _KINDS.get(text_of(option, "kind"), transcripts.PERMISSION_OPTION_KIND_UNSPECIFIED)
        asked.options.append(PermissionOption(id=option_id, display_name=name, kind=kind))
    return asked


def question(params: Mapping[str, Any]) -> Question | None:
    """Return what an agent asks with a form; None if it is no form, or one that cannot be kept whole."""
    schema = params.get("requestedSchema")
    if params.get("mode", "form") != "form" or not fits(schema):
        return None
    return Question(text=head(text_of(params, "message"), _TEXT_BYTES), schema=to_struct(schema))


def takes(request: InputRequest, answer: InputAnswer) -> bool:
    """Say whether an answer is one to what is asked."""
    given = answer.WhichOneof("answer")
    if given == "option_id":
        return answer.option_id in [option.id for option in request.permission.options]
    return given == "decline" or (given == "form" and request.HasField("question"))


def result(request: InputRequest) -> Json:
    """Return the result of the agent's request by the answer that it was given."""
    answer = request.answer
    if request.HasField("question"):
        declined = answer.HasField("decline")
        return {"action": "decline"} if declined else {"action": "accept", "content": from_struct(answer.form)}
    option_id = _refusal(request.permission) if answer.HasField("decline") else answer.option_id
    return {"outcome": {"outcome": "selected", "optionId": option_id}} if option_id else cancelled(request)


def cancelled(request: InputRequest) -> Json:
    """Return the result of the agent's request where nobody answers it any more."""
    return {"action": "cancel"} if request.HasField("question") else {"outcome": {"outcome": "cancelled"}}


def _refusal(asked: PermissionRequest) -> str:
    """Return the option that refuses, this once if that can be said; empty if there is none."""
    wanted = (transcripts.PERMISSION_OPTION_KIND_REJECT_ONCE, transcripts.PERMISSION_OPTION_KIND_REJECT_ALWAYS)
    found = [option.id for kind in wanted for option in asked.options if option.kind == kind]
    return found[0] if found else ""


def question_id(session_id: str, number: int) -> str:
    """Return the id of what the entry with this number asks; the same, however often the event is read."""
    return f"inp_{session_id.removeprefix('ses_')}_{number}"


def named_call(params: Mapping[str, Any]) -> Json:
    """Return the tool call that a request for permission names."""
    return member(params, "toolCall")
