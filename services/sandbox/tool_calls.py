"""What agents say of their tool calls: created by `tool_call`, changed by `tool_call_update`. Pure.

Source: https://agentclientprotocol.com/protocol/tool-calls. All fields of an update are optional; lists replace those
that were said before.
"""

from collections.abc import Mapping
from typing import Any

from branchline.v1 import transcripts_pb2 as transcripts
from branchline.v1.transcripts_pb2 import FileLocation, ToolCall, ToolCallState, ToolKind

from services.sandbox.members import count_of, members, text_of
from services.sandbox.outputs import relative
from services.sandbox.structs import to_struct
from services.sandbox.words import head

KINDS: Mapping[str, ToolKind.ValueType] = {
    "read": transcripts.TOOL_KIND_READ,
    "edit": transcripts.TOOL_KIND_EDIT,
    "delete": transcripts.TOOL_KIND_DELETE,
    "move": transcripts.TOOL_KIND_MOVE,
    "search": transcripts.TOOL_KIND_SEARCH,
    "execute": transcripts.TOOL_KIND_EXECUTE,
    "think": transcripts.TOOL_KIND_THINK,
    "fetch": transcripts.TOOL_KIND_FETCH,
    "switch_mode": transcripts.TOOL_KIND_SWITCH_MODE,
}
"""Kinds as ACP names them; what it names otherwise is OTHER."""

STATES: Mapping[str, ToolCallState.ValueType] = {
    "pending": transcripts.TOOL_CALL_STATE_PENDING,
    "in_progress": transcripts.TOOL_CALL_STATE_RUNNING,
    "completed": transcripts.TOOL_CALL_STATE_SUCCEEDED,
    "failed": transcripts.TOOL_CALL_STATE_FAILED,
}

OPEN = frozenset({transcripts.TOOL_CALL_STATE_PENDING, transcripts.TOOL_CALL_STATE_RUNNING})
"""States of a call that has not ended."""

_ID_BYTES = 256
_TITLE_BYTES = 4096
_MOST_LOCATIONS = 64
_MOST_LINE = 2**31 - 1


def call_id(update: Mapping[str, Any]) -> str:
    """Return the agent's id of the call that an update is about."""
    return head(text_of(update, "toolCallId"), _ID_BYTES)


def describe(call: ToolCall, update: Mapping[str, Any], root: str) -> None:
    """Take over what an update says of a call, its outputs left aside."""
    if title := text_of(update, "title"):
        call.title = head(title, _TITLE_BYTES)
    if update.get("kind"):
        call.kind = KINDS.get(text_of(update, "kind"), transcripts.TOOL_KIND_OTHER)
    call.state = STATES.get(text_of(update, "status"), call.state)
    if update.get("rawInput") is not None:
        call.input.CopyFrom(to_struct(update["rawInput"]))
    if update.get("rawOutput") is not None:
        call.raw_output.CopyFrom(to_struct(update["rawOutput"]))
    if isinstance(update.get("locations"), list):
        del call.locations[:]
        call.locations.extend(_location(one, root) for one in members(update, "locations")[:_MOST_LOCATIONS])


def _location(location: Mapping[str, Any], root: str) -> FileLocation:
    line = count_of(location, "line", _MOST_LINE) or 0
    return FileLocation(path=relative(text_of(location, "path"), root), line=line)
