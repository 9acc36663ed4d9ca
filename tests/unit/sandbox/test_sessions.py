"""What is stored of a session, and that nobody writes over another's."""

import asyncio
from dataclasses import replace
from typing import Any, TypeVar

import pytest
from branchline.v1 import sessions_pb2
from branchline.v1 import transcripts_pb2 as transcripts
from branchline.v1.agents_pb2 import Agent, AgentModel
from branchline.v1.common_pb2 import FAILURE_REASON_AGENT_SILENT, Actor, Prompt
from branchline.v1.transcripts_pb2 import (
    Decline,
    InputAnswer,
    InputRequest,
    PermissionOption,
    PermissionRequest,
    TranscriptEntry,
    TurnEnd,
)
from branchline_internal.sandbox.v1.sandbox_pb2 import AgentSession, StartTurnRequest
from google.protobuf.message import Message

from services.runtime.database import Database
from services.runtime.errors import NotFound
from services.runtime.failures import failed
from services.runtime.spine.outbox import COORDINATOR, Outbox
from services.sandbox.offers import Offer
from services.sandbox.questions import Asked
from services.sandbox.records import Opened, Overtaken, Place, Progress, SessionRecord
from services.sandbox.sessions import SessionStore
from services.sandbox.transcript import Draft

RUNNING, WAITING = sessions_pb2.SESSION_STATE_RUNNING, sessions_pb2.SESSION_STATE_WAITING
IDLE, ERROR = sessions_pb2.SESSION_STATE_IDLE, sessions_pb2.SESSION_STATE_FAILED
CLOSED = sessions_pb2.SESSION_STATE_CLOSED
PENDING = transcripts.INPUT_REQUEST_STATE_PENDING
ANSWERED, CANCELLED = transcripts.INPUT_REQUEST_STATE_ANSWERED, transcripts.INPUT_REQUEST_STATE_CANCELLED

M = TypeVar("M", bound=Message)


def progress(**given: Any) -> Progress:
    nothing = Progress(1, 0, accepted=False, drafts=(), asked=(), state=RUNNING)
    return replace(nothing, **given)


def entry(number: int = 1, *, ended: bool = False) -> Draft:
    made = TranscriptEntry(id=f"ent_1_{number}", session_id="ses_1", revision=number)
    if ended:
        made.end_time.FromSeconds(1)
    return Draft(made, number)


def asked(request_id: str = "inp_1", session_id: str = "ses_1", state: int = PENDING, revision: int = 1) -> Asked:
    permission = PermissionRequest(options=[PermissionOption(id="allow"), PermissionOption(id="no")])
    request = InputRequest(id=request_id, session_id=session_id, permission=permission, revision=revision)
    request.state = transcripts.InputRequestState.ValueType(state)
    return Asked(request, "7")


async def opened(database: Database, sessions: SessionStore, session_id: str = "ses_1") -> SessionRecord:
    begun = await database.write(sessions.begin, Place(session_id, "sbx_1", "task_1", "org_1", "mock"))
    offer = Offer(Agent(id="mock", models=[AgentModel(id="swift")]), "swift", "code")
    return await database.write(sessions.agent_opened, begun, "acp", "1/1/1.0", offer)


def begins(turn: int, text: str = "go") -> StartTurnRequest:
    return StartTurnRequest(session_id="ses_1", turn=turn, prompt=Prompt(text=text))


async def working(database: Database, sessions: SessionStore, turn: int = 1) -> SessionRecord:
    if await database.read(sessions.find, "ses_1") is None:
        await opened(database, sessions)
    await database.write(sessions.start_turn, begins(turn), 10.0)
    return await database.read(sessions.get, "ses_1")


async def held(database: Database, sessions: SessionStore) -> Opened:
    found = await database.read(sessions.opened, "ses_1")
    assert found is not None
    return found


async def waits(outbox: Outbox, message: type[M]) -> list[M]:
    """Return what waits to be told to the task."""
    line = outbox.line(COORDINATOR)
    line.fall_behind()
    rows = await asyncio.wait_for(line.take(100), 5)
    return [message.FromString(row.payload) for row in rows if row.holds(message)]


async def told(outbox: Outbox) -> list[AgentSession]:
    return await waits(outbox, AgentSession)


async def test_a_turn_is_recorded_once(database: Database, sessions: SessionStore) -> None:
    await working(database, sessions)
    await database.write(sessions.start_turn, begins(1, "other"), 20.0)
    found = await held(database, sessions)
    assert found.prompt is not None
    assert (found.prompt.prompt.text, found.record.turn_time) == ("go", 10.0)


async def test_a_turn_of_no_session_is_refused(database: Database, sessions: SessionStore) -> None:
    with pytest.raises(NotFound):
        await database.write(sessions.start_turn, StartTurnRequest(session_id="none", turn=1), 0.0)


async def test_a_turn_that_begins_is_not_told_back(
    database: Database, sessions: SessionStore, outbox: Outbox
) -> None:  # C12
    record = await working(database, sessions)
    await database.write(sessions.progress, record, progress())
    await database.write(sessions.progress, record, progress(state=WAITING))
    assert [state.state for state in await told(outbox)] == [WAITING]


async def test_only_the_turn_that_is_done_is_cancelled(database: Database, sessions: SessionStore) -> None:
    await working(database, sessions, turn=2)
    await database.write(sessions.want_cancel, "ses_1", 1)
    assert (await database.read(sessions.get, "ses_1")).cancel_turn == 0
    await database.write(sessions.want_cancel, "ses_1", 2)
    assert (await database.read(sessions.get, "ses_1")).cancel_turn == 2


async def test_a_follower_that_was_overtaken_changes_nothing(database: Database, sessions: SessionStore) -> None:  # F26
    old = await working(database, sessions)
    await working(database, sessions, turn=2)
    for write in (
        lambda: database.write(sessions.progress, old, progress(last_event=9)),
        lambda: database.write(sessions.post, old, 1, 1001, 3),
        lambda: database.write(sessions.finish, old, progress(state=IDLE), TurnEnd(), end_agent=False),
        lambda: database.write(sessions.end_agent, old),
    ):
        with pytest.raises(Overtaken):
            await write()
    now = await database.read(sessions.get, "ses_1")
    assert (now.turn, now.last_event, now.posts, now.state) == (2, 0, 0, RUNNING)


async def test_a_turn_given_while_another_runs_ends_its_agent_first(database: Database, sessions: SessionStore) -> None:
    await working(database, sessions)
    assert (await working(database, sessions, turn=2)).ending


async def test_a_turn_given_to_a_session_that_is_to_be_closed_reopens_it(
    database: Database, sessions: SessionStore, outbox: Outbox
) -> None:  # F26
    await opened(database, sessions)
    await database.write(sessions.want_close, "ses_1")
    record = await working(database, sessions)
    await database.write(sessions.close, "ses_1")  # a closing lane that began before
    assert (record.closing, record.ending) == (False, True)
    assert (await database.read(sessions.get, "ses_1")).state == RUNNING


async def test_the_wish_to_close_comes_true_once(
    database: Database, sessions: SessionStore, outbox: Outbox
) -> None:  # F8
    await opened(database, sessions)
    for _ in range(2):
        await database.write(sessions.want_close, "ses_1")
        await database.write(sessions.close, "ses_1")
    await database.write(sessions.want_close, "unknown")
    assert [(state.state, state.revision) for state in await told(outbox)] == [(CLOSED, 1)]
    assert not await database.read(sessions.unfinished)


async def test_the_first_answer_counts_and_late_ones_are_dropped(
    database: Database, sessions: SessionStore, outbox: Outbox
) -> None:
    record = await working(database, sessions)
    await database.write(sessions.progress, record, progress(asked=[asked()], state=WAITING))

    async def answer(option: str, request: str = "inp_1", session: str = "ses_1") -> bool:
        given = (InputAnswer(option_id=option), Actor(user_id="usr_1"))
        return await database.write(sessions.questions.answer, session, request, *given)

    assert not await answer("nonesuch")
    assert not await answer("allow", request="inp_9")
    assert not await answer("allow", session="ses_2")
    assert await answer("allow")
    assert not await answer("no")
    [open_one] = await database.read(sessions.questions.asked, "ses_1")
    assert (open_one.request.answer.option_id, open_one.request.answered_by.user_id) == ("allow", "usr_1")
    end = progress(asked=[asked(state=ANSWERED, revision=2)], state=IDLE)
    await database.write(sessions.finish, record, end, TurnEnd(), end_agent=False)
    assert not await database.read(sessions.questions.asked, "ses_1")
    assert [request.state for request in await waits(outbox, InputRequest)] == [ANSWERED]


async def test_every_question_can_be_declined(database: Database, sessions: SessionStore) -> None:
    record = await working(database, sessions)
    await database.write(sessions.progress, record, progress(asked=[asked()], state=WAITING))
    decline = InputAnswer(decline=Decline(reason="not now"))
    assert await database.write(sessions.questions.answer, "ses_1", "inp_1", decline, Actor(user_id="usr_1"))


async def test_what_waits_is_told_to_be_cancelled_when_its_turn_is_cut_off(
    database: Database, sessions: SessionStore, outbox: Outbox
) -> None:
    record = await working(database, sessions)
    await database.write(sessions.progress, record, progress(asked=[asked()], state=WAITING))
    await working(database, sessions, turn=2)
    assert [(one.state, one.revision) for one in await waits(outbox, InputRequest)] == [(CANCELLED, 2)]
    assert not await database.read(sessions.questions.asked, "ses_1")


async def test_a_session_that_is_closed_in_a_turn_ends_it_in_the_transcript(
    database: Database, sessions: SessionStore, outbox: Outbox
) -> None:
    record = await working(database, sessions)
    await database.write(sessions.progress, record, progress(asked=[asked()], state=WAITING))
    await database.write(sessions.want_close, "ses_1")
    await database.write(sessions.close, "ses_1")
    [end] = await waits(outbox, TranscriptEntry)
    assert end.turn_end.reason == transcripts.STOP_REASON_CANCELLED
    assert [one.state for one in await waits(outbox, InputRequest)] == [CANCELLED]
    assert (await told(outbox))[-1].state == CLOSED


async def test_only_open_entries_are_kept(database: Database, sessions: SessionStore) -> None:  # C12
    record = await working(database, sessions)
    await database.write(sessions.progress, record, progress(drafts=[entry(1), entry(2)]))
    await database.write(sessions.progress, record, progress(drafts=[entry(1, ended=True)]))
    assert list((await held(database, sessions)).drafts) == ["ent_1_2"]


async def test_the_end_of_a_turn_is_stored_with_its_event_and_commit(
    database: Database, sessions: SessionStore, outbox: Outbox
) -> None:  # F18, C3
    record = await working(database, sessions)
    failure = failed(FAILURE_REASON_AGENT_SILENT, "it said nothing")
    end = TurnEnd(reason=transcripts.STOP_REASON_FAILED, failure=failure, head_commit="a" * 40)
    await database.write(sessions.finish, record, progress(last_event=42, state=ERROR), end, end_agent=True)
    now = await held(database, sessions)
    [state] = await told(outbox)
    assert (state.state, state.turn, state.head_commit) == (ERROR, 1, "a" * 40)
    assert (state.failure, state.stop_reason) == (failure, transcripts.STOP_REASON_FAILED)
    assert (now.record.last_event, now.record.ending, now.record.acp_session_id, now.prompt) == (42, True, "", None)
    assert await database.read(sessions.unfinished) == ["ses_1"]


async def test_what_an_agent_offers_is_told_with_its_session(
    database: Database, sessions: SessionStore, outbox: Outbox
) -> None:
    await opened(database, sessions)
    await database.write(sessions.stand_idle, "ses_1")
    [state] = await told(outbox)
    assert (state.state, [model.id for model in state.models]) == (IDLE, ["swift"])
    offer = await database.read(sessions.offer, "ses_1")
    assert (offer.model, offer.mode) == ("swift", "code")


async def test_a_session_that_is_opened_again_keeps_its_turn_and_counts_its_agents(
    database: Database, sessions: SessionStore
) -> None:  # F26
    await working(database, sessions)
    again = await opened(database, sessions)
    assert (again.generation, again.turn, again.state) == (2, 1, RUNNING)
    await database.write(sessions.stand_idle, "ses_1")
    assert (await database.read(sessions.get, "ses_1")).state == RUNNING
