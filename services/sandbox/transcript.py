"""Turns what an agent says (ACP session updates) into transcript entries. Pure.

Chunks of a message are put together while they arrive. A long message runs over several entries, so that no entry
is rewritten as it grows without end.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from branchline.v1 import sessions_pb2
from branchline.v1.sessions_pb2 import PermissionOption, TranscriptEntry
from google.protobuf.timestamp_pb2 import Timestamp

from services.sandbox.members import member, members

ENTRY_CHARACTERS = 4096
OUTPUT_BYTES = 16 * 1024

_WORD_CHARACTERS = 256
_MOST_OPTIONS = 32

_CHUNKS = {
    "agent_message_chunk": sessions_pb2.TRANSCRIPT_ENTRY_KIND_AGENT_MESSAGE,
    "agent_thought_chunk": sessions_pb2.TRANSCRIPT_ENTRY_KIND_REASONING,
}
_PLAN_MARKS = {"completed": "[x]", "in_progress": "[~]"}
_ENDED_TOOL_STATES = frozenset({"completed", "failed"})


@dataclass(slots=True)
class Draft:
    """An entry that may still change, and the tool call that it shows."""

    entry: TranscriptEntry
    number: int
    tool_call_id: str = ""


@dataclass(slots=True)
class TranscriptBuilder:
    """The open end of one session's transcript."""

    session_id: str
    task_id: str
    turn: int
    count: int
    now: Callable[[], Timestamp]
    open: dict[str, Draft] = field(default_factory=dict[str, Draft])
    changed: dict[str, Draft] = field(default_factory=dict[str, Draft])

    def update(self, update: dict[str, Any]) -> None:
        """Take one `session/update` of the agent. Kinds that say nothing to people are passed over."""
        kind = update.get("sessionUpdate")
        if kind in _CHUNKS:
            self._chunk(_CHUNKS[kind], content_text(member(update, "content")))
        elif kind in ("tool_call", "tool_call_update"):
            self._tool_call(update)
        elif kind == "plan":
            self._plan(update)

    def permission(self, params: dict[str, Any]) -> TranscriptEntry:
        """Take a permission request; return its entry."""
        self.seal_messages()
        call = member(params, "toolCall")
        draft = self._begin(sessions_pb2.TRANSCRIPT_ENTRY_KIND_PERMISSION)
        draft.entry.text = cut(str(call.get("title") or "The agent asks for permission"))
        draft.entry.state = "pending"
        for option in members(params, "options")[:_MOST_OPTIONS]:
            option_id, name = str(option.get("optionId", "")), str(option.get("name", ""))
            if option_id and len(option_id) <= _WORD_CHARACTERS:  # one that is cut could not be answered with
                draft.entry.options.append(PermissionOption(id=option_id, name=name[:_WORD_CHARACTERS]))
        return draft.entry

    def note(self, kind: sessions_pb2.TranscriptEntryKind.ValueType, text: str, state: str = "") -> None:
        """Add an entry that is complete at once."""
        draft = self._begin(kind)
        draft.entry.text = cut(text)
        draft.entry.state = state[:_WORD_CHARACTERS]
        self._seal(draft)

    def answer(self, entry_id: str, state: str, user_id: str) -> None:
        """Close a permission request with its answer."""
        draft = self.open.get(entry_id)
        if draft is not None:
            draft.entry.state = state
            draft.entry.user_id = user_id
            self._seal(draft)

    def seal_messages(self) -> None:
        """Close the message that streams; what follows begins a new one."""
        for draft in list(self.open.values()):
            if draft.entry.kind in _CHUNKS.values():
                self._seal(draft)

    @property
    def calls_open(self) -> bool:
        """Whether a tool call has not ended."""
        return any(draft.tool_call_id for draft in self.open.values())

    def seal_others(self, abandoned: str) -> None:
        """Close what turns before this one left open."""
        for draft in list(self.open.values()):
            if draft.entry.turn != self.turn:
                self._abandon(draft, abandoned)

    def seal_all(self, abandoned: str) -> None:
        """Close everything; what had not ended gets the given state."""
        for draft in list(self.open.values()):
            self._abandon(draft, abandoned)

    def take_changed(self) -> list[Draft]:
        """Return copies of the entries that changed since the last call, each with its next revision."""
        taken: list[Draft] = []
        for draft in self.changed.values():
            draft.entry.revision += 1
            entry = TranscriptEntry()
            entry.CopyFrom(draft.entry)
            taken.append(Draft(entry, draft.number, draft.tool_call_id))
        self.changed.clear()
        return taken

    def _chunk(self, kind: sessions_pb2.TranscriptEntryKind.ValueType, text: str) -> None:
        if not text:
            return
        draft = next((draft for draft in self.open.values() if draft.entry.kind == kind), None)
        if draft is None:
            self.seal_messages()
            draft = self._begin(kind)
            draft.entry.message_id = draft.entry.id
        while text:
            room = ENTRY_CHARACTERS - len(draft.entry.text)
            draft.entry.text += text[:room]
            text = text[room:]
            self.changed[draft.entry.id] = draft
            if text:
                message_id = draft.entry.message_id
                self._seal(draft)
                draft = self._begin(kind)
                draft.entry.message_id = message_id

    def _tool_call(self, update: dict[str, Any]) -> None:
        call_id = str(update.get("toolCallId", ""))[:_WORD_CHARACTERS]
        draft = next((draft for draft in self.open.values() if draft.tool_call_id == call_id), None)
        if draft is None:
            self.seal_messages()
            draft = self._begin(sessions_pb2.TRANSCRIPT_ENTRY_KIND_TOOL_CALL, call_id)
            draft.entry.state = "pending"
        if update.get("title"):
            draft.entry.text = cut(str(update["title"]))
        if update.get("status"):
            draft.entry.state = str(update["status"])[:_WORD_CHARACTERS]
        output = tool_output(update)
        if output:
            draft.entry.output = cut(output)
        self.changed[draft.entry.id] = draft
        if draft.entry.state in _ENDED_TOOL_STATES:
            self._seal(draft)

    def _plan(self, update: dict[str, Any]) -> None:
        kind = sessions_pb2.TRANSCRIPT_ENTRY_KIND_PLAN
        draft = next((draft for draft in self.open.values() if draft.entry.kind == kind), None) or self._begin(kind)
        lines = [
            f"{_PLAN_MARKS.get(str(step.get('status')), '[ ]')} {step.get('content', '')}"
            for step in members(update, "entries")
        ]
        draft.entry.text = cut("\n".join(lines))
        self.changed[draft.entry.id] = draft

    def _begin(self, kind: sessions_pb2.TranscriptEntryKind.ValueType, tool_call_id: str = "") -> Draft:
        self.count += 1
        entry = TranscriptEntry(
            id=f"ent_{self.session_id.removeprefix('ses_')}_{self.count}",
            session_id=self.session_id,
            task_id=self.task_id,
            kind=kind,
            streaming=True,
            turn=self.turn,
            create_time=self.now(),
        )
        draft = Draft(entry, self.count, tool_call_id)
        self.open[entry.id] = draft
        self.changed[entry.id] = draft
        return draft

    def _abandon(self, draft: Draft, state: str) -> None:
        if draft.entry.state and draft.entry.state not in _ENDED_TOOL_STATES:
            draft.entry.state = state
        self._seal(draft)

    def _seal(self, draft: Draft) -> None:
        draft.entry.streaming = False
        self.open.pop(draft.entry.id, None)
        self.changed[draft.entry.id] = draft


def content_text(content: dict[str, Any]) -> str:
    """Return the words of an ACP content block."""
    kind = content.get("type")
    if kind == "text":
        return str(content.get("text", ""))
    if kind == "resource_link":
        return str(content.get("uri", ""))
    if kind == "resource":
        resource = member(content, "resource")
        return str(resource.get("text") or resource.get("uri") or "")
    return f"[{kind}]" if kind else ""


def tool_output(update: dict[str, Any]) -> str:
    """Return the result of a tool call in words."""
    parts: list[str] = []
    for block in members(update, "content"):
        if block.get("type") == "content":
            parts.append(content_text(member(block, "content")))
        elif block.get("type") == "diff":
            parts.append(f"{block.get('path', '')}\n{block.get('newText', '')}")
    return "\n".join(part for part in parts if part)


def cut(text: str) -> str:
    """Cut a text to `OUTPUT_BYTES`, keeping its end, where commands say how they fared."""
    data = text.encode()
    if len(data) <= OUTPUT_BYTES:
        return text
    return "[…]\n" + data[-OUTPUT_BYTES:].decode(errors="ignore")
