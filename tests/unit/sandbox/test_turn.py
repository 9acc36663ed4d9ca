"""What an agent's events say of its turn."""

from dataclasses import replace
from typing import Any

import pytest
from branchline.v1 import sessions_pb2
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from services.sandbox.agent_server import AgentEvent
from services.sandbox.sessions import Permission, SessionRecord
from services.sandbox.transcript import TranscriptBuilder
from services.sandbox.turn import MARKS, PROMPT_POSTS, Turn

RUNNING, WAITING = sessions_pb2.SESSION_STATUS_RUNNING, sessions_pb2.SESSION_STATUS_WAITING
IDLE, ERROR = sessions_pb2.SESSION_STATUS_IDLE, sessions_pb2.SESSION_STATUS_ERROR


def turn(**given: Any) -> Turn:
    record = SessionRecord(
        session_id="ses_1",
        sandbox_id="sbx_1",
        task_id="task_1",
        agent="mock",
        model="",
        generation=1,
        acp_session_id="acp",
        process="",
        ending=False,
        closing=False,
        entry_count=0,
        turn_time=0.0,
        cancel_turn=0,
        status=RUNNING,
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
    params = {"toolCall": {"title": "May I?"}, "options": [{"optionId": "allow", "name": "Allow"}]}
    return {"method": "session/request_permission", "id": rpc_id, "params": params}


def apply(to: Turn, *messages: dict[str, Any]) -> None:
    for message in messages:
        to.apply(AgentEvent(to.last_event + 1, message))


def test_a_question_that_was_answered_is_shown_so_though_its_turn_ends_before_the_agent_is_known_to_have_it() -> None:
    made = posted()
    apply(made, asks(7))
    (entry_id,) = made.open_questions
    made.answers[entry_id] = Permission(entry_id, "7", "allow", "usr_1")

    apply(made, {"id": made.rpc_id, "result": {"stopReason": "end_turn"}})
    made.close()

    (shown,) = [draft.entry for draft in made.take().drafts if draft.entry.id == entry_id]
    assert (shown.state, shown.user_id, shown.streaming) == ("answered: allow", "usr_1", False)


@pytest.mark.parametrize(
    "message",
    [
        {"id": 1, "result": {}},
        {"id": 2, "result": {"sessionId": "acp"}},
        {"id": 3, "error": {"message": "no"}},
        {"id": MARKS + 7, "result": None},
        update("available_commands_update", availableCommands=[]),
        update("current_mode_update", currentModeId="ask"),
        update("usage_update"),
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
    made.agent_gone("gone")
    assert made.lost
    assert made.end is None
    often = posted(posts=PROMPT_POSTS - 1)
    often.agent_gone("gone")
    assert often.end is not None
    assert often.end.status == ERROR


def test_an_error_of_the_agent_ends_the_turn_and_the_agent() -> None:  # F5
    made = posted()
    apply(made, {"id": 1001, "error": {"message": "overloaded"}})
    assert made.end is not None
    assert (made.end.status, made.end.end_agent) == (ERROR, True)
    assert "overloaded" in made.end.reason


def test_the_session_waits_while_any_question_is_open() -> None:  # F26
    made = posted()
    apply(made, asks(1), asks(2))
    first, second = made.open_questions
    assert made.take().status == WAITING
    made.settle(first, "answered: allow", "usr_1")
    assert made.take().status == WAITING
    made.settle(second, "answered: allow", "usr_1")
    progress = made.take()
    assert progress.status == RUNNING
    assert progress.settled == (second,)


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
    assert [draft.entry.state for draft in after.take().drafts] == ["messages_lost"]


def test_what_an_earlier_turn_left_open_is_closed() -> None:
    builder = TranscriptBuilder("ses_1", "task_1", 1, 0, Timestamp)
    builder.update({"sessionUpdate": "tool_call", "toolCallId": "1", "title": "make"})
    made = Turn(turn(turn=2).record, TranscriptBuilder("ses_1", "task_1", 2, 1, Timestamp, dict(builder.open)), {})
    [draft] = made.take().drafts
    assert (draft.entry.state, draft.entry.streaming) == ("interrupted", False)


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
