"""Whatever people, agents and sandboxes do to a task's sessions, in whatever order: nothing is stuck. F5, F23, F26."""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from branchline.v1 import sandboxes_pb2, sessions_pb2, tasks_pb2
from branchline_internal.sandbox.v1.sandbox_pb2 import AgentSession, CloseSessionRequest, StartTurnRequest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.runtime.errors import DomainError
from services.task.open_task import OpenTask
from services.task.status import SESSION_WORKING
from services.task.store import QUEUED, QUEUED_OF_TASK
from tests.unit.task.room import Room, new_id, sandbox_of

CLOSED, IDLE = sessions_pb2.SESSION_STATUS_CLOSED, sessions_pb2.SESSION_STATUS_IDLE
RESTING = {tasks_pb2.TASK_STATUS_IDLE, tasks_pb2.TASK_STATUS_ERROR}
SESSIONS = 2
REPORTS = {
    "idle": sessions_pb2.SESSION_STATUS_IDLE,
    "error": sessions_pb2.SESSION_STATUS_ERROR,
    "waiting": sessions_pb2.SESSION_STATUS_WAITING,
    "running": sessions_pb2.SESSION_STATUS_RUNNING,
    "closed": sessions_pb2.SESSION_STATUS_CLOSED,
}
COMMANDS = ("send", "queue", "cancel", "close", "reopen", "refuse", "fail")

steps = st.lists(
    st.tuples(
        st.sampled_from([*COMMANDS, "send", "queue", "close", *REPORTS]),
        st.integers(0, SESSIONS - 1),
        st.integers(0, 1),
    ),
    max_size=14,
)


class History:
    """One task with its sessions, and what happens to it."""

    def __init__(self, room: Room, task: OpenTask) -> None:
        self.room = room
        self.task_id = task.task.id
        self.revision = 0

    async def step(self, what: str, place: int, back: int) -> None:
        """Do one thing; what is not allowed now is refused."""
        task = await self.room.read(self.task_id)
        session = task.sessions[place]
        if what in REPORTS:
            await self.report(session.id, REPORTS[what], session.turn - back)
        elif what == "fail":
            self.revision += 1
            await self.room.push(sandbox_of(task, sandboxes_pb2.SANDBOX_STATUS_ERROR, "power", self.revision))
        else:
            with suppress(DomainError):
                await self.command(what, session.id, session.turn)

    async def command(self, what: str, session_id: str, turn: int) -> None:
        this: dict[str, Any] = {"request_id": new_id(), "task_id": self.task_id, "session_id": session_id}
        sessions, write = self.room.sessions, self.room.database.write
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "send": lambda: write(sessions.send, sessions_pb2.SendMessageRequest(**this, text="do")),
            "queue": lambda: write(sessions.send, sessions_pb2.SendMessageRequest(**this, text="do", queue=True)),
            "cancel": lambda: write(sessions.cancel, sessions_pb2.CancelTurnRequest(**this)),
            "close": lambda: write(sessions.close, sessions_pb2.CloseSessionRequest(**this)),
            "reopen": lambda: write(sessions.reopen, sessions_pb2.ReopenSessionRequest(**this)),
            "refuse": lambda: self.room.change(
                self.task_id, lambda task: self.room.turns.give_up(task, task.session(session_id), turn, "not taken")
            ),
        }
        await calls[what]()

    async def report(self, session_id: str, status: sessions_pb2.SessionStatus.ValueType, turn: int) -> None:
        """Let the sandbox report on an agent; no report opens a closed session."""
        closed = await self.closed()
        self.revision += 1
        state = AgentSession(
            session_id=session_id, task_id=self.task_id, status=status, turn=max(turn, 0), revision=self.revision
        )
        assert await self.room.push(state) == {}
        assert closed <= await self.closed()

    async def closed(self) -> set[str]:
        return {one.id for one in (await self.room.read(self.task_id)).sessions if one.status == CLOSED}

    async def check(self) -> None:
        """Assert what is true at every moment."""
        task = await self.room.read(self.task_id)
        working = {one.id for one in task.sessions if one.status in SESSION_WORKING}
        closed = {one.id for one in task.sessions if one.status == CLOSED}
        queued = await self.room.database.read(lambda tx: QUEUED_OF_TASK(tx, task_id=self.task_id))

        assert bool(working) == (task.task.status not in RESTING), task.task
        assert len(working) <= 1
        assert not [one for one in queued if one.session_id in closed]
        assert [one.status for one in task.task.sessions] == [one.status for one in task.sessions]
        for session_id in closed:
            assert (await self.asked(session_id))[-1:] == [CloseSessionRequest.DESCRIPTOR.full_name]
        for session_id in working:
            assert (await self.asked(session_id))[-1:] == [StartTurnRequest.DESCRIPTOR.full_name]

    async def asked(self, session_id: str) -> list[str]:
        """Return what its sandbox is asked about a session's agent, oldest first."""
        listed = await self.room.outbox.listed(parked=False, destination="sandbox", after_seq=0, most=10_000)
        begins_or_ends = {StartTurnRequest.DESCRIPTOR.full_name, CloseSessionRequest.DESCRIPTOR.full_name}
        names = [row.type_url.rpartition("/")[2] for row in listed if row.entity_id == session_id]
        return [name for name in names if name in begins_or_ends]

    async def settle(self) -> None:
        """Let every agent end its turn, and every message be done that waits and can be."""
        for _ in range(40):
            task = await self.room.read(self.task_id)
            working = [one for one in task.sessions if one.status in SESSION_WORKING]
            if not working:
                return
            await self.report(working[0].id, IDLE, working[0].turn)
            await self.check()
        raise AssertionError("it never comes to rest")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps)
async def test_at_every_moment_sessions_can_be_ended_and_the_task_comes_to_rest(
    room: Room, happens: list[tuple[str, int, int]]
) -> None:
    history = History(room, await room.task(sessions=SESSIONS))

    for step in happens:
        await history.step(*step)
        await history.check()
    await history.settle()

    task = await room.read(history.task_id)
    queued = await room.database.read(lambda tx: QUEUED_OF_TASK(tx, task_id=history.task_id))
    assert task.task.status in RESTING
    assert not queued or task.task.status == tasks_pb2.TASK_STATUS_ERROR
    assert all(one.state == QUEUED for one in queued)
    for session in task.sessions:
        await history.command("close", session.id, session.turn)
    await history.check()
    assert {one.status for one in (await room.read(history.task_id)).sessions} == {CLOSED}
