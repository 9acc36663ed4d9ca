"""Messages begin turns or wait; what agents and sandboxes report is followed, and never fails."""

import itertools
from typing import Any

import pytest
from branchline.v1 import common_pb2, processes_pb2, sandboxes_pb2, sessions_pb2, tasks_pb2, transcripts_pb2
from branchline.v1.agents_pb2 import Agent, AgentMode, AgentModel
from branchline.v1.common_pb2 import Attachment, FileExcerpt, Prompt
from branchline.v1.history_pb2 import EVENT_KIND_AGENT_FINISHED, HistoryEvent
from branchline.v1.processes_pb2 import Process
from branchline.v1.sandboxes_pb2 import SandboxState
from branchline.v1.sessions_pb2 import QueuedMessage, SessionState
from branchline.v1.transcripts_pb2 import AgentMessage, TranscriptEntry
from branchline_internal.sandbox.v1.sandbox_pb2 import (
    AgentReport,
    AgentSession,
    CancelTurnRequest,
    CloseSessionRequest,
    StartTurnRequest,
)

from services.runtime.errors import DomainError, InvalidArgument
from services.runtime.failures import failed
from services.runtime.limits import ENTITY_BYTES
from services.runtime.prompts import check_prompt
from services.task.lifecycle import PROVISION
from services.task.open_task import OpenTask
from services.task.standing import (
    FAILED,
    IDLE,
    PROVISIONING,
    QUEUED,
    RUNNING,
    TRANSITIONS,
    TURN_FAILED,
    WAITING,
    Standing,
)
from tests.unit.task.room import NOWHERE, Room, request_id, sandbox_of
from tests.unit.task.test_open_task import message

AT_REST, WORKS, BROKEN = (
    sessions_pb2.SESSION_STATE_IDLE,
    sessions_pb2.SESSION_STATE_RUNNING,
    sessions_pb2.SESSION_STATE_FAILED,
)
STANDINGS = sorted(TRANSITIONS)
SESSION_STATES = [state for state in SessionState.values() if state]


async def send(room: Room, task: OpenTask, session: int = 0, **fields: Any) -> TranscriptEntry:
    """Send a message that is given to the agent at once."""
    answer = await room.database.write(
        room.sessions.send, message(task, session_id=task.sessions[session].id, **fields)
    )
    assert answer.HasField("entry")
    return answer.entry


async def queue(room: Room, task: OpenTask, session: int = 0, **fields: Any) -> QueuedMessage:
    """Send a message that waits."""
    request = message(task, session_id=task.sessions[session].id, queue=True, **fields)
    answer = await room.database.write(room.sessions.send, request)
    assert answer.HasField("queued_message")
    return answer.queued_message


def report(task: OpenTask, state: SessionState.ValueType, turn: int, revision: int, **fields: Any) -> AgentSession:
    return AgentSession(
        session_id=task.sessions[0].id, task_id=task.task.id, state=state, turn=turn, revision=revision, **fields
    )


def ended(task: OpenTask, turn: int = 1, revision: int = 1, **fields: Any) -> AgentSession:
    return report(task, AT_REST, turn, revision, **fields)


def broke(task: OpenTask, words: str = "it broke", turn: int = 1, revision: int = 1) -> AgentSession:
    failure = failed(common_pb2.FAILURE_REASON_AGENT_EXITED, words)
    return report(task, BROKEN, turn, revision, failure=failure)


async def test_a_message_is_an_entry_of_who_said_it_and_gives_the_agent_its_prompt(room: Room) -> None:
    task = await room.task()

    entry = await send(room, task, text="go on")

    assert (entry.user_message.text, entry.actor.user_id, entry.turn, entry.position) == ("go on", "usr_ann", 1, 1)
    assert entry.HasField("end_time")
    assert [one.prompt.text for one in await room.marks(StartTurnRequest)] == ["go on"]
    after = await room.read(task.task.id)
    assert (after.standing, after.sessions[0].state, after.sessions[0].turn) == (RUNNING, WORKS, 1)


async def test_a_turn_ends_and_the_message_that_waited_longest_begins_the_next(room: Room) -> None:
    task = await room.task(sessions=2)
    await send(room, task)
    await queue(room, task, session=1, text="second")
    third = await queue(room, task, text="third")

    await room.push(ended(task, stop_reason=transcripts_pb2.STOP_REASON_END_TURN))

    assert [(one.id, one.place) for one in await room.queued(task.task.id)] == [(third.id, 1)]
    after = await room.read(task.task.id)
    assert [one.state for one in after.sessions] == [AT_REST, WORKS]
    assert after.standing == RUNNING
    assert [one.prompt.text for one in await room.marks(StartTurnRequest)] == ["go on", "second"]
    finished = [one for one in await room.marks(HistoryEvent) if "finished" in one.summary]
    assert [dict(one.details) for one in finished] == [{"stop_reason": "end_turn"}]


@pytest.mark.parametrize("standing", [QUEUED, PROVISIONING, FAILED], ids=lambda one: one.name)
async def test_messages_wait_while_a_task_has_no_sandbox(room: Room, standing: Standing) -> None:  # F4
    task = await room.task(standing)

    with pytest.raises(DomainError) as refused:
        await send(room, task)
    await queue(room, task)

    assert refused.value.reason == "TASK_NOT_READY"
    assert refused.value.metadata["state"] == standing.name
    assert (await room.read(task.task.id)).standing == standing


async def test_a_message_to_an_agent_that_works_is_refused_naming_the_session(room: Room) -> None:
    task = await room.task(sessions=2)
    await send(room, task)

    with pytest.raises(DomainError) as refused:
        await send(room, task, session=1)

    assert (refused.value.reason, refused.value.metadata) == (
        "SESSION_WORKING",
        {"session_id": task.sessions[0].id},
    )


@pytest.mark.parametrize("standing", STANDINGS, ids=lambda one: one.name)
async def test_no_report_is_ever_refused(room: Room, standing: Standing) -> None:  # F23
    task = await room.task(standing)
    revision = itertools.count(1)
    for held, reported, turn in itertools.product(SESSION_STATES, SESSION_STATES, (0, 1, 2)):
        task.task.state, task.task.activity = standing
        task.sessions[0].turn = 1
        task.stand(task.sessions[0], held)
        room.turns.follow(task, report(task, reported, turn, next(revision)))

    for number, reported in enumerate(SandboxState.values(), 1):
        assert await room.push(sandbox_of(task, reported, revision=number)) == {}
    for number, reported in enumerate(SESSION_STATES, 1):
        assert await room.push(report(task, reported, 0, number)) == {}


async def test_a_sandbox_that_fails_ends_its_turns_and_the_task_can_be_provisioned_again(room: Room) -> None:  # F23
    task = await room.task(sessions=2)
    await send(room, task)

    await room.push(sandbox_of(task, sandboxes_pb2.SANDBOX_STATE_FAILED, "power"))

    lost = await room.read(task.task.id)
    assert (lost.standing, lost.task.failure.reason) == (FAILED, common_pb2.FAILURE_REASON_SANDBOX_LOST)
    assert (lost.task.failure.message, lost.task.failure.output_tail) == (
        "the sandbox failed: power",
        "the machine's last words",
    )
    assert [one.state for one in lost.sessions] == [BROKEN, AT_REST]
    assert lost.sessions[0].failure == lost.task.failure
    with pytest.raises(DomainError, match="not provisioned"):
        await send(room, task, session=1)
    assert await room.push(ended(task)) == {}
    assert (await room.read(task.task.id)).standing == FAILED
    retry = tasks_pb2.RetryProvisioningRequest(request_id=request_id(), task_id=task.task.id)
    await room.public.RetryProvisioning(retry, NOWHERE)
    assert (await room.read(task.task.id)).row.workflow == PROVISION


async def test_the_head_commit_comes_with_the_end_of_the_turn_and_is_the_agents(room: Room) -> None:  # C3, F10
    task = await room.task()
    await send(room, task)

    await room.push(ended(task, head_commit="a" * 40))
    await room.push(ended(task, revision=2, head_commit="a" * 40))

    assert (await room.read(task.task.id)).task.head_commit == "a" * 40
    moved = [one for one in await room.marks(HistoryEvent) if "is at" in one.summary]
    assert [(one.actor.session_id, one.actor.on_behalf_of_user_id) for one in moved] == [
        (task.sessions[0].id, "usr_ann")
    ]


async def test_an_echo_of_running_changes_nothing(room: Room) -> None:  # C12
    task = await room.task()
    await send(room, task)
    before = await room.read(task.task.id)

    await room.push(report(task, WORKS, 1, 1))

    after = await room.read(task.task.id)
    assert (after.task, after.sessions) == (before.task, before.sessions)


async def test_a_session_shows_what_its_agent_listed_last(room: Room) -> None:
    task = await room.task()
    await send(room, task)
    models, modes = [AgentModel(id="opus")], [AgentMode(id="plan")]

    await room.push(report(task, WORKS, 1, 1, models=models, modes=modes))
    shown = (await room.read(task.task.id)).sessions[0]
    await room.push(ended(task, revision=2))

    assert (list(shown.models), list(shown.modes)) == (models, modes)
    assert list((await room.read(task.task.id)).sessions[0].models) == models


async def test_entries_of_a_turn_are_numbered_before_its_end_is_followed_and_what_waited_comes_behind(
    room: Room,
) -> None:
    task = await room.task()
    await send(room, task)
    await queue(room, task, text="next")
    said = [
        TranscriptEntry(id=f"ent_{number}", session_id=task.sessions[0].id, task_id=task.task.id, revision=1)
        for number in range(3)
    ]

    await room.push(ended(task), *said, TranscriptEntry(id="ent_1", session_id=task.sessions[0].id, revision=2))

    numbered = [(await room.entry(one.id)).position for one in said]
    assert numbered == [2, 3, 4]
    assert (await room.entry("ent_1")).revision == 2
    told = {one.user_message.text: one.position for one in await room.marks(TranscriptEntry) if one.user_message.text}
    assert told == {"go on": 1, "next": 5}


async def test_a_batch_of_entries_costs_the_same_however_long(room: Room) -> None:
    task = await room.task()

    async def cost(first: int, count: int) -> int:
        before = room.database.statements
        await room.push(
            *(
                TranscriptEntry(id=f"ent_{number}", session_id=task.sessions[0].id, revision=1)
                for number in range(first, first + count)
            )
        )
        return room.database.statements - before

    assert await cost(0, 1) == await cost(1, 300) <= 6
    assert (await room.entry("ent_300")).position == 301


async def test_the_end_of_a_turn_costs_at_most_seven_statements_and_with_the_next_message_nine(room: Room) -> None:
    task = await room.task()
    await send(room, task)
    await queue(room, task)

    async def cost(turn: int) -> int:
        before = room.database.statements
        await room.push(ended(task, turn=turn, revision=turn, stop_reason=transcripts_pb2.STOP_REASON_END_TURN))
        return room.database.statements - before

    assert [await cost(1) <= 9, await cost(2) <= 7] == [True, True]
    assert (await room.read(task.task.id)).standing == IDLE


async def test_what_concerns_a_task_that_is_gone_is_ignored_and_what_is_too_large_refused(room: Room) -> None:
    gone = AgentSession(session_id="ses_gone", task_id="task_gone", turn=1, revision=1)
    large = TranscriptEntry(id="ent_large", session_id="ses_gone", revision=1)
    large.agent_message.CopyFrom(AgentMessage(text="x" * 600_000))
    asked = transcripts_pb2.InputRequest(id="inp_x", task_id="task_gone", session_id="ses_gone", revision=1)
    process = Process(id="proc_x", task_id="task_gone", revision=1)
    agents = AgentReport(sandbox_id="sbx_x", task_id="task_gone", revision=1)

    assert await room.push(gone, TranscriptEntry(id="ent_x", session_id="ses_gone", revision=1)) == {}
    assert await room.push(asked, process, agents) == {}
    assert list(await room.push(gone, large)) == [1]
    assert not await room.marks(Process)
    assert not await room.marks(AgentReport)


async def test_processes_and_reports_of_agents_are_passed_on(room: Room) -> None:
    task = await room.task()
    process = Process(
        id="proc_1", task_id=task.task.id, state=processes_pb2.PROCESS_STATE_RUNNING, output_tail=b"\xff", revision=3
    )
    agents = AgentReport(
        sandbox_id=task.task.active_sandbox_id, task_id=task.task.id, agents=[Agent(id="scripted")], revision=2
    )
    older = AgentReport(sandbox_id=task.task.active_sandbox_id, task_id=task.task.id, revision=1)

    assert await room.push(process, agents) == {}
    assert await room.push(older) == {}

    assert await room.marks(Process, "coordinator") == [process]
    assert await room.marks(AgentReport, "coordinator") == [agents]


async def test_closing_a_session_drops_what_waits_for_it_and_nothing_wakes_it(room: Room) -> None:  # F26, F8
    task = await room.task(sessions=2)
    await send(room, task)
    await queue(room, task, session=1)
    request = sessions_pb2.CloseSessionRequest(
        request_id=request_id(), task_id=task.task.id, session_id=task.sessions[1].id
    )

    first = await room.commands.run(request, sessions_pb2.CloseSessionResponse, room.sessions.close, request)
    again = await room.commands.run(request, sessions_pb2.CloseSessionResponse, room.sessions.close, request)
    await room.push(ended(task))

    after = await room.read(task.task.id)
    assert first == again
    assert await room.queued(task.task.id) == []
    assert after.sessions[1].state == sessions_pb2.SESSION_STATE_CLOSED
    assert after.standing == IDLE
    assert [one.session_id for one in await room.marks(CloseSessionRequest)] == [task.sessions[1].id]
    assert len(await room.marks(StartTurnRequest)) == 1


async def test_a_prompt_says_something_and_is_bounded_in_sum(room: Room) -> None:  # F22, F30
    task = await room.task()
    excerpt = Attachment(file_excerpt=FileExcerpt(path="a", text="x" * 16000))
    full = Prompt(text="x" * 65536, attachments=[excerpt] * 16)

    check_prompt(full, "prompt")
    entry = await send(room, task, prompt=full)
    waits = await queue(room, task, prompt=full)

    assert max(entry.ByteSize(), waits.ByteSize()) <= ENTITY_BYTES
    with pytest.raises(InvalidArgument, match=r"prompt\.text"):
        check_prompt(Prompt(text=" \n"), "prompt")
    longer = Attachment(file_excerpt=FileExcerpt(path="b" * 4096, text="x" * 16384))
    with pytest.raises(InvalidArgument, match=r"prompt\.attachments"):
        check_prompt(Prompt(text="x", attachments=[longer] * 16), "prompt")


async def test_a_turn_that_fails_says_why_and_the_next_message_begins_another(room: Room) -> None:
    task = await room.task()
    await send(room, task)

    await room.push(broke(task))
    broken = await room.read(task.task.id)
    await send(room, task)

    assert (broken.standing, broken.task.failure.message) == (TURN_FAILED, "it broke")
    assert broken.sessions[0].failure.reason == common_pb2.FAILURE_REASON_AGENT_EXITED
    after = await room.read(task.task.id)
    assert (after.standing, after.sessions[0].turn) == (RUNNING, 2)
    assert not after.task.HasField("failure")
    assert not after.sessions[0].HasField("failure")


async def test_a_failure_without_words_is_one_all_the_same(room: Room) -> None:
    task = await room.task()
    await send(room, task)

    await room.push(report(task, BROKEN, 1, 1))

    assert (await room.read(task.task.id)).task.failure.reason == common_pb2.FAILURE_REASON_INTERNAL


def retry(task: OpenTask, turn: int = 1) -> sessions_pb2.RetryTurnRequest:
    return sessions_pb2.RetryTurnRequest(
        request_id=request_id(), task_id=task.task.id, session_id=task.sessions[0].id, turn=turn
    )


async def test_a_failed_turn_is_retried_with_its_prompt_as_a_new_message(room: Room) -> None:
    task = await room.task()
    excerpt = Attachment(file_excerpt=FileExcerpt(path="a.py", text="x"))
    first = await send(room, task, prompt=Prompt(text="do it", attachments=[excerpt]))
    await room.push(broke(task))
    await room.push(ended(task, revision=2))  # the agent was cancelled all the same: the turn stays failed
    request = retry(task)

    answer = await room.commands.run(request, sessions_pb2.RetryTurnResponse, room.sessions.retry, request)
    again = await room.commands.run(request, sessions_pb2.RetryTurnResponse, room.sessions.retry, request)

    assert answer == again
    assert (answer.session.state, answer.session.turn) == (WORKS, 2)
    told = [one for one in await room.marks(TranscriptEntry) if one.HasField("user_message")]
    assert [(one.turn, one.position) for one in told] == [(1, 1), (2, 2)]
    assert told[1].user_message == first.user_message
    assert told[1].id != first.id
    assert [(one.turn, one.prompt) for one in await room.marks(StartTurnRequest)] == [(2, first.user_message)]


async def test_only_the_last_turn_is_retried_and_only_if_it_failed(room: Room) -> None:
    task = await room.task(sessions=2)

    async def refusal(turn: int) -> tuple[str, str]:
        with pytest.raises(DomainError) as refused:
            await room.database.write(room.sessions.retry, retry(task, turn))
        return refused.value.reason, refused.value.metadata.get("state", "")

    assert await refusal(1) == ("STATE_FORBIDS", "idle")
    await send(room, task)
    assert await refusal(1) == ("STATE_FORBIDS", "running")
    await room.push(broke(task))
    assert await refusal(2) == ("STATE_FORBIDS", "failed")
    await send(room, task, session=1)
    assert (await refusal(1))[0] == "SESSION_WORKING"
    await room.push(sandbox_of(task, sandboxes_pb2.SANDBOX_STATE_FAILED))
    assert await refusal(1) == ("TASK_NOT_READY", "failed")


def cancellation(task: OpenTask, turn: int) -> sessions_pb2.CancelTurnRequest:
    return sessions_pb2.CancelTurnRequest(
        request_id=request_id(), task_id=task.task.id, session_id=task.sessions[0].id, turn=turn
    )


async def test_a_cancellation_names_its_turn_and_can_be_repeated(room: Room) -> None:  # F20
    task = await room.task()
    await send(room, task)

    await room.database.write(room.sessions.cancel, cancellation(task, 1))
    answer = await room.database.write(room.sessions.cancel, cancellation(task, 1))

    assert [(one.session_id, one.turn) for one in await room.marks(CancelTurnRequest)] == [(task.sessions[0].id, 1)]
    assert (answer.session.state, answer.session.turn) == (WORKS, 1)
    assert answer.consistency_token


async def test_history_tells_once_that_a_turn_was_cancelled_and_how_it_ended(room: Room) -> None:
    task = await room.task()
    interrupting = message(task, when_busy=sessions_pb2.WHEN_BUSY_INTERRUPT)
    await send(room, task)

    for _ in range(3):
        await room.database.write(room.sessions.cancel, cancellation(task, 1))
    await room.database.write(room.sessions.send, interrupting)
    assert (await room.events(task.task.id)).count("TURN_CANCELLED") == 1
    await room.push(ended(task, stop_reason=transcripts_pb2.STOP_REASON_CANCELLED))
    await room.database.write(room.sessions.cancel, cancellation(task, 2))
    await room.push(ended(task, turn=2, revision=2, stop_reason=transcripts_pb2.STOP_REASON_END_TURN))

    assert (await room.events(task.task.id)).count("TURN_CANCELLED") == 2
    told = [one.summary for one in await room.marks(HistoryEvent) if one.kind == EVENT_KIND_AGENT_FINISHED]
    assert told == ["Session 1: the agent stopped: cancelled", "Session 1: the agent finished"]


async def test_a_cancellation_of_another_turn_leaves_the_running_one_alone(room: Room) -> None:
    task = await room.task()
    await send(room, task)
    await room.push(ended(task))
    await send(room, task)

    for turn in (1, 3):
        with pytest.raises(DomainError) as refused:
            await room.database.write(room.sessions.cancel, cancellation(task, turn))
        assert (refused.value.reason, refused.value.metadata) == ("SESSION_NOT_WORKING", {"turn": "2"})
    assert not await room.marks(CancelTurnRequest)


async def test_an_agent_that_asks_makes_the_task_wait_and_one_that_goes_on_makes_it_run(room: Room) -> None:
    task = await room.task()
    await send(room, task)

    await room.push(report(task, sessions_pb2.SESSION_STATE_WAITING, 1, 1))
    waiting = await room.read(task.task.id)
    await room.push(report(task, WORKS, 1, 2))

    assert waiting.standing == WAITING
    assert (await room.read(task.task.id)).standing == RUNNING
    assert (await room.events(task.task.id)).count("AGENT_ASKED") == 1
