"""Turns what an agent says (ACP session updates) into transcript entries. Pure.

Chunks of a message are put together while they arrive. A long message runs over several entries, so that no entry
is rewritten as it grows without end. An entry whose blobs are yet to be stored ends once they are, or are given up.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from branchline.v1 import transcripts_pb2 as transcripts
from branchline.v1.common_pb2 import Actor, BlobReference
from branchline.v1.transcripts_pb2 import (
    AgentMessage,
    Notice,
    NoticeKind,
    Plan,
    PlanStep,
    PlanStepPriority,
    PlanStepState,
    ToolCall,
    ToolCallState,
    TranscriptEntry,
    TurnEnd,
)
from google.protobuf.timestamp_pb2 import Timestamp

from services.runtime.actors import agent_actor, system_actor
from services.sandbox import tool_calls
from services.sandbox.members import member, members, text_of
from services.sandbox.outputs import (
    Shown,
    Whole,
    block_text,
    block_whole,
    bounded,
    outputs_of,
    storable,
    text_shown,
    with_blobs,
)
from services.sandbox.structs import to_struct
from services.sandbox.words import head

ENTRY_CHARACTERS = 4096

_ID_BYTES = 256
_STEP_BYTES = 1024
_NOTICE_BYTES = 4096
_MOST_STEPS = 100
_MOST_ENDED = 32
_STREAM_CHARACTERS = 1024 * 1024
"""What is kept of the end of a terminal's output while it goes on."""

_WAITING_BYTES = 64 * 1024 * 1024
"""Most that waits to be stored; what comes while so much does is shown cut."""

_CHUNKS = {"agent_message_chunk": "agent_message", "agent_thought_chunk": "reasoning"}
_MESSAGES = tuple(_CHUNKS.values())

_STEP_STATES: Mapping[str, PlanStepState.ValueType] = {
    "pending": transcripts.PLAN_STEP_STATE_PENDING,
    "in_progress": transcripts.PLAN_STEP_STATE_RUNNING,
    "completed": transcripts.PLAN_STEP_STATE_COMPLETED,
}
_PRIORITIES: Mapping[str, PlanStepPriority.ValueType] = {
    "high": transcripts.PLAN_STEP_PRIORITY_HIGH,
    "medium": transcripts.PLAN_STEP_PRIORITY_MEDIUM,
    "low": transcripts.PLAN_STEP_PRIORITY_LOW,
}

NO_NEWS = frozenset(
    {
        "available_commands_update",
        "config_option_update",
        "current_mode_update",
        "session_info_update",
        "usage_update",
        "user_message_chunk",
    }
)
"""Updates that are known and say nothing that a transcript shows, or that others look at."""

INTERRUPTED = transcripts.TOOL_CALL_STATE_INTERRUPTED
SYSTEM = "sandbox"


@dataclass(slots=True)
class Draft:
    """An entry that may still change."""

    entry: TranscriptEntry
    number: int
    key: str = ""
    """What it is known by to the agent: the id of a tool call or of a message."""

    shown: list[Shown] = field(default_factory=list[Shown])
    """A tool call's outputs."""
    stream: str = ""
    """What a terminal of the tool call has shown, beside the outputs."""
    stream_omitted: int = 0
    wholes: list[Whole] = field(default_factory=list[Whole])
    """What a message showed beside words."""

    @property
    def kind(self) -> str | None:
        """Which content it has."""
        return self.entry.WhichOneof("content")

    @property
    def message(self) -> AgentMessage:
        """The message that it is."""
        return getattr(self.entry, self.kind or _MESSAGES[0])

    @property
    def call(self) -> ToolCall:
        """The tool call that it is."""
        return self.entry.tool_call

    @property
    def unstored(self) -> list[Whole]:
        """What it could not hold."""
        return [*self.wholes, *(whole for one in self.shown for whole in one.wholes)]


@dataclass(slots=True)
class TranscriptBuilder:
    """The open end of one session's transcript."""

    session_id: str
    task_id: str
    turn: int
    count: int
    now: Callable[[], Timestamp]
    open: dict[str, Draft] = field(default_factory=dict[str, Draft])
    root: str = ""
    """The working tree, absolute; paths in it are told relative to it."""
    changed: dict[str, Draft] = field(default_factory=dict[str, Draft])
    waiting: dict[str, Draft] = field(default_factory=dict[str, Draft])
    """Entries that have come to their end but for their blobs."""
    _ended: dict[str, Draft] = field(default_factory=dict[str, Draft])
    """The newest tool calls that ended: some agents say more of them all the same."""

    def __post_init__(self) -> None:
        """Go on after a restart: what had ended but for its blobs has ended without them."""
        for draft in list(self.open.values()):
            draft.shown = [Shown(output) for output in draft.call.outputs]
            ended_call = draft.kind == "tool_call" and draft.call.state not in tool_calls.OPEN
            if ended_call or (draft.kind in _MESSAGES and draft.number < self.count):
                self._end(draft)

    def update(self, update: Mapping[str, Any]) -> None:
        """Take one `session/update` of the agent. What is not known is kept as it is."""
        kind = text_of(update, "sessionUpdate")
        if kind in _CHUNKS:
            self._chunk(_CHUNKS[kind], update)
        elif kind in ("tool_call", "tool_call_update"):
            self._tool_call(update)
        elif kind == "plan":
            self._plan(update)
        elif kind == "plan_update" and members(member(update, "plan"), "entries"):
            self._plan(member(update, "plan"))
        elif kind not in NO_NEWS:
            self.unknown(kind, update)

    def unknown(self, what: str, told: Any) -> None:
        """Keep something that the agent sent and that is not known, or makes no sense, as it is."""
        words = f"The agent sent something that is not known here: {what}".removesuffix(": ")
        self.notice(transcripts.NOTICE_KIND_UNKNOWN_UPDATE, words, told)

    def question(self, request_id: Callable[[int], str]) -> TranscriptEntry:
        """Begin the entry that shows that the agent waits for an answer; the id is made of the entry's number."""
        self.seal_messages()
        entry = TranscriptEntry(input_request_id=request_id(self.count + 1))
        return self._begin(entry).entry

    def call_of(self, update: Mapping[str, Any]) -> ToolCall:
        """Return a tool call as a request for permission tells it, with what was said of it before."""
        call = ToolCall(tool_call_id=tool_calls.call_id(update), state=transcripts.TOOL_CALL_STATE_PENDING)
        known = self._open_call(call.tool_call_id)
        if known is not None:
            call.CopyFrom(known.call)
        tool_calls.describe(call, update, self.root)
        if isinstance(update.get("content"), list):
            del call.outputs[:]
            call.outputs.extend(one.output for one in outputs_of(members(update, "content"), self.root))
        return call

    def notice(self, kind: NoticeKind.ValueType, text: str, update: Any = None, *, by_agent: bool = False) -> None:
        """Add something that people should know: what Branchline says, or the agent, such as with an update."""
        notice = Notice(kind=kind, text=head(text, _NOTICE_BYTES))
        if update is not None:
            notice.update.CopyFrom(to_struct(update))
        actor = None if by_agent or update is not None else system_actor(SYSTEM)
        self._end(self._begin(TranscriptEntry(notice=notice), actor))

    def end_turn(self, end: TurnEnd) -> None:
        """Add the end of the turn."""
        self._end(self._begin(TranscriptEntry(turn_end=end)))

    def settle(self, entry_id: str) -> None:
        """Close a question."""
        draft = self.open.get(entry_id)
        if draft is not None:
            self._end(draft)

    def seal_messages(self) -> None:
        """Close the message that streams; what follows begins a new one."""
        for draft in list(self.open.values()):
            if draft.kind in _MESSAGES:
                self._seal(draft)

    @property
    def calls_open(self) -> bool:
        """Whether a tool call has not ended."""
        return any(draft.kind == "tool_call" for draft in self.open.values())

    def seal_others(self) -> None:
        """Close what turns before this one left open."""
        for draft in list(self.open.values()):
            if draft.entry.turn != self.turn:
                self._abandon(draft, INTERRUPTED)

    def seal_all(self, abandoned: ToolCallState.ValueType) -> None:
        """Close everything; tool calls that had not ended get the given state."""
        for draft in list(self.open.values()):
            self._abandon(draft, abandoned)

    def stored(self, entry_id: str, wholes: Sequence[Whole], blobs: Sequence[BlobReference | None]) -> None:
        """Put the blobs in which its `unstored` were stored into an entry that waits for them, and close it."""
        draft = self.waiting.get(entry_id)
        if draft is None or draft.unstored != list(wholes):
            return
        if draft.kind == "tool_call":
            draft.shown = with_blobs(draft.shown, blobs)
            _put_outputs(draft)
        else:
            draft.message.blobs.extend(blob for blob in blobs if blob is not None)
            lost = [whole.words for whole, blob in zip(draft.wholes, blobs, strict=True) if blob is None]
            draft.message.text += "".join(lost)
        self._end(draft)

    def give_up_blobs(self) -> None:
        """Close what waits for its blobs without them."""
        for draft in list(self.waiting.values()):
            self._give_up(draft)

    def take_changed(self) -> list[Draft]:
        """Return copies of the entries that changed since the last call, each with its next revision."""
        taken: list[Draft] = []
        for draft in self.changed.values():
            draft.entry.revision += 1
            entry = TranscriptEntry()
            entry.CopyFrom(draft.entry)
            taken.append(Draft(entry, draft.number, draft.key))
        self.changed.clear()
        return taken

    def _chunk(self, kind: str, update: Mapping[str, Any]) -> None:
        block = member(update, "content")
        text = block_text(block)
        if not text:
            return
        message_id = head(text_of(update, "messageId"), _ID_BYTES)
        draft = next((draft for draft in self.open.values() if draft.kind == kind), None)
        if draft is None or (message_id and draft.key != message_id):
            self.seal_messages()
            draft = self._begin_message(kind, message_id, "", 1)
        whole = block_whole(block)
        if whole is not None and storable([*draft.wholes, whole]):
            draft.wholes.append(whole)
            return
        while text:
            room = ENTRY_CHARACTERS - len(draft.message.text)
            draft.message.text += text[:room]
            text = text[room:]
            self.changed[draft.entry.id] = draft
            if text:
                first, part = draft.message.message_id, draft.message.part
                self._seal(draft)
                draft = self._begin_message(kind, message_id, first, part + 1)

    def _begin_message(self, kind: str, key: str, first: str, part: int) -> Draft:
        entry = TranscriptEntry()
        getattr(entry, kind).part = part
        draft = self._begin(entry, key=key)
        draft.message.message_id = first or draft.entry.id
        return draft

    def _tool_call(self, update: Mapping[str, Any]) -> None:
        key = tool_calls.call_id(update)
        draft, late = self._open_call(key), False
        if draft is None and update.get("sessionUpdate") == "tool_call_update":
            draft = self._ended.get(key)
            late = draft is not None
        if draft is None:
            self.seal_messages()
            call = ToolCall(tool_call_id=key, state=transcripts.TOOL_CALL_STATE_PENDING)
            draft = self._begin(TranscriptEntry(tool_call=call), key=key)
        state = draft.call.state
        tool_calls.describe(draft.call, update, self.root)
        if isinstance(update.get("content"), list):
            draft.shown = outputs_of(members(update, "content"), self.root)
            _put_outputs(draft)
        for streamed in ("terminal_output", "terminal_output_delta"):
            self._stream(draft, member(member(update, "_meta"), streamed).get("data"))
        self.changed[draft.entry.id] = draft
        if late:
            if draft.call.state in tool_calls.OPEN:  # it has ended, whatever is said
                draft.call.state = state
            if draft.entry.id not in self.waiting or not draft.unstored:
                self._end(draft)
        elif draft.call.state not in tool_calls.OPEN:
            self._seal(draft)

    def _stream(self, draft: Draft, data: object) -> None:
        """Add to what a terminal of the agent's has shown."""
        if not isinstance(data, str) or not data:
            return
        draft.stream += data
        left_out = draft.stream[:-_STREAM_CHARACTERS]
        draft.stream = draft.stream[-_STREAM_CHARACTERS:]
        draft.stream_omitted += len(left_out.encode())
        _put_outputs(draft)

    def _plan(self, update: Mapping[str, Any]) -> None:
        draft = next((draft for draft in self.open.values() if draft.kind == "plan"), None)
        if draft is None:
            draft = self._begin(TranscriptEntry(plan=Plan()))
        steps = [
            PlanStep(
                text=head(text_of(step, "content"), _STEP_BYTES),
                state=_STEP_STATES.get(text_of(step, "status"), transcripts.PLAN_STEP_STATE_UNSPECIFIED),
                priority=_PRIORITIES.get(text_of(step, "priority"), transcripts.PLAN_STEP_PRIORITY_UNSPECIFIED),
            )
            for step in members(update, "entries")[:_MOST_STEPS]
        ]
        draft.entry.plan.CopyFrom(Plan(steps=steps))
        self.changed[draft.entry.id] = draft

    def _open_call(self, key: str) -> Draft | None:
        return next((draft for draft in self.open.values() if draft.kind == "tool_call" and draft.key == key), None)

    def _begin(self, entry: TranscriptEntry, actor: Actor | None = None, key: str = "") -> Draft:
        """Add an entry that holds its content."""
        self.count += 1
        entry.id = f"ent_{self.session_id.removeprefix('ses_')}_{self.count}"
        entry.session_id = self.session_id
        entry.task_id = self.task_id
        entry.turn = self.turn
        entry.actor.CopyFrom(actor or agent_actor(self.session_id))
        entry.create_time.CopyFrom(self.now())
        draft = Draft(entry, self.count, key)
        self.open[entry.id] = draft
        self.changed[entry.id] = draft
        return draft

    def _abandon(self, draft: Draft, state: ToolCallState.ValueType) -> None:
        if draft.kind == "tool_call" and draft.call.state in tool_calls.OPEN:
            draft.call.state = state
        self._seal(draft)

    def _seal(self, draft: Draft) -> None:
        """Close an entry, now or once its blobs are stored."""
        if draft.stream:
            draft.shown = bounded([*draft.shown, text_shown(draft.stream, draft.stream_omitted)])
            draft.stream = ""
        if not draft.unstored:
            self._end(draft)
            return
        self.open.pop(draft.entry.id, None)
        self.waiting[draft.entry.id] = draft
        self.changed[draft.entry.id] = draft
        self._remember(draft)
        if sum(len(whole.data) for one in self.waiting.values() for whole in one.unstored) > _WAITING_BYTES:
            self._give_up(draft)

    def _give_up(self, draft: Draft) -> None:
        """Close an entry that waits for its blobs without them."""
        self.stored(draft.entry.id, draft.unstored, [None] * len(draft.unstored))

    def _end(self, draft: Draft) -> None:
        if not draft.entry.HasField("end_time"):
            draft.entry.end_time.CopyFrom(self.now())
        draft.wholes.clear()
        draft.shown = [Shown(one.output) for one in draft.shown]
        self.open.pop(draft.entry.id, None)
        self.waiting.pop(draft.entry.id, None)
        self.changed[draft.entry.id] = draft
        self._remember(draft)

    def _remember(self, draft: Draft) -> None:
        if draft.kind != "tool_call":
            return
        self._ended.pop(draft.key, None)
        self._ended[draft.key] = draft
        if len(self._ended) > _MOST_ENDED:
            del self._ended[next(iter(self._ended))]


def _put_outputs(draft: Draft) -> None:
    """Write what is shown of a tool call into its entry."""
    shown = draft.shown
    if draft.stream:
        shown = bounded([*shown, text_shown(draft.stream, draft.stream_omitted)])
    del draft.call.outputs[:]
    draft.call.outputs.extend(one.output for one in shown)
