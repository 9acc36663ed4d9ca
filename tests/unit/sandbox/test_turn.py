"""What an agent's events say of its turn."""

import json
from dataclasses import replace
from typing import Any

import pytest
from branchline.v1 import sessions_pb2
from branchline.v1 import transcripts_pb2 as transcripts
from branchline.v1.agents_pb2 import Agent, AgentMode
from branchline.v1.common_pb2 import FAILURE_REASON_AGENT_EXITED, FAILURE_REASON_AGENT_REFUSED, Actor
from branchline.v1.transcripts_pb2 import InputAnswer, InputRequest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from services.runtime.limits import ENTITY_BYTES
from services.runtime.validation import validate
from services.sandbox.agent_server import AgentEvent, Json
from services.sandbox.offers import Offer
from services.sandbox.reasons import exited
from services.sandbox.records import SessionRecord
from services.sandbox.structs import from_struct
from services.sandbox.transcript import TranscriptBuilder
from services.sandbox.turn import MARKS, PROMPT_POSTS, Turn
from services.sandbox.words import clean

RUNNING, WAITING = sessions_pb2.SESSION_STATE_RUNNING, sessions_pb2.SESSION_STATE_WAITING
ERROR = sessions_pb2.SESSION_STATE_FAILED
PENDING, ANSWERED = transcripts.INPUT_REQUEST_STATE_PENDING, transcripts.INPUT_REQUEST_STATE_ANSWERED


def turn(**given: Any) -> Turn:
    record = SessionRecord(
        session_id="ses_1",
        sandbox_id="sbx_1",
        task_id="task_1",
        organization_id="org_1",
        agent="mock",
        model="",
        mode="",
        generation=1,
        acp_session_id="acp",
        process="",
        ending=False,
        closing=False,
        entry_count=0,
        turn_time=0.0,
        cancel_turn=0,
        state=RUNNING,
        revision=1,
        last_event=0,
        turn=1,
        posts=0,
        prompt_rpc_id=0,
        mark=0,
        accepted=False,
    )
    record = replace(record, **given)
    return Turn(record, TranscriptBuilder("ses_1", "task_1", record.turn, 0, Timestamp), {})


def posted(**given: Any) -> Turn:
    """A turn whose prompt was posted behind event 5."""
    made = turn(last_event=5, **given)
    made.next_post(5)
    return made


def update(kind: str, **fields: Any) -> dict[str, Any]:
    return {"method": "session/update", "params": {"update": {"sessionUpdate": kind, **fields}}}


def says(text: str) -> dict[str, Any]:
    return update("agent_message_chunk", content={"type": "text", "text": text})


def asks(rpc_id: int) -> dict[str, Any]:
    options = [{"optionId": "allow", "name": "Allow", "kind": "allow_once"}]
    params = {"toolCall": {"toolCallId": "c", "title": "May I?", "kind": "execute"}, "options": options}
    return {"method": "session/request_permission", "id": rpc_id, "params": params}


def apply(to: Turn, *messages: dict[str, Any]) -> None:
    for message in messages:
        to.apply(AgentEvent(to.last_event + 1, message))


def test_a_question_that_was_answered_is_shown_so_though_its_turn_ends_before_the_agent_is_known_to_have_it() -> None:
    made = posted()
    apply(made, asks(7))
    (request_id,) = made.open_questions
    answered = InputRequest(id=request_id, answer=InputAnswer(option_id="allow"), answered_by=Actor(user_id="usr_1"))
    made.answers[request_id] = answered

    apply(made, {"id": made.rpc_id, "result": {"stopReason": "end_turn"}})
    made.close()

    progress = made.take()
    [told] = [one.request for one in progress.asked]
    [shown] = [draft.entry for draft in progress.drafts]
    assert (told.state, told.answer.option_id, told.answered_by.user_id) == (ANSWERED, "allow", "usr_1")
    assert shown.input_request_id == request_id
    assert shown.HasField("end_time")


def test_a_request_for_permission_tells_the_call_and_what_its_options_mean() -> None:
    made = posted()
    apply(made, asks(7))
    [one] = made.take().asked
    request = one.request
    assert (request.session_id, request.task_id, request.organization_id) == ("ses_1", "task_1", "org_1")
    assert (request.permission.tool_call.title, request.permission.tool_call.kind) == (
        "May I?",
        transcripts.TOOL_KIND_EXECUTE,
    )
    assert [option.kind for option in request.permission.options] == [transcripts.PERMISSION_OPTION_KIND_ALLOW_ONCE]
    assert (request.state, request.revision, one.rpc_id) == (PENDING, 1, "7")


def test_an_agents_question_with_a_form_waits_for_an_answer_and_one_that_is_no_form_is_refused() -> None:
    made = posted()
    schema = {"type": "object", "properties": {"name": {"type": "string"}}}
    form = {"mode": "form", "message": "Who?", "requestedSchema": schema}
    url = {"mode": "url", "message": "Go there", "url": "https://example.org"}
    apply(
        made,
        {"method": "elicitation/create", "id": 8, "params": form},
        {"method": "elicitation/create", "id": 9, "params": url},
    )
    [one] = made.take().asked
    assert (one.request.question.text, one.request.question.schema["type"]) == ("Who?", "object")
    assert made.state == WAITING
    assert made.not_understood == ["9"]


def test_the_end_of_a_turn_tells_why_with_the_commit_and_the_tokens() -> None:
    made = posted()
    usage = {"inputTokens": 10, "outputTokens": 5, "totalTokens": 15}
    apply(made, {"id": 1001, "result": {"stopReason": "max_tokens", "usage": usage}})
    made.close()
    told = made.told_end("a" * 40)
    assert (told.reason, told.head_commit) == (transcripts.STOP_REASON_MAX_TOKENS, "a" * 40)
    assert (told.usage.input_tokens, told.usage.output_tokens, told.usage.total_tokens) == (10, 5, 15)
    [draft] = made.take().drafts
    assert draft.entry.turn_end == told
    assert draft.entry.HasField("end_time")


def test_a_reason_that_is_not_known_ends_the_turn_and_is_kept() -> None:
    made = posted()
    apply(made, {"id": 1001, "result": {"stopReason": "lunch"}})
    assert made.end is not None
    assert made.end.reason == transcripts.STOP_REASON_END_TURN
    [draft] = made.take().drafts
    assert draft.entry.notice.kind == transcripts.NOTICE_KIND_UNKNOWN_UPDATE
    assert draft.entry.notice.update["stopReason"] == "lunch"


def test_a_turn_that_was_cancelled_is_told_so_whatever_its_agent_says() -> None:
    made = posted()
    made.cancelled = True
    apply(made, update("tool_call", toolCallId="1", title="make"), {"id": 1001, "result": {"stopReason": "end_turn"}})
    made.close()
    assert made.end is not None
    assert made.end.reason == transcripts.STOP_REASON_CANCELLED
    [draft] = made.take().drafts
    assert draft.entry.tool_call.state == transcripts.TOOL_CALL_STATE_CANCELLED


def test_another_mode_is_told_by_its_name_once() -> None:
    made = posted()
    made.offer = Offer(Agent(modes=[AgentMode(id="plan", display_name="Plan only")]), mode="code")
    apply(
        made, update("current_mode_update", currentModeId="plan"), update("current_mode_update", currentModeId="plan")
    )
    progress = made.take()
    [draft] = progress.drafts
    assert draft.entry.notice.kind == transcripts.NOTICE_KIND_MODE_CHANGED
    assert "Plan only" in draft.entry.notice.text
    assert progress.offer is not None
    assert progress.offer.mode == "plan"


def test_another_model_is_told_when_a_config_option_says_so() -> None:
    made = posted()
    made.offer = Offer(Agent(), model="steady")
    option = {"id": "model", "category": "model", "currentValue": "swift", "options": [{"value": "swift"}]}
    apply(made, update("config_option_update", configOptions=[option]))
    progress = made.take()
    [draft] = progress.drafts
    assert draft.entry.notice.kind == transcripts.NOTICE_KIND_MODEL_CHANGED
    assert not made.accepted
    assert progress.offer is not None
    assert [model.id for model in progress.offer.agent.models] == ["swift"]  # as it lists them now


def test_the_largest_question_stays_below_the_largest_entity() -> None:
    made = posted()
    huge = "\u20ac" * 300_000
    content = [{"type": "content", "content": {"type": "text", "text": huge}}] * 90
    call = {"title": huge, "rawInput": {"x": huge}, "content": content, "locations": [{"path": huge}] * 90}
    options = [{"optionId": f"o{number}", "name": huge} for number in range(90)]
    apply(made, {"method": "session/request_permission", "id": 1, "params": {"toolCall": call, "options": options}})
    [one] = made.take().asked
    validate(one.request)
    assert one.request.ByteSize() <= ENTITY_BYTES


@pytest.mark.parametrize(
    "message",
    [
        {"id": 1, "result": {}},
        {"id": 2, "result": {"sessionId": "acp"}},
        {"id": 3, "error": {"message": "no"}},
        {"id": MARKS + 7, "result": None},
        update("available_commands_update", availableCommands=[]),
        update("current_mode_update", currentModeId="ask"),
        update("usage_update", used=100, size=1000),
        update("nobody_knows_this", what="it is"),
        {"method": "_vendor/telemetry", "params": {}},
        {"method": "fs/write_text_file", "id": 9, "params": {}},
    ],
)
def test_what_no_prompt_causes_does_not_show_that_the_prompt_arrived(message: dict[str, Any]) -> None:  # F1
    made = posted()
    apply(made, message)
    assert not made.accepted
    assert made.end is None


@pytest.mark.parametrize(
    "message",
    [
        says("hi"),
        update("agent_thought_chunk", content={"type": "text", "text": "hm"}),
        update("tool_call", toolCallId="1", title="ls"),
        update("plan", entries=[]),
        asks(1),
        {"id": 1001, "result": {"stopReason": "end_turn"}},
        {"method": "_branchline/agent_exited", "params": {"code": 1}},
    ],
)
def test_what_only_a_prompt_causes_shows_that_it_arrived(message: dict[str, Any]) -> None:  # F1
    made = posted()
    apply(made, message)
    assert made.accepted


def test_what_is_said_before_the_mark_says_nothing_about_the_prompt() -> None:  # F1
    made = turn(last_event=3, prompt_rpc_id=1001, posts=1, mark=5)  # read again after a restart
    apply(made, says("trailing"), says("trailing"))
    assert not made.accepted
    apply(made, says("new"))
    assert made.accepted


def test_the_answer_to_an_earlier_post_does_not_end_the_turn() -> None:  # F28
    made = posted()
    made.next_post(5)
    apply(made, {"id": 1001, "result": {"stopReason": "cancelled"}})
    assert made.end is None
    apply(made, {"id": 1002, "result": {"stopReason": "end_turn"}})
    assert made.end is not None


def test_the_answer_to_a_prompt_that_is_withdrawn_does_not_end_the_turn() -> None:  # F28
    made = posted()
    made.withdrawing = True
    apply(made, {"id": 1001, "result": {"stopReason": "cancelled"}})
    assert made.withdrawn
    assert made.end is None


def test_an_agent_that_goes_before_it_had_the_prompt_is_replaced_and_only_so_often() -> None:  # F28
    made = posted()
    made.agent_gone(exited("gone"))
    assert made.lost is not None
    assert made.lost.reason == FAILURE_REASON_AGENT_EXITED
    assert made.end is None
    often = posted(posts=PROMPT_POSTS - 1)
    often.agent_gone(exited("gone"))
    assert often.end is not None
    assert often.end.state == ERROR


def test_an_error_of_the_agent_ends_the_turn_and_the_agent() -> None:  # F5
    made = posted()
    apply(made, {"id": 1001, "error": {"message": "overloaded", "data": {"agentStderr": "it said why", "code": 7}}})
    assert made.end is not None
    assert (made.end.state, made.end.end_agent) == (ERROR, True)
    assert made.end.failure is not None
    assert made.end.failure.reason == FAILURE_REASON_AGENT_REFUSED
    assert 'overloaded: {"code": 7}' in made.end.failure.message
    assert made.end.failure.output_tail == "it said why"


def test_the_session_waits_while_any_question_is_open() -> None:  # F26
    made = posted()
    apply(made, asks(1), asks(2))
    first, second = made.open_questions
    assert made.take().state == WAITING
    made.settle(first, ANSWERED)
    assert made.take().state == WAITING
    made.settle(second, ANSWERED)
    progress = made.take()
    assert progress.state == RUNNING
    assert [(one.request.id, one.request.state, one.request.revision) for one in progress.asked] == [
        (second, ANSWERED, 2)
    ]


def test_silence_is_explained_by_a_tool_call_or_a_question() -> None:
    made = posted()
    assert not made.busy
    apply(made, update("tool_call", toolCallId="1", title="make", status="in_progress"))
    assert made.busy
    apply(made, update("tool_call_update", toolCallId="1", status="completed"))
    assert not made.busy
    apply(made, asks(1))
    assert made.busy


def test_what_is_lost_is_counted_once_the_prompt_is_out() -> None:  # F19
    before, after = turn(), posted()
    before.lose(3)
    after.lose(3)
    assert not before.take().drafts
    assert [draft.entry.notice.kind for draft in after.take().drafts] == [transcripts.NOTICE_KIND_EVENTS_LOST]


def test_what_an_earlier_turn_left_open_is_closed() -> None:
    builder = TranscriptBuilder("ses_1", "task_1", 1, 0, Timestamp)
    builder.update({"sessionUpdate": "tool_call", "toolCallId": "1", "title": "make"})
    made = Turn(turn(turn=2).record, TranscriptBuilder("ses_1", "task_1", 2, 1, Timestamp, dict(builder.open)), {})
    [draft] = made.take().drafts
    assert draft.entry.tool_call.state == transcripts.TOOL_CALL_STATE_INTERRUPTED
    assert draft.entry.HasField("end_time")


def test_a_request_that_nobody_here_answers_is_remembered_to_be_refused() -> None:
    made = posted()
    apply(made, {"method": "fs/write_text_file", "id": "w-1", "params": {}})
    assert made.not_understood == ['"w-1"']


END_OF_PROMPT: dict[str, Any] = {"id": 1, "result": {}}
_MESSAGES = st.lists(
    st.one_of(
        st.text(min_size=1, max_size=20).map(says),
        st.integers(1, 5).map(asks),
        st.just(update("usage_update")),
        st.just(END_OF_PROMPT),
    ),
    max_size=30,
)


@given(_MESSAGES, st.data())
def test_events_that_come_again_after_a_break_change_nothing(
    messages: list[dict[str, Any]], data: st.DataObject
) -> None:
    once, again = posted(), posted()
    events = [AgentEvent(6 + place, message) for place, message in enumerate(messages)]
    for event in events:
        once.apply(event)
    place = 0
    while place < len(events):
        again.apply(events[place])
        place += 1
        if data.draw(st.booleans()) and place:
            back = data.draw(st.integers(0, place))
            for event in events[back:place]:
                again.apply(event)
    shown = [[draft.entry for draft in made.take().drafts] for made in (once, again)]
    assert shown[0] == shown[1]
    assert (once.accepted, once.last_event) == (again.accepted, again.last_event)


_ANY: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def _objects(*names: str, **kinds: st.SearchStrategy[Any]) -> st.SearchStrategy[Json]:
    """Objects with some of these members, of which each may be anything."""
    fields = {**dict.fromkeys(names, _ANY), **{name: _ANY | kind for name, kind in kinds.items()}}
    return st.fixed_dictionaries({}, optional=fields)


def _words(*known: str) -> st.SearchStrategy[str]:
    return st.sampled_from(known)


_USAGE = _objects("inputTokens", "outputTokens", "totalTokens")
_META = _objects(usage=_USAGE, terminal_output=_objects("data"))
_BLOCK = _objects(
    "text", "data", "mimeType", "uri", "resource", type=_words("text", "image", "resource", "resource_link")
)
_OUTPUT = _objects(
    "path", "oldText", "newText", "terminalId", type=_words("content", "diff", "terminal"), content=_BLOCK
)
_CALL = {
    "locations": st.lists(_objects("path", "line"), max_size=2),
    "content": _BLOCK | st.lists(_OUTPUT, max_size=3),
    "status": _words("pending", "completed"),
    "_meta": _META,
}
_OPTION = _objects("id", "category", "currentValue", options=st.lists(_objects("value", "name", "options"), max_size=2))
_KINDS = _words(
    "agent_message_chunk",
    "tool_call",
    "tool_call_update",
    "plan",
    "plan_update",
    "current_mode_update",
    "config_option_update",
    "usage_update",
)
_UPDATE = _objects(
    *("toolCallId", "title", "kind", "rawInput", "rawOutput", "messageId", "currentModeId", "used"),
    sessionUpdate=_KINDS,
    entries=st.lists(_objects("content", "status", "priority"), max_size=2),
    plan=_objects("entries"),
    configOptions=st.lists(_OPTION, max_size=2),
    **_CALL,
)
_REQUEST = _objects(
    "message",
    toolCall=_objects("toolCallId", "title", "kind", "rawInput", **_CALL),
    options=st.lists(_objects("optionId", "name", "kind"), max_size=2),
    mode=st.just("form"),
    requestedSchema=_objects("type", "properties"),
)
_SAID: st.SearchStrategy[Json] = st.one_of(
    st.fixed_dictionaries(
        {"method": st.just("session/update"), "params": st.fixed_dictionaries({"update": _UPDATE | _ANY}) | _ANY}
    ),
    st.fixed_dictionaries(
        {
            "method": _words("session/request_permission", "elicitation/create", "fs/read_text_file") | _ANY,
            "params": _REQUEST | _ANY,
        },
        optional={"id": _ANY},
    ),
    st.fixed_dictionaries({"id": _ANY, "result": _ANY}),
)
_ENDS: st.SearchStrategy[Json] = st.one_of(
    st.fixed_dictionaries({"result": _objects("stopReason", usage=_USAGE) | _ANY}),
    st.fixed_dictionaries({"error": _objects("code", "message", "data") | _ANY}),
)


@given(st.lists(_SAID, max_size=6), _ENDS)
def test_whatever_json_an_agent_says_is_understood_or_shown_and_the_turn_ends(said: list[Json], end: Json) -> None:
    made = posted()
    apply(made, *(clean(one) for one in said))
    assert made.end is None
    apply(made, clean({"id": made.rpc_id, **end}))
    assert made.end is not None
    made.close()
    made.told_end("")
    progress = made.take()
    for message in (*(draft.entry for draft in progress.drafts), *(one.request for one in progress.asked)):
        message.ByteSize()
    json.dumps(made.not_understood)


@pytest.mark.parametrize(
    "sent",
    [
        {"sessionUpdate": ["x"]},
        {"sessionUpdate": {"a": 1}},
        {"sessionUpdate": None},
        {},
        ["x"],
        "words",
    ],
)
def test_an_update_of_no_kind_is_a_notice_that_holds_it(sent: Any) -> None:
    made = posted()
    apply(made, {"method": "session/update", "params": {"update": sent}}, says("on"))
    notice, words = (draft.entry for draft in made.take().drafts)
    assert notice.notice.kind == transcripts.NOTICE_KIND_UNKNOWN_UPDATE
    assert from_struct(notice.notice.update) in (sent, {"update": sent})
    assert words.agent_message.text == "on"
    assert made.end is None


def test_what_breaks_while_it_is_read_is_a_notice_and_what_waits_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise TypeError

    made = posted()
    monkeypatch.setattr(TranscriptBuilder, "update", broken)
    monkeypatch.setattr(TranscriptBuilder, "call_of", broken)
    monkeypatch.setattr(Turn, "_take_answer", broken)
    apply(made, says("on"), asks(7))
    assert made.not_understood == ["7"]
    assert made.end is None
    apply(made, {"id": made.rpc_id, "result": {}})
    assert [draft.entry.notice.kind for draft in made.take().drafts] == [transcripts.NOTICE_KIND_UNKNOWN_UPDATE] * 3
    assert made.end is not None
    assert made.end.failure is not None


def test_true_is_no_line_and_no_count_of_tokens() -> None:
    made = posted()
    apply(made, update("tool_call", toolCallId="c", locations=[{"path": "a", "line": True}, {"path": "b", "line": 7}]))
    apply(made, {"id": made.rpc_id, "result": {"usage": {"inputTokens": True, "outputTokens": 5}}})
    [call] = [draft.entry.tool_call for draft in made.take().drafts]
    assert [one.line for one in call.locations] == [0, 7]
    assert (made.usage.input_tokens, made.usage.output_tokens) == (0, 5)
