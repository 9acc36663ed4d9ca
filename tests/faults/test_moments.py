"""Whatever ends a session or its turn, at whatever moment: no agent is left, and none is stuck. F5, F26.

One sandbox holds a session in each phase that a session can be in; then the same happens to all of them at once.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path

import psutil
import pytest_asyncio
from branchline.v1 import sessions_pb2
from branchline_internal.sandbox.v1 import sandbox_pb2

from tests.support.sandbox import SANDBOX, Room, eventually, sandbox_room

IDLE, ERROR = sessions_pb2.SESSION_STATE_IDLE, sessions_pb2.SESSION_STATE_FAILED
CLOSED = sessions_pb2.SESSION_STATE_CLOSED

WORKING = {
    "thinks": "think hard\nwait 90",
    "talks": "\n".join(["say word", "wait 0.05"] * 1500),
    "runs": "run sleep 303",
    "asks": "ask May I?",
    "is_cancelled": "run sleep 305",
}
OVER = {
    "ended": "say done",
    "left_something": "run (sleep 304 >/dev/null 2>&1 &)",
    "failed": "run (sleep 306 >/dev/null 2>&1 &)\nfail broken",
    "died": "run (sleep 307 >/dev/null 2>&1 &)\ndie 3",
}
UNTOLD = ("idle", "given")
"""Sessions that have had no turn; the second is given one in the same moment."""

PHASES = (*WORKING, *OVER, *UNTOLD)


@pytest_asyncio.fixture
async def room(tmp_path: Path) -> AsyncGenerator[Room, None]:
    """A room with a session in each phase."""
    async with sandbox_room(tmp_path) as room:
        await room.start()
        await room.open("first")
        await close(room, "first")
        await closed(room, "first")
        for phase in PHASES:
            await open_session(room, phase)
        for phase, text in {**WORKING, **OVER}.items():
            await room.prompt(1, text, phase)
        for phase in OVER:
            await room.ended(1, phase)
        for phase in WORKING:
            await eventually(lambda phase=phase: entries(room, phase), room.log)
        await eventually(lambda: room.processes("sleep 303") and room.processes("sleep 305"), room.log)
        await room.stub.CancelTurn(sandbox_pb2.CancelTurnRequest(session_id="is_cancelled", turn=1), timeout=30)
        await room.prompt(1, "say given", "given")
        yield room


def entries(room: Room, session: str) -> list[str]:
    return [entry.id for entry in room.coordinator.entries.values() if entry.session_id == session]


async def open_session(room: Room, session: str) -> None:
    request = sandbox_pb2.OpenSessionRequest(sandbox_id=SANDBOX, session_id=session, agent="mock", model="swift")
    await room.stub.OpenSession(request, timeout=60)


async def close(room: Room, *sessions: str) -> None:
    wanted = [sandbox_pb2.CloseSessionRequest(session_id=session) for session in sessions]
    await asyncio.gather(*(room.stub.CloseSession(one, timeout=30) for one in wanted))


async def closed(room: Room, *sessions: str) -> None:
    """Wait until the coordinator was told that sessions are closed."""

    def look() -> bool:
        newest = {state.session_id: state.state for state in room.coordinator.sessions}
        return all(newest.get(session) == CLOSED for session in sessions)

    await eventually(look, room.log)


def left(room: Room) -> list[str]:
    """Return what runs in the sandbox and should not."""
    return [" ".join(found.cmdline()) for found in (*room.agents(), *room.processes("sleep 30"))]


async def next_turns(room: Room) -> None:
    """Give every session its next turn; each is done, by one agent of its own."""
    await asyncio.gather(*(room.prompt(2, "say again", phase) for phase in PHASES))
    for phase in PHASES:
        assert (await room.ended(2, phase)).state == IDLE, phase
    assert len(room.agents()) == len(PHASES)


async def test_a_session_that_is_closed_leaves_nothing_whatever_it_does(room: Room) -> None:  # F5, F8, F26
    await close(room, *PHASES)
    await closed(room, *PHASES)

    assert not left(room)


async def test_a_next_turn_finds_no_agent_of_the_last_whatever_that_does(room: Room) -> None:  # F5, F26
    await next_turns(room)

    assert not [line for line in left(room) if line.split()[-1] in {"303", "305", "306", "307"}]


async def test_a_killed_service_takes_up_every_session_where_it_was(room: Room) -> None:  # F5, F18
    await room.kill()
    await room.start()
    await next_turns(room)
    await close(room, *PHASES)
    await closed(room, *PHASES)

    assert not left(room)


async def test_agents_that_die_end_what_they_were_at_and_nothing_else(room: Room) -> None:  # F5
    for agent in room.agents():
        with contextlib.suppress(psutil.NoSuchProcess):
            agent.kill()
    for phase in {*WORKING, "given"} - {"is_cancelled"}:
        await room.ended(1, phase)
    await next_turns(room)


async def test_a_destroyed_sandbox_ends_every_turn_and_leaves_no_process(room: Room) -> None:  # F5, F23
    await room.stub.DestroySandbox(sandbox_pb2.DestroySandboxRequest(sandbox_id=SANDBOX), timeout=60)

    for phase in (*WORKING, "given"):
        await room.ended(1, phase)
    assert not room.processes("")


async def test_a_session_that_is_closed_while_it_is_opened_is_closed(room: Room) -> None:  # F26
    for number in range(4):
        session, before = f"opening_{number}", {agent.pid for agent in room.agents()}
        opening = asyncio.create_task(open_session(room, session))
        await eventually(
            lambda before=before: [one for one in room.processes("scripted-agent") if one.pid not in before], room.log
        )
        await asyncio.sleep(0.05 * number)
        await close(room, session)
        await opening
        await closed(room, session)
    await close(room, *PHASES)
    await closed(room, *PHASES)

    assert not left(room)


async def test_an_opening_that_its_caller_gave_up_leaves_no_agent(room: Room) -> None:  # F5
    for number in range(3):
        before = {agent.pid for agent in room.processes("scripted-agent")}
        opening = asyncio.create_task(open_session(room, f"given_up_{number}"))
        await eventually(
            lambda before=before: [one for one in room.processes("scripted-agent") if one.pid not in before], room.log
        )
        opening.cancel()
        await asyncio.wait({opening})
        await eventually(
            lambda before=before: not [one for one in room.processes("scripted-agent") if one.pid not in before],
            room.log,
        )
