"""What agents do, and what goes wrong with them."""

from collections.abc import Awaitable

import grpc
from branchline.client import Client
from branchline.v1 import sessions_pb2, tasks_pb2

from tests.support.stack import Stack, eventually, failure, request_id

IDLE, ERROR = tasks_pb2.TASK_STATUS_IDLE, tasks_pb2.TASK_STATUS_ERROR
RUNNING, WAITING = tasks_pb2.TASK_STATUS_RUNNING, tasks_pb2.TASK_STATUS_WAITING


async def test_a_message_to_a_working_session_is_refused_or_queued(stack: Stack) -> None:  # SES-3
    task = await stack.ready_task()
    await stack.send(task, "wait 2\nsay first")

    refused = await failure(stack.send(task, "say impatient"))
    queued = await stack.send(task, "say second", queue=True)
    await stack.until(task.id, IDLE, turn=2)

    said = [entry.text for entry in await stack.transcript(task)]
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "SESSION_WORKING")
    assert queued.state == "queued"
    assert said == ["wait 2\nsay first", "say second", "first\nDone.\n", "second\nDone.\n"]


async def test_a_permission_is_answered_once_and_all_see_by_whom(stack: Stack) -> None:  # SES-5
    task = await stack.ready_task()
    other, other_id = await stack.new_member()
    await stack.send(task, "ask May I write?\nwrite a.txt: yes")
    await stack.until(task.id, WAITING)
    entry = next(one for one in await stack.transcript(task) if one.options)

    def answer(client: Client) -> Awaitable[sessions_pb2.AnswerPermissionResponse]:
        return client.sessions.AnswerPermission(
            sessions_pb2.AnswerPermissionRequest(
                request_id=request_id(),
                task_id=task.id,
                session_id=task.sessions[0].id,
                entry_id=entry.id,
                option_id="allow",
            )
        )

    await answer(other)
    late = await failure(answer(stack.client))
    await stack.until(task.id, IDLE, turn=1)

    after = next(one for one in await stack.transcript(task) if one.options)
    assert (after.state, after.user_id, after.streaming) == ("answered: allow", other_id, False)
    assert late.reason == "ALREADY_ANSWERED"


async def test_an_answer_that_was_not_offered_is_refused(stack: Stack) -> None:  # SES-5
    task = await stack.ready_task()
    await stack.send(task, "ask May I?")
    await stack.until(task.id, WAITING)
    entry = next(one for one in await stack.transcript(task) if one.options)

    wrong = await failure(
        stack.client.sessions.AnswerPermission(
            sessions_pb2.AnswerPermissionRequest(
                request_id=request_id(),
                task_id=task.id,
                session_id=task.sessions[0].id,
                entry_id=entry.id,
                option_id="perhaps",
            )
        )
    )

    assert (wrong.code, wrong.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["option_id"])


async def test_a_turn_is_cancelled(stack: Stack) -> None:  # SES-3
    task = await stack.ready_task()
    await stack.send(task, "wait 60")
    await stack.until(task.id, RUNNING)

    await stack.client.sessions.CancelTurn(
        sessions_pb2.CancelTurnRequest(request_id=request_id(), task_id=task.id, session_id=task.sessions[0].id)
    )
    await stack.until(task.id, IDLE, turn=1)

    assert any(entry.state == "cancelled" for entry in await stack.transcript(task))


async def test_a_waiting_agent_is_cancelled(stack: Stack) -> None:  # SES-3, SES-5
    task = await stack.ready_task()
    await stack.send(task, "ask May I?")
    await stack.until(task.id, WAITING)

    await stack.client.sessions.CancelTurn(
        sessions_pb2.CancelTurnRequest(request_id=request_id(), task_id=task.id, session_id=task.sessions[0].id)
    )
    await stack.until(task.id, IDLE, turn=1)

    assert next(one for one in await stack.transcript(task) if one.options).state == "cancelled"


async def test_an_agent_that_dies_in_mid_turn_says_so_and_the_next_message_goes_on(stack: Stack) -> None:  # SES-8
    task = await stack.ready_task()
    await stack.send(task, "say before\nwait 0.3\ndie 7")

    failed = await stack.until(task.id, ERROR)
    await stack.send(task, "say after")
    await stack.until(task.id, IDLE, turn=2)

    assert failed.status_reason == "the agent ended with exit code 7 in mid-turn"
    texts = [entry.text for entry in await stack.transcript(task)]
    assert "before\n" in texts
    assert "after\nDone.\n" in texts


async def test_a_turn_that_the_agent_fails_ends_in_error_with_its_words(stack: Stack) -> None:  # SES-2
    task = await stack.ready_task()
    await stack.send(task, "fail the disk is on fire")

    failed = await stack.until(task.id, ERROR)

    assert "the disk is on fire" in failed.status_reason


async def test_an_unknown_agent_names_those_that_exist_and_can_be_retried_with_another(stack: Stack) -> None:  # TSK-2
    task = await stack.create_task(await stack.add_repository(), agent="nobody", hold_prompt=True)
    failed = await stack.until(task.id, ERROR)

    await stack.client.tasks.RetryTask(
        tasks_pb2.RetryTaskRequest(request_id=request_id(), task_id=task.id, agent="mock")
    )
    await stack.until(task.id, IDLE)

    assert 'there is no agent "nobody"' in failed.status_reason
    assert "mock" in failed.status_reason


async def test_an_unknown_model_names_those_that_exist(stack: Stack) -> None:  # SES-6
    task = await stack.create_task(await stack.add_repository(), model="giant", hold_prompt=True)

    failed = await stack.until(task.id, ERROR)

    assert 'the agent has no model "giant"; there are: steady, swift' in failed.status_reason


async def test_a_second_session_with_an_unknown_agent_is_refused_at_once(stack: Stack) -> None:  # SES-1
    task = await stack.ready_task()

    refused = await failure(
        stack.client.sessions.CreateSession(
            sessions_pb2.CreateSessionRequest(request_id=request_id(), task_id=task.id, agent="nobody")
        )
    )

    assert (refused.code, refused.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["agent"])


async def test_a_long_message_runs_over_several_entries_and_loses_nothing(stack: Stack) -> None:  # SES-4
    task = await stack.ready_task(model="swift")
    await stack.send(task, "repeat 1500 line")
    await stack.until(task.id, IDLE, turn=1)

    async def complete():
        entries = [
            entry
            for entry in await stack.transcript(task)
            if entry.kind == sessions_pb2.TRANSCRIPT_ENTRY_KIND_AGENT_MESSAGE
        ]
        return entries if entries and entries[-1].text.endswith("Done.\n") else None

    entries = await eventually(complete)
    text = "".join(entry.text for entry in entries)
    assert text == "".join(f"line {number}\n" for number in range(1, 1501)) + "Done.\n"
    assert len(entries) > 3
    assert len({entry.message_id for entry in entries}) == 1
