"""What is stored of a session, and that nobody writes over another's."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from branchline.v1 import sessions_pb2
from branchline.v1.sessions_pb2 import PermissionOption, TranscriptEntry
from branchline_internal.sandbox.v1.sandbox_pb2 import AgentSession, StartTurnRequest

from services.runtime.database import Database
from services.runtime.errors import NotFound
from services.runtime.spine.outbox import COORDINATOR, Outbox
from services.sandbox.sessions import Asked, Opened, Overtaken, Progress, SessionRecord, SessionStore
from services.sandbox.transcript import Draft

RUNNING, WAITING = sessions_pb2.SESSION_STATUS_RUNNING, sessions_pb2.SESSION_STATUS_WAITING
IDLE, ERROR = sessions_pb2.SESSION_STATUS_IDLE, sessions_pb2.SESSION_STATUS_ERROR
CLOSED = sessions_pb2.SESSION_STATUS_CLOSED


def progress(**given: Any) -> Progress:
    nothing = Progress(1, 0, accepted=False, drafts=(), asked=(), settled=(), status=RUNNING)
    return replace(nothing, **given)


def question(number: int = 1, *, streaming: bool = True) -> Draft:
    options = [PermissionOption(id="allow")]
    entry = TranscriptEntry(
        id=f"ent_1_{number}", session_id="ses_1", streaming=streaming, options=options, revision=number
    )
    return Draft(entry, number)


async def opened(database: Database, sessions: SessionStore, session_id: str = "ses_1") -> SessionRecord:
    begun = await database.write(sessions.begin, session_id, "sbx_1", "task_1", "mock", "")
    return await database.write(sessions.agent_opened, begun, "acp", "1/1/1.0")


async def working(database: Database, sessions: SessionStore, turn: int = 1) -> SessionRecord:
    if await database.read(sessions.find, "ses_1") is None:
        await opened(database, sessions)
    await database.write(sessions.start_turn, StartTurnRequest(session_id="ses_1", turn=turn, text="go"), 10.0)
    return await database.read(sessions.get, "ses_1")


async def held(database: Database, sessions: SessionStore) -> Opened:
    found = await database.read(sessions.opened, "ses_1")
    assert found is not None
    return found


async def told(outbox: Outbox) -> list[AgentSession]:
    """Return what waits to be told to the task."""
    line = outbox.line(COORDINATOR)
    line.fall_behind()
    rows = await asyncio.wait_for(line.take(100), 5)
    return [AgentSession.FromString(row.payload) for row in rows if row.holds(AgentSession)]


async def test_a_turn_is_recorded_once(database: Database, sessions: SessionStore) -> None:
    await working(database, sessions)
    await database.write(sessions.start_turn, StartTurnRequest(session_id="ses_1", turn=1, text="other"), 20.0)
    found = await held(database, sessions)
    assert found.prompt is not None
    assert (found.prompt.text, found.record.turn_time) == ("go", 10.0)


async def test_a_turn_of_no_session_is_refused(database: Database, sessions: SessionStore) -> None:
    with pytest.raises(NotFound):
        await database.write(sessions.start_turn, StartTurnRequest(session_id="none", turn=1), 0.0)


async def test_a_turn_that_begins_is_not_told_back(
    database: Database, sessions: SessionStore, outbox: Outbox
) -> None:  # C12
    record = await working(database, sessions)
    await database.write(sessions.progress, record, progress())
    await database.write(sessions.progress, record, progress(status=WAITING))
    assert [state.status for state in await told(outbox)] == [WAITING]


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
        lambda: database.write(sessions.finish, old, progress(status=IDLE), "", "", end_agent=False),
        lambda: database.write(sessions.end_agent, old),
    ):
        with pytest.raises(Overtaken):
            await write()
    now = await database.read(sessions.get, "ses_1")
    assert (now.turn, now.last_event, now.posts, now.status) == (2, 0, 0, RUNNING)


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
    assert (await database.read(sessions.get, "ses_1")).status == RUNNING


async def test_the_wish_to_close_comes_true_once(
    database: Database, sessions: SessionStore, outbox: Outbox
) -> None:  # F8
    await opened(database, sessions)
    for _ in range(2):
        await database.write(sessions.want_close, "ses_1")
        await database.write(sessions.close, "ses_1")
    await database.write(sessions.want_close, "unknown")
    assert [(state.status, state.revision) for state in await told(outbox)] == [(CLOSED, 1)]
    assert not await database.read(sessions.unfinished)


async def test_the_first_answer_counts_and_late_ones_are_dropped(database: Database, sessions: SessionStore) -> None:
    record = await working(database, sessions)
    asked = progress(drafts=[question()], asked=[Asked("ent_1_1", "7")], status=WAITING)
    await database.write(sessions.progress, record, asked)

    async def answer(option: str, entry: str = "ent_1_1", session: str = "ses_1") -> bool:
        return await database.write(sessions.answer, session, entry, option, "usr_1")

    assert not await answer("nonesuch")
    assert not await answer("allow", entry="ent_9")
    assert not await answer("allow", session="ses_2")
    assert await answer("allow")
    assert not await answer("allow")
    await database.write(
        sessions.finish,
        record,
        progress(drafts=[question(2, streaming=False)], settled=["ent_1_1"], status=IDLE),
        "",
        "",
        end_agent=False,
    )
    assert not await database.read(sessions.permissions, "ses_1")


async def test_only_open_entries_are_kept(database: Database, sessions: SessionStore) -> None:  # C12
    record = await working(database, sessions)
    await database.write(sessions.progress, record, progress(drafts=[question(1), question(2)]))
    await database.write(sessions.progress, record, progress(drafts=[question(1, streaming=False)]))
    assert list((await held(database, sessions)).drafts) == ["ent_1_2"]


async def test_the_end_of_a_turn_is_stored_with_its_event_and_commit(
    database: Database, sessions: SessionStore, outbox: Outbox
) -> None:  # F18, C3
    record = await working(database, sessions)
    end = progress(last_event=42, status=ERROR)
    await database.write(sessions.finish, record, end, "agent silent", "a" * 40, end_agent=True)
    now = await held(database, sessions)
    [state] = await told(outbox)
    assert (state.status, state.turn, state.head_commit, state.status_reason) == (ERROR, 1, "a" * 40, "agent silent")
    assert (now.record.last_event, now.record.ending, now.record.acp_session_id, now.prompt) == (42, True, "", None)
    assert await database.read(sessions.unfinished) == ["ses_1"]


async def test_a_session_that_is_opened_again_keeps_its_turn_and_counts_its_agents(
    database: Database, sessions: SessionStore
) -> None:  # F26
    await working(database, sessions)
    again = await opened(database, sessions)
    assert (again.generation, again.turn, again.status) == (2, 1, RUNNING)
    await database.write(sessions.stand_idle, "ses_1")
    assert (await database.read(sessions.get, "ses_1")).status == RUNNING
