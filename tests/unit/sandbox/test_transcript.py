"""What an agent says, put together and kept whole. SES-4."""

import base64
from typing import Any

from branchline.v1 import transcripts_pb2 as transcripts
from branchline.v1.common_pb2 import BlobReference
from branchline.v1.transcripts_pb2 import TranscriptEntry
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from services.runtime.clock import Clock
from services.runtime.limits import ENTITY_BYTES
from services.runtime.validation import validate
from services.sandbox.outputs import MOST_WHOLES, TEXT_BYTES, WHOLE_BYTES
from services.sandbox.structs import from_struct
from services.sandbox.transcript import ENTRY_CHARACTERS, INTERRUPTED, Draft, TranscriptBuilder
from services.sandbox.words import clean

STREAM_BYTES = 1024 * 1024
ROOT = "/home/one/workspace"


def builder() -> TranscriptBuilder:
    return TranscriptBuilder("ses_1", "task_1", 1, 0, Clock().timestamp, root=ROOT)


def chunk(text: str, kind: str = "agent_message_chunk", **fields: Any) -> dict[str, Any]:
    return {"sessionUpdate": kind, "content": {"type": "text", "text": text}, **fields}


def calls(call_id: str = "c", **fields: Any) -> dict[str, Any]:
    return {"sessionUpdate": "tool_call", "toolCallId": call_id, **fields}


def changes(call_id: str = "c", **fields: Any) -> dict[str, Any]:
    return {"sessionUpdate": "tool_call_update", "toolCallId": call_id, **fields}


def words(text: str) -> dict[str, Any]:
    return {"type": "content", "content": {"type": "text", "text": text}}


def picture(data: bytes = b"picture") -> dict[str, Any]:
    return {"type": "image", "data": base64.b64encode(data).decode(), "mimeType": "image/png"}


def taken(made: TranscriptBuilder) -> list[TranscriptEntry]:
    return [draft.entry for draft in made.take_changed()]


def waiting(made: TranscriptBuilder) -> tuple[str, Draft]:
    [found] = made.waiting.items()
    return found


def blob(number: int = 1) -> BlobReference:
    return BlobReference(blob_id=f"blob_{number}", media_type="text/plain")


def ended(entry: TranscriptEntry) -> bool:
    return entry.HasField("end_time")


@given(st.lists(st.tuples(st.text(min_size=1, max_size=3000), st.booleans()), max_size=20))
def test_no_character_is_lost_however_the_chunks_and_flushes_fall(chunks: list[tuple[str, bool]]) -> None:
    made = builder()
    states: dict[str, tuple[int, str]] = {}

    def flush() -> None:
        for entry in taken(made):
            revision, text = states.get(entry.id, (0, ""))
            assert entry.revision > revision
            assert entry.agent_message.text.startswith(text)
            states[entry.id] = (entry.revision, entry.agent_message.text)

    for text, flushed in chunks:
        made.update(chunk(text))
        if flushed:
            flush()
    made.seal_all(INTERRUPTED)
    flush()

    assert "".join(text for _, text in states.values()) == "".join(text for text, _ in chunks)
    assert all(len(text) <= ENTRY_CHARACTERS for _, text in states.values())


def test_the_parts_of_a_long_message_are_counted_and_share_an_id() -> None:
    made = builder()
    made.update(chunk("x" * (2 * ENTRY_CHARACTERS + 1)))
    parts = [entry.agent_message for entry in taken(made)]
    assert [part.part for part in parts] == [1, 2, 3]
    assert len({part.message_id for part in parts}) == 1


def test_another_id_of_the_agents_begins_another_message() -> None:
    made = builder()
    for text, message_id in (("a", "m1"), ("b", "m1"), ("c", "m2")):
        made.update(chunk(text, messageId=message_id))
    assert [entry.agent_message.text for entry in taken(made)] == ["ab", "c"]


def test_a_tool_call_between_two_messages_parts_them() -> None:
    made = builder()
    made.update(chunk("before"))
    made.update(calls(title="ls", status="in_progress"))
    made.update(chunk("after", "agent_thought_chunk"))

    first, second, third = taken(made)

    assert (first.agent_message.text, ended(first)) == ("before", True)
    assert (second.tool_call.title, ended(second)) == ("ls", False)
    assert (third.reasoning.text, ended(third)) == ("after", False)
    assert all(entry.actor.session_id == "ses_1" for entry in (first, second, third))


def test_a_tool_call_is_kept_with_all_that_is_said_of_it() -> None:
    made = builder()
    made.update(calls(title="Edit", kind="edit", rawInput={"path": "a.py", "lines": [1, 2]}))
    diff = {"type": "diff", "path": f"{ROOT}/a.py", "oldText": "a", "newText": "b"}
    link = {"type": "content", "content": {"type": "resource_link", "uri": "https://example.org", "name": "page"}}
    terminal = {"type": "terminal", "terminalId": "term_1"}
    made.update(
        changes(
            status="completed",
            content=[words("done"), diff, terminal, link],
            locations=[{"path": f"{ROOT}/a.py", "line": 7}, {"path": "/etc/passwd"}],
            rawOutput={"exit": 0},
        )
    )

    [entry] = taken(made)
    call = entry.tool_call

    assert (call.tool_call_id, call.title, call.kind) == ("c", "Edit", transcripts.TOOL_KIND_EDIT)
    assert (call.state, ended(entry)) == (transcripts.TOOL_CALL_STATE_SUCCEEDED, True)
    assert call.input["path"] == "a.py"
    assert call.raw_output["exit"] == 0
    assert [(place.path, place.line) for place in call.locations] == [("a.py", 7), ("/etc/passwd", 0)]
    said, changed, shown, page = call.outputs
    assert (said.text, shown.terminal_id, page.uri) == ("done", "term_1", "https://example.org")
    assert (changed.diff.path, changed.diff.old_text, changed.diff.new_text) == ("a.py", "a", "b")


def test_a_new_file_has_no_text_before() -> None:
    made = builder()
    made.update(calls(status="completed", content=[{"type": "diff", "path": "new.py", "newText": "b"}]))
    [entry] = taken(made)
    assert not entry.tool_call.outputs[0].diff.HasField("old_text")


def test_a_kind_that_is_not_known_is_another() -> None:
    made = builder()
    made.update(calls(kind="teleport"))
    made.update(calls("d"))
    assert [entry.tool_call.kind for entry in taken(made)] == [
        transcripts.TOOL_KIND_OTHER,
        transcripts.TOOL_KIND_UNSPECIFIED,
    ]


def test_what_is_said_of_a_call_after_its_end_is_kept_in_its_entry() -> None:
    made = builder()
    made.update(calls(status="failed", title="make"))
    taken(made)
    made.update(changes(status="in_progress", rawOutput={"exit": 2}))
    [entry] = taken(made)
    assert (entry.id, entry.revision) == ("ent_1_1", 2)
    assert (entry.tool_call.state, ended(entry)) == (transcripts.TOOL_CALL_STATE_FAILED, True)
    assert entry.tool_call.raw_output["exit"] == 2


def test_what_had_not_ended_is_marked_when_the_turn_breaks_off() -> None:
    made = builder()
    made.update(calls(title="ls", status="in_progress"))
    made.seal_all(INTERRUPTED)

    [entry] = taken(made)

    assert (entry.tool_call.state, ended(entry)) == (INTERRUPTED, True)


def test_long_output_keeps_its_end_and_is_stored_whole_once_its_call_has_ended() -> None:
    made = builder()
    text = "first\n" + "x" * TEXT_BYTES + "\nlast"
    made.update(calls(content=[words("first\n"), words(text)], status="in_progress"))
    assert not made.waiting  # it may grow

    made.update(changes(status="completed"))
    [entry] = taken(made)
    assert not ended(entry)
    cut = entry.tool_call.outputs[1]
    assert cut.text.endswith("last")
    assert len(cut.text) + cut.omitted_bytes == len(text)

    entry_id, draft = waiting(made)
    [whole] = draft.unstored
    assert whole.data == text.encode()
    made.stored(entry_id, [whole], [blob()])
    [entry] = taken(made)
    assert ended(entry)
    assert [output.WhichOneof("output") for output in entry.tool_call.outputs] == ["text", "text", "blob"]


def test_output_that_cannot_be_stored_stays_cut() -> None:
    made = builder()
    made.update(calls(content=[words("x" * (TEXT_BYTES + 1))], status="completed"))
    made.give_up_blobs()
    [entry] = taken(made)
    assert ended(entry)
    [output] = entry.tool_call.outputs
    assert (len(output.text), output.omitted_bytes) == (TEXT_BYTES, 1)


def test_of_what_is_longer_than_a_blob_the_end_is_stored_and_it_is_told_how_much_is_not() -> None:
    made = builder()
    made.update(calls(content=[words("abc" + "x" * WHOLE_BYTES)], status="completed"))
    entry_id, draft = waiting(made)
    [whole] = draft.unstored
    assert whole.data == b"x" * WHOLE_BYTES
    made.stored(entry_id, [whole], [blob()])
    cut, stored = taken(made)[0].tool_call.outputs
    assert (cut.omitted_bytes, stored.blob.blob_id) == (WHOLE_BYTES + 3 - TEXT_BYTES, "blob_1")
    assert stored.omitted_bytes == 3


def test_of_a_terminal_that_shows_more_than_is_kept_it_is_told_how_much_is_in_none() -> None:
    made = builder()
    for _ in range(3):
        made.update(changes(_meta={"terminal_output_delta": {"data": "x" * STREAM_BYTES}}))
    made.update(changes(status="completed"))
    entry_id, draft = waiting(made)
    [whole] = draft.unstored
    assert len(whole.data) == STREAM_BYTES
    made.stored(entry_id, [whole], [blob()])
    cut, stored = taken(made)[0].tool_call.outputs
    assert (cut.omitted_bytes, stored.omitted_bytes) == (3 * STREAM_BYTES - TEXT_BYTES, 2 * STREAM_BYTES)


def test_a_change_is_stored_whole_as_long_as_one_entrys_blobs_may_be() -> None:
    made = builder()
    half = WHOLE_BYTES // 2
    diff = {"type": "diff", "path": "a.txt", "oldText": "o" * half, "newText": "n" * half}
    made.update(calls(content=[diff], status="completed"))
    entry_id, draft = waiting(made)
    assert [len(whole.data) for whole in draft.unstored] == [half, half]
    made.stored(entry_id, draft.unstored, [None, blob(2)])
    _, after = taken(made)[0].tool_call.outputs
    assert (after.blob.blob_id, after.omitted_bytes) == ("blob_2", 0)


def test_a_change_of_which_one_entry_cannot_store_both_sides_stays_cut() -> None:
    made = builder()
    diff = {"type": "diff", "path": "a.txt", "oldText": "o" * WHOLE_BYTES, "newText": "n" * WHOLE_BYTES}
    made.update(calls(content=[diff], status="completed"))
    [entry] = taken(made)
    [output] = entry.tool_call.outputs
    assert ended(entry)
    assert output.omitted_bytes >= 2 * (WHOLE_BYTES - TEXT_BYTES)


def test_what_waits_to_be_stored_is_bounded_and_what_comes_then_is_shown_cut() -> None:
    made = builder()
    for number in range(5):
        text = words(str(number) * WHOLE_BYTES)
        made.update(calls(toolCallId=f"call_{number}", content=[text], status="completed"))
    assert len(made.waiting) == 4
    [cut] = [entry for entry in taken(made) if ended(entry)]
    assert cut.tool_call.tool_call_id == "call_4"


def test_a_picture_that_is_too_large_for_a_blob_is_told_with_its_size() -> None:
    size = WHOLE_BYTES + 1
    large = picture(b"x" * size)
    resource = {"type": "resource", "resource": {"blob": large["data"], "mimeType": "application/pdf"}}
    made = builder()
    shown = [{"type": "content", "content": large}, {"type": "content", "content": resource}]
    made.update(calls(content=shown, status="completed"))
    [entry] = taken(made)
    assert [(one.text, one.omitted_bytes) for one in entry.tool_call.outputs] == [
        (f"[image/png, {size} bytes]", size),
        (f"[application/pdf, {size} bytes]", size),
    ]
    for block in (large, resource):
        made.update({"sessionUpdate": "agent_message_chunk", "content": block})
    [entry] = taken(made)
    assert entry.agent_message.text == f"[image/png, {size} bytes][application/pdf, {size} bytes]"


def test_pictures_that_are_too_many_for_a_message_are_told_with_their_size() -> None:
    made = builder()
    for _ in range(MOST_WHOLES + 1):
        made.update({"sessionUpdate": "agent_message_chunk", "content": picture()})
    made.seal_all(INTERRUPTED)
    entry_id, draft = waiting(made)
    made.stored(entry_id, draft.unstored, [blob()] * MOST_WHOLES)
    [entry] = taken(made)
    assert (entry.agent_message.text, len(entry.agent_message.blobs)) == ("[image/png, 7 bytes]", MOST_WHOLES)


def test_a_picture_becomes_a_blob_or_stays_a_word() -> None:
    for stored in (True, False):
        made = builder()
        made.update(calls(content=[{"type": "content", "content": picture()}], status="completed"))
        entry_id, draft = waiting(made)
        [whole] = draft.unstored
        assert (whole.data, whole.media_type, whole.display_name) == (b"picture", "image/png", "image.png")
        made.stored(entry_id, [whole], [blob() if stored else None])
        [entry] = taken(made)
        [output] = entry.tool_call.outputs
        assert output.blob.blob_id == "blob_1" if stored else output.text == "[image/png, 7 bytes]"


def test_a_picture_in_a_message_is_kept_with_it() -> None:
    made = builder()
    made.update(chunk("Look: "))
    made.update({"sessionUpdate": "agent_message_chunk", "content": picture()})
    made.seal_all(INTERRUPTED)
    entry_id, draft = waiting(made)
    made.stored(entry_id, draft.unstored, [blob()])
    [entry] = taken(made)
    assert (entry.agent_message.text, [one.blob_id for one in entry.agent_message.blobs]) == ("Look: ", ["blob_1"])
    assert ended(entry)


def test_what_is_stored_too_late_is_dropped() -> None:
    made = builder()
    made.update(calls(content=[words("x" * (TEXT_BYTES + 1))], status="completed"))
    entry_id, draft = waiting(made)
    wholes = draft.unstored
    made.update(changes(content=[words("y" * (TEXT_BYTES + 2))]))
    made.stored(entry_id, wholes, [blob()])
    assert list(made.waiting) == [entry_id]
    made.stored(entry_id, draft.unstored, [blob(2)])
    [entry] = taken(made)
    assert entry.tool_call.outputs[1].blob.blob_id == "blob_2"


def test_what_a_terminal_of_the_agents_shows_is_put_together() -> None:
    made = builder()
    made.update(calls(status="in_progress", content=[{"type": "terminal", "terminalId": "t"}]))
    for data in ("a\n", "b\n"):
        made.update(changes(_meta={"terminal_output": {"terminal_id": "t", "data": data}}))
    made.update(changes(status="completed"))
    [entry] = taken(made)
    assert [output.text for output in entry.tool_call.outputs] == ["", "a\nb\n"]


def test_a_plan_is_kept_with_states_and_priorities() -> None:
    made = builder()
    steps = [
        {"content": "Read", "status": "completed", "priority": "high"},
        {"content": "Write", "status": "in_progress", "priority": "low"},
    ]
    made.update({"sessionUpdate": "plan", "entries": steps[:1]})
    made.update({"sessionUpdate": "plan", "entries": steps})
    [entry] = taken(made)
    assert [(step.text, step.state, step.priority) for step in entry.plan.steps] == [
        ("Read", transcripts.PLAN_STEP_STATE_COMPLETED, transcripts.PLAN_STEP_PRIORITY_HIGH),
        ("Write", transcripts.PLAN_STEP_STATE_RUNNING, transcripts.PLAN_STEP_PRIORITY_LOW),
    ]


def test_what_nobody_knows_is_kept_as_it_is() -> None:
    made = builder()
    made.update({"sessionUpdate": "hologram", "frames": [1, 2], "by": {"name": "x"}})
    [entry] = taken(made)
    assert entry.notice.kind == transcripts.NOTICE_KIND_UNKNOWN_UPDATE
    assert from_struct(entry.notice.update) == {"sessionUpdate": "hologram", "frames": [1, 2], "by": {"name": "x"}}
    assert ended(entry)


def test_what_is_no_news_is_passed_over() -> None:
    made = builder()
    for kind in ("available_commands_update", "user_message_chunk", "usage_update"):
        made.update({"sessionUpdate": kind, "content": {"type": "text", "text": "x"}})
    assert not taken(made)


def test_after_a_restart_what_waited_for_its_blobs_has_ended_without_them() -> None:
    made = builder()
    made.update(calls(content=[words("x" * (TEXT_BYTES + 1))], status="completed"))
    made.update(chunk("after"))
    kept = {draft.entry.id: draft for draft in made.take_changed()}

    again = TranscriptBuilder("ses_1", "task_1", 1, 2, Clock().timestamp, kept)

    [entry] = taken(again)
    assert (entry.id, ended(entry)) == ("ent_1_1", True)
    again.update(chunk(" it"))
    [entry] = taken(again)
    assert (entry.id, entry.agent_message.text) == ("ent_1_2", "after it")


def test_after_a_restart_a_call_that_runs_keeps_its_outputs() -> None:
    made = builder()
    made.update(calls(content=[words("so far")], status="in_progress"))
    kept = {draft.entry.id: draft for draft in made.take_changed()}
    again = TranscriptBuilder("ses_1", "task_1", 1, 1, Clock().timestamp, kept)
    again.update(changes(status="completed"))
    [entry] = taken(again)
    assert [output.text for output in entry.tool_call.outputs] == ["so far"]


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
_FIELDS = [
    *("toolCallId", "title", "kind", "status", "rawInput", "rawOutput", "content", "locations", "entries", "messageId"),
    *("plan", "currentModeId", "_meta", "type", "text", "data", "mimeType", "uri", "resource", "path", "oldText"),
    *("newText", "terminalId"),
]
_KINDS = [
    *("agent_message_chunk", "agent_thought_chunk", "tool_call", "tool_call_update"),
    *("plan", "plan_update", "nonesuch", "usage_update"),
]
_OBJECTS = st.dictionaries(st.sampled_from(_FIELDS), _JSON, max_size=6)
_NESTED = st.dictionaries(st.sampled_from(_FIELDS), _JSON | _OBJECTS | st.lists(_OBJECTS, max_size=3), max_size=6)
_SAID = st.dictionaries(st.sampled_from(_FIELDS), _JSON | _NESTED | st.lists(_NESTED, max_size=3), max_size=8)


@given(st.lists(st.tuples(st.sampled_from(_KINDS), _SAID), max_size=6))
def test_whatever_an_agent_says_makes_entries_that_the_contract_takes(said: list[tuple[str, dict[str, Any]]]) -> None:
    made = builder()
    for kind, fields in said:
        made.update({**clean(fields), "sessionUpdate": kind})
        for entry in taken(made):
            validate(entry)
    made.seal_all(INTERRUPTED)
    made.give_up_blobs()
    for entry in taken(made):
        validate(entry)
        assert ended(entry)


def test_the_largest_of_everything_stays_below_the_largest_entity() -> None:
    made = TranscriptBuilder("ses_1", "task_1", 1, 0, Timestamp)
    huge = "\u20ac" * 400_000
    content = [words(huge), {"type": "diff", "path": huge, "oldText": huge, "newText": huge}] * 40
    update = {
        "title": huge,
        "rawInput": {huge: huge, "list": [huge] * 50},
        "rawOutput": [{"deep": [[[[huge]]]]}] * 100,
        "content": content,
        "locations": [{"path": huge, "line": 1}] * 100,
    }
    made.update(calls(huge, **update))
    made.update({"sessionUpdate": "plan", "entries": [{"content": huge}] * 200})
    made.update({"sessionUpdate": "nonesuch", "what": huge})
    made.seal_all(INTERRUPTED)
    while made.waiting:
        entry_id, draft = next(iter(made.waiting.items()))
        made.stored(entry_id, draft.unstored, [blob()] * len(draft.unstored))
    for entry in taken(made):
        validate(entry)
        assert entry.ByteSize() <= ENTITY_BYTES
