"""Whatever people, agents and sandboxes do to a task's sessions, in whatever order: nothing is stuck. F5, F23, F26."""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from branchline.v1 import sandboxes_pb2, sessions_pb2
from branchline.v1.common_pb2 import FAILURE_REASON_INTERNAL, Prompt
from branchline.v1.sessions_pb2 import WHEN_BUSY_INTERRUPT, WHEN_BUSY_QUEUE, QueuedMessage, WhenBusy
from branchline.v1.transcripts_pb2 import InputAnswer, InputRequest, PermissionOption, PermissionRequest
from branchline_internal.sandbox.v1.sandbox_pb2 import (
    AgentSession,
    CloseSessionRequest,
    OpenSessionRequest,
    StartTurnRequest,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.runtime.errors import DomainError
from services.runtime.failures import failed
from services.task.inputs import PENDING
from services.task.open_task import OpenTask
from services.task.standing import FAILED, IDLE, SESSION_WORKING, TURN_FAILED
from tests.unit.task.room import Room, new_id, request_id, sandbox_of

CLOSED, AT_REST = sessions_pb2.SESSION_STATE_CLOSED, sessions_pb2.SESSION_STATE_IDLE
UNOPENED = sessions_pb2.SESSION_STATE_PENDING
RESTING = {IDLE, TURN_FAILED, FAILED}
SESSIONS = 2
MOST_SESSIONS = 4
REPORTS = {
    "idle": sessions_pb2.SESSION_STATE_IDLE,
    "failed": sessions_pb2.SESSION_STATE_FAILED,
    "waiting": sessions_pb2.SESSION_STATE_WAITING,
    "running": sessions_pb2.SESSION_STATE_RUNNING,
    "closed": sessions_pb2.SESSION_STATE_CLOSED,
}
COMMANDS = (
    "send",
    "queue",
    "interrupt",
    "retry",
    "cancel",
    "close",
    "reopen",
    "refuse",
    "lose",
    "create",
    "open",
    "not open",
    "move",
    "withdraw",
    "ask",
    "answer",
)
FAILURE = failed(FAILURE_REASON_INTERNAL, "not taken")

steps = st.lists(
    st.tuples(
        st.sampled_from([*COMMANDS, "send", "queue", "close", *REPORTS]),
        st.integers(0, MOST_SESSIONS - 1),
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
        self.asked_for: list[str] = []

    async def step(self, what: str, place: int, back: int) -> None:
        """Do one thing; what is not allowed now is refused."""
        task = await self.room.read(self.task_id)
        session = task.sessions[place % len(task.sessions)]
        if what in REPORTS:
            await self.report(session.id, REPORTS[what], session.turn - back)
        elif what == "lose":
            self.revision += 1
            await self.room.push(sandbox_of(task, sandboxes_pb2.SANDBOX_STATE_FAILED, "power", self.revision))
        elif what == "ask":
            await self.ask(session.id, session.turn - back)
        elif what != "create" or len(task.sessions) < MOST_SESSIONS:
            with suppress(DomainError):
                await self.command(what, session.id, session.turn)

    async def command(self, what: str, session_id: str, turn: int) -> None:
        this: dict[str, Any] = {"request_id": request_id(), "task_id": self.task_id, "session_id": session_id}
        sessions, turns, write = self.room.sessions, self.room.turns, self.room.database.write

        def change(do: Callable[[OpenTask], object]) -> Callable[[], Awaitable[object]]:
            return lambda: self.room.change(self.task_id, do)

        def say(when_busy: WhenBusy.ValueType) -> Callable[[], Awaitable[object]]:
            request = sessions_pb2.SendMessageRequest(**this, prompt=Prompt(text="do"), when_busy=when_busy)
            return lambda: write(sessions.send, request)

        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "send": say(sessions_pb2.WHEN_BUSY_REFUSE),
            "queue": say(WHEN_BUSY_QUEUE),
            "interrupt": say(WHEN_BUSY_INTERRUPT),
            "retry": lambda: write(sessions.retry, sessions_pb2.RetryTurnRequest(**this, turn=turn)),
            "cancel": lambda: write(sessions.cancel, sessions_pb2.CancelTurnRequest(**this, turn=turn)),
            "close": lambda: write(sessions.close, sessions_pb2.CloseSessionRequest(**this)),
            "reopen": lambda: write(sessions.reopen, sessions_pb2.ReopenSessionRequest(**this)),
            "refuse": change(lambda task: turns.give_up(task, task.session(session_id), turn, FAILURE)),
            "create": lambda: write(sessions.create, sessions_pb2.CreateSessionRequest(task_id=self.task_id)),
            "open": change(lambda task: turns.opened(task, task.session(session_id))),
            "not open": change(lambda task: turns.not_opened(task, task.session(session_id), FAILURE)),
            "move": self.move_last,
            "withdraw": self.withdraw_first,
            "answer": self.answer_all,
        }
        await calls[what]()

    async def move_last(self) -> None:
        """Have the last message that waits go first."""
        for message in (await self.room.queued(self.task_id))[-1:]:
            wanted = QueuedMessage(id=message.id, task_id=self.task_id, place=1)
            request = sessions_pb2.UpdateQueuedMessageRequest(queued_message=wanted)
            await self.room.database.write(self.room.sessions.change_queued, request)

    async def withdraw_first(self) -> None:
        for message in (await self.room.queued(self.task_id))[:1]:
            request = sessions_pb2.DeleteQueuedMessageRequest(task_id=self.task_id, queued_message_id=message.id)
            await self.room.database.write(self.room.sessions.delete_queued, request)

    async def ask(self, session_id: str, turn: int) -> None:
        """Let an agent ask for permission, in its turn or late."""
        asked = PermissionRequest(options=[PermissionOption(id="yes")])
        request = InputRequest(
            id=new_id("inp"),
            task_id=self.task_id,
            session_id=session_id,
            turn=turn,
            state=PENDING,
            permission=asked,
            revision=1,
        )
        self.asked_for.append(request.id)
        assert await self.room.push(request) == {}

    async def answer_all(self) -> None:
        for one in self.asked_for:
            request = sessions_pb2.AnswerInputRequestRequest(
                task_id=self.task_id, input_request_id=one, answer=InputAnswer(option_id="yes")
            )
            with suppress(DomainError):
                await self.room.database.write(self.room.sessions.answer, request)

    async def report(self, session_id: str, state: sessions_pb2.SessionState.ValueType, turn: int) -> None:
        """Let the sandbox report on an agent; no report opens a closed session."""
        closed = await self.closed()
        self.revision += 1
        told = AgentSession(
            session_id=session_id, task_id=self.task_id, state=state, turn=max(turn, 0), revision=self.revision
        )
        assert await self.room.push(told) == {}
        assert closed <= await self.closed()

    async def closed(self) -> set[str]:
        return {one.id for one in (await self.room.read(self.task_id)).sessions if one.state == CLOSED}

    async def check(self) -> None:
        """Assert what is true at every moment."""
        task = await self.room.read(self.task_id)
        working = {one.id: one.turn for one in task.sessions if one.state in SESSION_WORKING}
        closed = {one.id for one in task.sessions if one.state == CLOSED}
        queued = await self.room.queued(self.task_id)
        inputs = [await self.room.input(one) for one in self.asked_for]
        pending = [one for one in inputs if one.state == PENDING]

        assert bool(working) == (task.standing not in RESTING), task.task
        assert len(working) <= 1
        assert [one.place for one in queued] == list(range(1, len(queued) + 1))
        assert not [one for one in queued if one.session_id in closed]
        assert [one.state for one in task.task.sessions] == [one.state for one in task.sessions]
        assert task.task.pending_input_count == len(pending)
        assert all(working.get(one.session_id) == one.turn for one in pending)
        assert task.task.HasField("failure") == (task.standing in {TURN_FAILED, FAILED})
        for session_id in closed:
            assert (await self.told(session_id))[-1:] == [CloseSessionRequest.DESCRIPTOR.full_name]
        for session_id in [one.id for one in task.sessions if one.state == UNOPENED]:
            assert task.standing != FAILED  # whoever is to open it does so only where there is a sandbox
            assert (await self.told(session_id))[-1:] == [OpenSessionRequest.DESCRIPTOR.full_name]
        for session_id in working:
            assert (await self.told(session_id))[-1:] == [StartTurnRequest.DESCRIPTOR.full_name]

    async def told(self, session_id: str) -> list[str]:
        """Return what its sandbox is asked about a session's agent, oldest first."""
        listed = await self.room.outbox.listed(parked=False, destination="sandbox", after_seq=0, most=10_000)
        begins_or_ends = {
            one.DESCRIPTOR.full_name for one in (OpenSessionRequest, StartTurnRequest, CloseSessionRequest)
        }
        names = [row.type_url.rpartition("/")[2] for row in listed if row.entity_id == session_id]
        return [name for name in names if name in begins_or_ends]

    async def settle(self) -> None:
        """Let every agent end its turn, and every message be done that waits and can be."""
        for _ in range(40):
            task = await self.room.read(self.task_id)
            working = [one for one in task.sessions if one.state in SESSION_WORKING]
            if not working:
                return
            await self.report(working[0].id, AT_REST, working[0].turn)
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
    assert task.standing in RESTING
    assert not await room.queued(history.task_id) or task.standing in {TURN_FAILED, FAILED}
    for session in task.sessions:
        await history.command("close", session.id, session.turn)
    await history.check()
    assert {one.state for one in (await room.read(history.task_id)).sessions} == {CLOSED}
