"""What an agent says, put together. SES-4."""

from typing import Any

from branchline.v1 import sessions_pb2
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from services.sandbox.transcript import ENTRY_CHARACTERS, OUTPUT_BYTES, TranscriptBuilder, cut

AGENT = sessions_pb2.TRANSCRIPT_ENTRY_KIND_AGENT_MESSAGE


def builder() -> TranscriptBuilder:
    return TranscriptBuilder("ses_1", "task_1", 1, 0, Timestamp)


def chunk(text: str, kind: str = "agent_message_chunk") -> dict[str, Any]:
    return {"sessionUpdate": kind, "content": {"type": "text", "text": text}}


@given(st.lists(st.tuples(st.text(min_size=1, max_size=3000), st.booleans()), max_size=20))
def test_no_character_is_lost_however_the_chunks_and_flushes_fall(chunks: list[tuple[str, bool]]) -> None:
    made = builder()
    states: dict[str, tuple[int, str]] = {}

    def flush() -> None:
        for draft in made.take_changed():
            revision, text = states.get(draft.entry.id, (0, ""))
            assert draft.entry.revision > revision
            assert draft.entry.text.startswith(text)
            states[draft.entry.id] = (draft.entry.revision, draft.entry.text)

    for text, flushed in chunks:
        made.update(chunk(text))
        if flushed:
            flush()
    made.seal_all("interrupted")
    flush()

    assert "".join(text for _, text in states.values()) == "".join(text for text, _ in chunks)
    assert all(len(text) <= ENTRY_CHARACTERS for _, text in states.values())


def test_a_tool_call_between_two_messages_parts_them() -> None:
    made = builder()
    made.update(chunk("before"))
    made.update({"sessionUpdate": "tool_call", "toolCallId": "c", "title": "ls", "status": "in_progress"})
    made.update(chunk("after"))

    entries = [draft.entry for draft in made.take_changed()]

    assert [(entry.text, entry.streaming) for entry in entries] == [("before", False), ("ls", True), ("after", True)]


def test_a_tool_call_ends_with_its_output() -> None:
    made = builder()
    made.update({"sessionUpdate": "tool_call", "toolCallId": "c", "title": "ls"})
    content = [{"type": "content", "content": {"type": "text", "text": "a.txt"}}]
    made.update({"sessionUpdate": "tool_call_update", "toolCallId": "c", "status": "completed", "content": content})

    (draft,) = made.take_changed()

    assert (draft.entry.state, draft.entry.output, draft.entry.streaming) == ("completed", "a.txt", False)


def test_what_had_not_ended_is_marked_when_the_turn_breaks_off() -> None:
    made = builder()
    made.update({"sessionUpdate": "tool_call", "toolCallId": "c", "title": "ls", "status": "in_progress"})
    made.seal_all("interrupted")

    (draft,) = made.take_changed()

    assert (draft.entry.state, draft.entry.streaming) == ("interrupted", False)


@given(st.text(max_size=OUTPUT_BYTES * 2))
def test_output_is_cut_and_keeps_its_end(text: str) -> None:
    kept = cut(text)

    assert len(kept.encode()) <= OUTPUT_BYTES + len("[…]\n".encode())
    assert text.endswith(kept.removeprefix("[…]\n"))
