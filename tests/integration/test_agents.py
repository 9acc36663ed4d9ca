"""What agents say, ask and are given, and what goes wrong with them."""

import asyncio
from collections.abc import Awaitable
from dataclasses import replace

import grpc
import pytest
from branchline.v1 import common_pb2, sessions_pb2, tasks_pb2, transcripts_pb2
from branchline.v1.common_pb2 import Consistency, Prompt
from branchline.v1.sessions_pb2 import WHEN_BUSY_INTERRUPT, WHEN_BUSY_QUEUE, WHEN_BUSY_REFUSE, SessionOptions
from branchline.v1.tasks_pb2 import Task
from branchline.v1.transcripts_pb2 import InputAnswer, InputRequest, ToolCall, TranscriptEntry
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct

from tests.support.client import Client
from tests.support.stack import Stack, eventually, failure, failure_of, request_id

FAILED = tasks_pb2.TASK_STATE_FAILED
AT_REST, RUNNING = tasks_pb2.TASK_ACTIVITY_IDLE, tasks_pb2.TASK_ACTIVITY_RUNNING
WAITING, TURN_FAILED = tasks_pb2.TASK_ACTIVITY_WAITING, tasks_pb2.TASK_ACTIVITY_FAILED


async def asked(stack: Stack, task: Task) -> InputRequest:
    """Return what the task's agent waits for."""
    await stack.until(task.id, activity=WAITING)

    async def look() -> InputRequest | None:
        found = await inputs(stack, task)
        return found[0] if found else None

    return await eventually(look)


async def inputs(
    stack: Stack, task: Task, *states: transcripts_pb2.InputRequestState.ValueType, token: str = ""
) -> list[InputRequest]:
    """Return the input requests of a task in some states, PENDING if none is named."""
    request = sessions_pb2.ListInputRequestsRequest(
        organization_id=stack.organization_id,
        task_ids=[task.id],
        states=states,
        consistency=Consistency(at_least_as_fresh=[token]) if token else None,
    )
    return list((await stack.client.sessions.ListInputRequests(request)).input_requests)


def answering(
    client: Client, asks: InputRequest, answer: InputAnswer
) -> Awaitable[sessions_pb2.AnswerInputRequestResponse]:
    return client.sessions.AnswerInputRequest(
        sessions_pb2.AnswerInputRequestRequest(
            request_id=request_id(), task_id=asks.task_id, input_request_id=asks.id, answer=answer
        )
    )


async def cancel(stack: Stack, task: Task) -> None:
    session = await stack.session(task.id)
    await stack.client.sessions.CancelTurn(
        sessions_pb2.CancelTurnRequest(
            request_id=request_id(), task_id=task.id, session_id=session.id, turn=session.turn
        )
    )


async def queue(stack: Stack, task: Task, token: str = "") -> list[sessions_pb2.QueuedMessage]:
    request = sessions_pb2.ListQueuedMessagesRequest(
        task_id=task.id, consistency=Consistency(at_least_as_fresh=[token]) if token else None
    )
    return list((await stack.client.sessions.ListQueuedMessages(request)).queued_messages)


def users_words(entries: list[TranscriptEntry]) -> list[str]:
    return [entry.user_message.text for entry in entries if entry.HasField("user_message")]


def agents_words(entries: list[TranscriptEntry]) -> str:
    return "".join(entry.agent_message.text for entry in entries)


def tool_calls(entries: list[TranscriptEntry]) -> list[ToolCall]:
    return [entry.tool_call for entry in entries if entry.HasField("tool_call")]


async def test_what_an_agent_says_is_kept_whole(stack: Stack) -> None:  # SES-4
    task = await stack.ready_task()
    await stack.send(
        task,
        "think it over\nplan high doing read it; todo write it\nwrite a.txt: alpha\nwrite a.txt: beta\nrun echo out\n"
        'usage 10 20\nmode plan\nupdate {"sessionUpdate": "telepathy", "waves": 3}\nsay fine',
    )
    await stack.until(task.id, activity=AT_REST, turn=1)

    entries = await stack.transcript(task)
    reasoning = "".join(entry.reasoning.text for entry in entries)
    plans = [entry.plan for entry in entries if entry.HasField("plan")]
    first, second, ran = tool_calls(entries)
    notices = [entry.notice for entry in entries if entry.HasField("notice")]
    assert reasoning == "it over"
    assert [(step.text, step.state) for step in plans[-1].steps] == [
        ("read it", transcripts_pb2.PLAN_STEP_STATE_RUNNING),
        ("write it", transcripts_pb2.PLAN_STEP_STATE_PENDING),
    ]
    assert (first.kind, ran.kind) == (transcripts_pb2.TOOL_KIND_EDIT, transcripts_pb2.TOOL_KIND_EXECUTE)
    assert [place.path for place in first.locations] == ["a.txt"]
    assert (second.outputs[0].diff.old_text.strip(), second.outputs[0].diff.new_text.strip()) == ("alpha", "beta")
    assert not first.outputs[0].diff.HasField("old_text")
    assert "echo out" in str(MessageToDict(ran.input))
    assert ran.outputs[0].text.strip() == "out"
    kinds = [notice.kind for notice in notices]
    assert kinds == [transcripts_pb2.NOTICE_KIND_MODE_CHANGED, transcripts_pb2.NOTICE_KIND_UNKNOWN_UPDATE]
    assert MessageToDict(notices[-1].update)["waves"] == 3
    end = entries[-1].turn_end
    assert end.reason == transcripts_pb2.STOP_REASON_END_TURN
    assert (end.usage.input_tokens, end.usage.output_tokens, end.usage.total_tokens) == (10, 20, 30)


async def test_a_message_to_a_working_session_is_refused_or_queued(stack: Stack) -> None:  # SES-3
    task = await stack.ready_task()
    await stack.send(task, "wait 2\nsay first")

    refused = await failure(stack.send(task, "say impatient", when_busy=WHEN_BUSY_REFUSE))
    queued = await stack.send(task, "say second", when_busy=WHEN_BUSY_QUEUE)
    waits = await queue(stack, task, queued.consistency_token)
    await stack.until(task.id, activity=AT_REST, turn=2)

    entries = await stack.transcript(task)
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "SESSION_WORKING")
    assert [(one.id, one.place) for one in waits] == [(queued.queued_message.id, 1)]
    assert users_words(entries) == ["wait 2\nsay first", "say second"]
    assert agents_words(entries) == "first\nDone.\nsecond\nDone.\n"
    assert await queue(stack, task) == []


async def test_what_waits_is_edited_moved_and_taken_back_on_what_its_editor_knew(stack: Stack) -> None:  # SES-3
    task = await stack.ready_task()
    await stack.send(task, "wait 60")
    await stack.until(task.id, activity=RUNNING)
    first, second, third = [
        (await stack.send(task, f"say {text}")).queued_message for text in ("first", "second", "third")
    ]

    def edit(text: str) -> Awaitable[sessions_pb2.UpdateQueuedMessageResponse]:
        message = sessions_pb2.QueuedMessage(id=second.id, task_id=task.id, prompt=Prompt(text=text), etag=second.etag)
        return stack.client.sessions.UpdateQueuedMessage(
            sessions_pb2.UpdateQueuedMessageRequest(
                request_id=request_id(), queued_message=message, update_mask=FieldMask(paths=["prompt"])
            )
        )

    edited = await edit("say other")
    late = await failure(edit("say stale"))
    await stack.client.sessions.UpdateQueuedMessage(
        sessions_pb2.UpdateQueuedMessageRequest(
            request_id=request_id(),
            queued_message=sessions_pb2.QueuedMessage(id=third.id, task_id=task.id, place=1),
            update_mask=FieldMask(paths=["place"]),
        )
    )
    taken = await stack.client.sessions.DeleteQueuedMessage(
        sessions_pb2.DeleteQueuedMessageRequest(request_id=request_id(), task_id=task.id, queued_message_id=first.id)
    )
    waits = await queue(stack, task, taken.consistency_token)
    await cancel(stack, task)
    await stack.until(task.id, activity=AT_REST, turn=3)

    assert edited.queued_message.etag != second.etag
    assert (late.code, late.reason) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
    assert [(one.prompt.text, one.place) for one in waits] == [("say third", 1), ("say other", 2)]
    assert users_words(await stack.transcript(task)) == ["wait 60", "say third", "say other"]


async def test_a_message_that_interrupts_ends_the_turn_and_is_next(stack: Stack) -> None:  # SES-3
    task = await stack.ready_task()
    await stack.send(task, "wait 60")
    await stack.until(task.id, activity=RUNNING)
    await stack.send(task, "say patient")

    await stack.send(task, "say urgent", when_busy=WHEN_BUSY_INTERRUPT)
    await stack.until(task.id, activity=AT_REST, turn=3)

    entries = await stack.transcript(task)
    ends = [entry.turn_end.reason for entry in entries if entry.HasField("turn_end")]
    assert users_words(entries) == ["wait 60", "say urgent", "say patient"]
    assert ends == [
        transcripts_pb2.STOP_REASON_CANCELLED,
        transcripts_pb2.STOP_REASON_END_TURN,
        transcripts_pb2.STOP_REASON_END_TURN,
    ]


async def test_what_is_taken_back_as_its_turn_comes_is_said_or_taken_back_and_not_both(stack: Stack) -> None:  # SES-3
    task = await stack.ready_task()
    await stack.send(task, "wait 60")
    await stack.until(task.id, activity=RUNNING)
    waits = (await stack.send(task, "say perhaps")).queued_message
    request = sessions_pb2.DeleteQueuedMessageRequest(
        request_id=request_id(), task_id=task.id, queued_message_id=waits.id
    )

    outcomes = await asyncio.gather(
        cancel(stack, task), stack.client.sessions.DeleteQueuedMessage(request), return_exceptions=True
    )
    late = isinstance(outcomes[1], grpc.aio.AioRpcError)
    await stack.until(task.id, activity=AT_REST, turn=2 if late else 1)

    said = users_words(await stack.transcript(task))
    other = await failure(
        stack.client.sessions.DeleteQueuedMessage(
            sessions_pb2.DeleteQueuedMessageRequest(task_id=task.id, queued_message_id=waits.id)
        )
    )
    assert said == (["wait 60", "say perhaps"] if late else ["wait 60"])
    assert (other.code, other.reason) == (grpc.StatusCode.NOT_FOUND, "RESOURCE_NOT_FOUND")
    assert await queue(stack, task) == []


async def test_of_two_that_interrupt_at_once_both_are_said(stack: Stack) -> None:  # SES-3
    task = await stack.ready_task()
    await stack.send(task, "wait 60")
    await stack.until(task.id, activity=RUNNING)

    await asyncio.gather(*(stack.send(task, f"say {text}", when_busy=WHEN_BUSY_INTERRUPT) for text in ("one", "other")))
    await stack.until(task.id, activity=AT_REST, turn=3)

    assert sorted(users_words(await stack.transcript(task))) == ["say one", "say other", "wait 60"]
    assert await queue(stack, task) == []


async def test_a_message_interrupts_an_agent_that_waits_for_an_answer(stack: Stack) -> None:  # SES-3, SES-5
    task = await stack.ready_task()
    await stack.send(task, "ask May I?")
    asks = await asked(stack, task)

    await stack.send(task, "say never mind", when_busy=WHEN_BUSY_INTERRUPT)
    await stack.until(task.id, activity=AT_REST, turn=2)
    late = await failure(answering(stack.client, asks, InputAnswer(option_id="allow")))

    assert users_words(await stack.transcript(task)) == ["ask May I?", "say never mind"]
    assert [one.id for one in await inputs(stack, task, transcripts_pb2.INPUT_REQUEST_STATE_CANCELLED)] == [asks.id]
    assert (late.code, late.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_LONGER_WAITING")


async def test_a_permission_is_answered_once_and_all_see_by_whom(stack: Stack) -> None:  # SES-5
    task = await stack.ready_task()
    other, other_id = await stack.new_member()
    await stack.send(task, "ask May I write?\nwrite a.txt: yes")
    asks = await asked(stack, task)

    answered = await answering(other, asks, InputAnswer(option_id="allow"))
    late = await failure(answering(stack.client, asks, InputAnswer(option_id="allow")))
    await stack.until(task.id, activity=AT_REST, turn=1)

    kinds = {option.id: option.kind for option in asks.permission.options}
    (after,) = await inputs(stack, task, transcripts_pb2.INPUT_REQUEST_STATE_ANSWERED, token=answered.consistency_token)
    shown = [entry for entry in await stack.transcript(task) if entry.HasField("input_request_id")]
    assert asks.permission.tool_call.title == "May I write?"
    assert kinds["allow"] == transcripts_pb2.PERMISSION_OPTION_KIND_ALLOW_ONCE
    assert (after.id, after.answer.option_id, after.answered_by.user_id) == (asks.id, "allow", other_id)
    assert [(entry.input_request_id, entry.id) for entry in shown] == [(asks.id, asks.entry_id)]
    assert shown[0].HasField("end_time")
    assert (late.code, late.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ALREADY_ANSWERED")
    assert late.metadata["answered_by"] == other_id


async def test_of_many_answers_at_once_one_wins_and_the_agent_hears_that_one(stack: Stack) -> None:  # SES-5
    task = await stack.ready_task()
    await stack.send(task, "ask May I write?\nwrite a.txt: yes")
    asks = await asked(stack, task)
    options = ["allow", "reject"] * 4

    outcomes = await asyncio.gather(
        *(answering(stack.client, asks, InputAnswer(option_id=option)) for option in options), return_exceptions=True
    )
    await stack.until(task.id, activity=AT_REST, turn=1)

    won = [option for option, outcome in zip(options, outcomes, strict=True) if not isinstance(outcome, Exception)]
    refused = [failure_of(outcome) for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError)]
    calls = tool_calls(await stack.transcript(task))
    wrote = [call for call in calls if call.kind == transcripts_pb2.TOOL_KIND_EDIT and call.outputs]
    assert len(won) == 1
    assert {(one.code, one.reason) for one in refused} == {(grpc.StatusCode.FAILED_PRECONDITION, "ALREADY_ANSWERED")}
    assert len({one.metadata["answered_by"] for one in refused}) == 1
    assert bool(wrote) == (won == ["allow"])


async def test_a_question_is_answered_with_its_form(stack: Stack) -> None:  # SES-5
    task = await stack.ready_task()
    await stack.send(task, "question Which colour?")
    asks = await asked(stack, task)
    form = Struct()
    form.update({"answer": "blue"})

    await answering(stack.client, asks, InputAnswer(form=form))
    await stack.until(task.id, activity=AT_REST, turn=1)

    assert asks.question.text == "Which colour?"
    assert MessageToDict(asks.question.schema)["required"] == ["answer"]
    assert "blue" in agents_words(await stack.transcript(task))


async def test_an_answer_that_was_not_offered_is_refused(stack: Stack) -> None:  # SES-5
    task = await stack.ready_task()
    await stack.send(task, "ask May I?")
    asks = await asked(stack, task)

    wrong = await failure(answering(stack.client, asks, InputAnswer(option_id="perhaps")))

    assert (wrong.code, wrong.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["answer.option_id"])


@pytest.mark.parametrize("words", ["wait 60", "ask May I?"])
async def test_a_turn_is_cancelled_while_the_agent_works_or_waits(stack: Stack, words: str) -> None:  # SES-3, SES-5
    task = await stack.ready_task()
    await stack.send(task, words)
    await stack.until(task.id, activity=WAITING if words.startswith("ask") else RUNNING)

    await cancel(stack, task)
    await stack.until(task.id, activity=AT_REST, turn=1)

    entries = await stack.transcript(task)
    states = [one.state for one in await inputs(stack, task, transcripts_pb2.INPUT_REQUEST_STATE_CANCELLED)]
    assert entries[-1].turn_end.reason == transcripts_pb2.STOP_REASON_CANCELLED
    assert len(states) == words.startswith("ask")
    assert all(entry.HasField("end_time") for entry in entries)
    assert await inputs(stack, task) == []


async def test_a_cancel_of_another_turn_stops_nothing(stack: Stack) -> None:  # SES-3
    task = await stack.ready_task()
    session = await stack.session(task.id)
    await stack.send(task, "wait 1\nsay whole")

    late = await failure(
        stack.client.sessions.CancelTurn(
            sessions_pb2.CancelTurnRequest(request_id=request_id(), task_id=task.id, session_id=session.id, turn=7)
        )
    )
    await stack.until(task.id, activity=AT_REST, turn=1)

    assert (late.code, late.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "SESSION_NOT_WORKING")
    assert agents_words(await stack.transcript(task)) == "whole\nDone.\n"


async def test_an_agent_that_dies_in_mid_turn_says_so_and_the_next_message_goes_on(stack: Stack) -> None:  # SES-8
    task = await stack.ready_task()
    await stack.send(task, "say before\nwait 0.3\ndie 7")

    await stack.until(task.id, activity=TURN_FAILED)
    failed = await stack.session(task.id)
    await stack.send(task, "say after")
    await stack.until(task.id, activity=AT_REST, turn=2)

    entries = await stack.transcript(task)
    assert failed.state == sessions_pb2.SESSION_STATE_FAILED
    assert failed.failure.reason == common_pb2.FAILURE_REASON_AGENT_EXITED
    assert failed.failure.message == "the agent ended with exit code 7 in mid-turn"
    assert agents_words(entries) == "before\nafter\nDone.\n"
    assert not (await stack.session(task.id)).HasField("failure")
    assert transcripts_pb2.NOTICE_KIND_AGENT_RESTARTED in {entry.notice.kind for entry in entries}


async def test_a_failed_turn_is_given_again_and_no_other(stack: Stack) -> None:  # SES-8
    task = await stack.ready_task()
    await stack.send(task, "run test -e flag && exit 0; touch flag; kill -9 $PPID")
    await stack.until(task.id, activity=TURN_FAILED)
    session = await stack.session(task.id)

    def retry(turn: int) -> Awaitable[sessions_pb2.RetryTurnResponse]:
        return stack.client.sessions.RetryTurn(
            sessions_pb2.RetryTurnRequest(request_id=request_id(), task_id=task.id, session_id=session.id, turn=turn)
        )

    other = await failure(retry(session.turn + 1))
    outcomes = await asyncio.gather(*(retry(session.turn) for _ in range(4)), return_exceptions=True)
    await stack.until(task.id, activity=AT_REST, turn=2)
    again = await failure(retry(2))

    refused = [failure_of(outcome) for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError)]
    assert (other.code, other.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "STATE_FORBIDS")
    assert sum(isinstance(outcome, sessions_pb2.RetryTurnResponse) for outcome in outcomes) == 1
    assert {(one.code, one.reason) for one in refused} == {(grpc.StatusCode.FAILED_PRECONDITION, "STATE_FORBIDS")}
    assert (await stack.session(task.id)).turn == 2
    assert (again.code, again.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "STATE_FORBIDS")


async def test_a_turn_that_the_agent_fails_ends_with_its_words(stack: Stack) -> None:  # SES-2
    task = await stack.ready_task()
    await stack.send(task, "fail the disk is on fire")

    await stack.until(task.id, activity=TURN_FAILED)

    session, entries = await stack.session(task.id), await stack.transcript(task)
    assert "the disk is on fire" in session.failure.message
    assert session.failure.reason == common_pb2.FAILURE_REASON_AGENT_REFUSED
    assert entries[-1].turn_end.reason == transcripts_pb2.STOP_REASON_FAILED
    assert entries[-1].turn_end.failure == session.failure


async def test_an_unknown_agent_names_those_that_exist_and_can_be_retried_with_another(stack: Stack) -> None:  # TSK-2
    fresh = replace(stack, organization_id=await stack.new_organization())  # nobody told it yet what there is
    options = SessionOptions(agent="nobody")
    task = await fresh.create_task(await fresh.add_repository(), session=options, hold_prompt=True)
    failed = await fresh.until(task.id, state=FAILED)

    await fresh.client.tasks.RetryProvisioning(
        tasks_pb2.RetryProvisioningRequest(
            request_id=request_id(), task_id=task.id, session=SessionOptions(agent="mock")
        )
    )
    await fresh.until(task.id, activity=AT_REST)

    assert failed.failure.reason == common_pb2.FAILURE_REASON_AGENT_UNKNOWN
    assert 'there is no agent "nobody"' in failed.failure.message
    assert "mock" in failed.failure.message


async def test_an_unknown_model_names_those_that_exist(stack: Stack) -> None:  # SES-6
    fresh = replace(stack, organization_id=await stack.new_organization())
    options = SessionOptions(agent="mock", model="giant")
    task = await fresh.create_task(await fresh.add_repository(), session=options, hold_prompt=True)

    failed = await fresh.until(task.id, state=FAILED)

    assert 'the agent has no model "giant"; there are: steady, swift' in failed.failure.message


@pytest.mark.parametrize("options", [SessionOptions(agent="nobody"), SessionOptions(agent="mock", model="giant")])
async def test_what_is_known_not_to_exist_is_refused_at_once(stack: Stack, options: SessionOptions) -> None:  # TSK-2
    ready = await stack.ready_task()

    refused = await failure(stack.create_task(ready.repository_id, session=options))

    field = "session.model" if options.model else "session.agent"
    assert (refused.code, refused.reason, refused.fields) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "AGENT_UNKNOWN",
        [field],
    )


async def test_a_second_session_with_an_unknown_agent_is_refused_at_once(stack: Stack) -> None:  # SES-1
    task = await stack.ready_task()

    refused = await failure(
        stack.client.sessions.CreateSession(
            sessions_pb2.CreateSessionRequest(
                request_id=request_id(), task_id=task.id, options=SessionOptions(agent="nobody")
            )
        )
    )

    assert (refused.code, refused.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["options.agent"])


async def test_a_long_message_runs_over_several_entries_and_loses_nothing(stack: Stack) -> None:  # SES-4
    task = await stack.ready_task(session=SessionOptions(model="swift"))
    line = "word " * 20
    await stack.send(task, f"repeat 1000 {line}")
    await stack.until(task.id, activity=AT_REST, turn=1)

    words = [entry.agent_message for entry in await stack.transcript(task) if entry.HasField("agent_message")]
    assert "".join(part.text for part in words) == "".join(f"{line.strip()} {n}\n" for n in range(1, 1001)) + "Done.\n"
    assert [part.part for part in words] == list(range(1, len(words) + 1))
    assert len(words) > 3
    assert len({part.message_id for part in words}) == 1
