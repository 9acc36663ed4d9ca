"""The sandbox service alone, with the real sandbox-agent: killed, paused and cut at the moments that hurt."""

import asyncio
import json
import os
import socket
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import pytest_asyncio
from branchline.v1 import sandboxes_pb2 as machine_pb2
from branchline.v1 import sessions_pb2
from branchline.v1 import transcripts_pb2 as transcripts
from branchline.v1.common_pb2 import (
    FAILURE_REASON_AGENT_EXITED,
    FAILURE_REASON_AGENT_SILENT,
    FAILURE_REASON_SANDBOX_LOST,
    FAILURE_REASON_TIMED_OUT,
)
from branchline_internal.sandbox.v1 import sandbox_pb2

from services.sandbox.providers.processes import is_root
from tests.support.sandbox import SANDBOX, SESSION, Room, eventually, sandbox_room

IDLE, ERROR = sessions_pb2.SESSION_STATE_IDLE, sessions_pb2.SESSION_STATE_FAILED
WAITING, RUNNING = sessions_pb2.SESSION_STATE_WAITING, sessions_pb2.SESSION_STATE_RUNNING
CLOSED = sessions_pb2.SESSION_STATE_CLOSED
SLOW = "\n".join(f"say word{number}\nwait 0.1" for number in range(1, 16))
SLOW_WORDS = "".join(f"word{number}\n" for number in range(1, 16)) + "Done.\n"


@pytest_asyncio.fixture
async def room(tmp_path: Path, request: Any) -> AsyncGenerator[Room, None]:
    async with sandbox_room(tmp_path, **getattr(request, "param", {})) as made:
        yield made


def limits(**given: float) -> Any:
    return pytest.mark.parametrize("room", [{"limits": given}], indirect=True, ids=["short"])


async def restarted(room: Room) -> None:
    """Start the service again once it was killed at its moment."""
    await room.killed()
    await room.start()


async def test_a_turn_is_done_and_brings_the_commit_at_the_tip(room: Room) -> None:  # C3, C12
    await room.start()
    await room.open()

    ended = await room.turn(1, "say hello there\nwrite a.txt: a\ncommit A")

    assert ended.state == IDLE, ended
    head = await room.execute("cd workspace && git rev-parse HEAD")
    assert ended.head_commit == head.stdout.strip()
    assert room.coordinator.said().startswith("hello there\n")
    assert [state.state for state in room.coordinator.sessions] == [IDLE, IDLE]  # once opened, and at the end


@pytest.mark.parametrize("turn", [1, 2])
async def test_a_kill_exactly_before_the_prompt_is_posted_loses_no_turn(room: Room, turn: int) -> None:  # F1
    await room.start(kill_at=f"prompt stored/{turn}")
    await room.open()
    if turn == 2:
        await room.turn(1, "say first")

    await room.prompt(turn, "append done.txt: done\nsay last")
    await restarted(room)

    assert (await room.ended(turn)).state == IDLE
    assert await room.file("done.txt") == "done\n"
    assert room.coordinator.said().count("last\n") == 1


@pytest.mark.parametrize("text", ["wait 1\nappend done.txt: done\nsay last", "append done.txt: done\nwait 1\nsay last"])
async def test_a_prompt_that_may_have_arrived_is_worked_on_once(room: Room, text: str) -> None:  # F1, F28
    await room.start(kill_at="prompt posted")
    await room.open()

    await room.prompt(1, text)
    await restarted(room)

    assert (await room.ended(1)).state == IDLE
    assert await room.file("done.txt") == "done\n"
    assert room.coordinator.said().count("last\n") == 1


async def test_a_prompt_that_arrived_is_not_sent_again_while_the_agent_thinks(room: Room) -> None:  # F28
    await room.start()
    await room.open()
    await room.prompt(1, "wait 9\nappend done.txt: done")
    await asyncio.sleep(1)  # the second mark is stored

    await room.kill()
    await room.start()

    assert (await room.ended(1)).state == IDLE
    assert await room.file("done.txt") == "done\n"
    assert room.coordinator.stop_reasons() == [transcripts.STOP_REASON_END_TURN]


async def test_a_kill_between_the_end_of_a_turn_and_its_commit_loses_nothing(room: Room) -> None:  # F18
    await room.start(kill_at="turn ended")
    await room.open()

    await room.prompt(1, SLOW)
    await restarted(room)

    assert (await room.ended(1)).state == IDLE
    assert room.coordinator.said() == SLOW_WORDS


@pytest.mark.parametrize(
    ("moment", "text"),
    [
        ("turn ended", SLOW),
        ("turn ended", "say word1\nfail broken"),
        ("prompt stored", SLOW),
        ("prompt posted", SLOW),
        ("answer told", "ask May I?\nsay word1"),
        ("cancel wanted", "say word1\nwait 60"),
    ],
)
async def test_an_ordinary_stop_at_any_moment_of_a_turn_loses_nothing(
    room: Room, moment: str, text: str
) -> None:  # F18
    await room.start(kill_at=f"{moment}/1/stop")
    await room.open()

    await room.prompt(1, text)
    if moment == "answer told":
        await room.answer((await room.question()).id, "allow")
    if moment == "cancel wanted":
        await room.until_said("word1")
        await room.cancel(1)
    assert room.process is not None
    assert await asyncio.wait_for(room.process.wait(), 30) == 0, room.log()
    assert room.coordinator.ended(1) is None
    await room.start()

    assert (await room.ended(1)).state == (ERROR if "fail" in text else IDLE)
    assert room.coordinator.said().startswith("word1\n")
    assert text != SLOW or room.coordinator.said() == SLOW_WORDS
    assert len([state for state in room.coordinator.sessions if state.turn and state.state in {IDLE, ERROR}]) == 1
    assert len(room.coordinator.shown("turn_end")) == 1


async def test_a_kill_in_mid_turn_loses_and_doubles_no_word(room: Room) -> None:  # SES-7
    await room.start()
    await room.open()
    await room.prompt(1, SLOW)
    await room.until_said("word2")

    await room.kill()
    await room.start()

    assert (await room.ended(1)).state == IDLE
    assert room.coordinator.said() == SLOW_WORDS


async def test_an_agent_that_ends_its_turn_while_the_service_is_stopped_is_heard(room: Room) -> None:  # F18
    await room.start()
    await room.open()
    await room.prompt(1, SLOW)
    await room.until_said("word2")

    await room.stop()
    await asyncio.sleep(3)  # the agent ends meanwhile
    await room.start()

    assert (await room.ended(1)).state == IDLE
    assert room.coordinator.said() == SLOW_WORDS


async def test_what_the_ring_of_the_server_forgot_is_counted_in_the_transcript(room: Room) -> None:  # F19
    await room.start()
    await room.open()
    await room.prompt(1, "say first\nwait 1\nrepeat 3000 word")
    await room.until_said("first")

    await room.kill()
    await asyncio.sleep(4)
    await room.start()

    assert (await room.ended(1)).state == IDLE
    notices = [entry.notice for entry in room.coordinator.shown("notice")]
    notes = [notice.text for notice in notices if notice.kind == transcripts.NOTICE_KIND_EVENTS_LOST]
    said = room.coordinator.said().count("word ")
    assert len(notes) == 1
    lost = int(notes[0].partition(" ")[0])
    assert lost > 0
    assert abs(said + lost - 3000) <= 5  # the marks and the last words of the first line are numbered, too


async def test_a_machine_that_is_paused_for_six_seconds_goes_on_with_its_agent(room: Room) -> None:  # F21
    await room.start()
    await room.open()
    await room.prompt(1, f"say begun\nwait 3\n{SLOW}")
    await room.until_said("begun")
    server, agents = room.server(), {agent.pid for agent in room.agents()}

    server.suspend()
    looking = asyncio.ensure_future(room.execute("true"))
    await asyncio.sleep(6)
    server.resume()

    assert (await looking).exit_code == 0
    assert (await room.ended(1)).state == IDLE
    assert room.coordinator.said() == f"begun\n{SLOW_WORDS}"
    assert {agent.pid for agent in room.agents()} == agents


@pytest.mark.skipif(not is_root(), reason="only root can listen as a sandbox's user")
@limits(stream_seconds=2.0)
async def test_a_stream_that_is_half_open_is_given_up(room: Room) -> None:  # F29
    await room.start()
    await room.open()
    await room.kill()
    known = room.folder / "data" / "local" / SANDBOX / "server.json"
    written = json.loads(known.read_text())
    async with Proxy(written["port"], (known.parent / "home").stat().st_uid) as proxy:
        known.write_text(json.dumps({**written, "port": proxy.port}))
        await room.start()
        await room.prompt(1, f"say begun\nwait 1\n{SLOW}")
        await room.until_said("begun")

        proxy.freeze()  # what is open stays open, and nothing comes

        assert (await room.ended(1)).state == IDLE
        assert room.coordinator.said() == f"begun\n{SLOW_WORDS}"


async def test_a_wish_to_cancel_outlives_a_kill(room: Room) -> None:  # F20
    await room.start(kill_at="cancel wanted")
    await room.open()
    await room.prompt(1, "say begun\nwait 60")
    await room.until_said("begun")

    with suppress(grpc.aio.AioRpcError):
        await room.cancel(1)
    await restarted(room)

    assert (await room.ended(1)).state == IDLE
    assert room.coordinator.stop_reasons() == [transcripts.STOP_REASON_CANCELLED]


@limits(cancel_seconds=1.0)
async def test_an_agent_that_does_not_obey_is_ended_with_all_it_started(room: Room) -> None:
    await room.start()
    await room.open()
    await room.prompt(1, "say begun\nrun sleep 300")
    await eventually(lambda: room.processes("sleep 300"))
    for agent in room.agents():
        agent.suspend()

    await room.cancel(1)

    assert (await room.ended(1)).state == IDLE
    assert not room.agents()
    assert not room.processes("sleep 300")
    assert (await room.turn(2, "say again")).state == IDLE


@limits(silence_seconds=1.0, answer_seconds=1.0)
async def test_a_silent_agent_is_probed_and_ended(room: Room) -> None:
    await room.start()
    await room.open()
    await room.prompt(1, "say begun\nwait 60")
    await room.until_said("begun")
    silent = room.agents()
    for agent in silent:
        agent.suspend()

    ended = await room.ended(1)

    assert (ended.state, ended.failure.reason) == (ERROR, FAILURE_REASON_AGENT_SILENT)
    assert not psutil.wait_procs(silent, timeout=1)[1]
    assert (await room.turn(2, "say again")).state == IDLE


@limits(silence_seconds=0.5, answer_seconds=1.0)
async def test_an_agent_that_only_thinks_gives_a_sign_of_life_and_is_left_alone(room: Room) -> None:
    await room.start()
    await room.open()

    assert (await room.turn(1, "wait 4\nsay thought")).state == IDLE


@limits(turn_seconds=3.0)
async def test_a_turn_ends_after_its_time_whatever_it_does(room: Room) -> None:
    await room.start()
    await room.open()
    await room.turn(1, "say quick")
    await room.prompt(2, "run while :; do echo x; sleep 0.1; done")

    ended = await room.ended(2)

    assert ended.state == ERROR
    assert ended.failure.reason == FAILURE_REASON_TIMED_OUT
    await eventually(lambda: not room.processes("echo x"))


async def test_a_turn_that_ends_in_error_leaves_no_agent_behind(room: Room) -> None:  # F5
    await room.start()
    await room.open()
    await room.prompt(1, "run (sleep 301 >/dev/null 2>&1 &)\nfail broken")

    assert (await room.ended(1)).state == ERROR
    assert (await room.turn(2, "say again")).state == IDLE

    assert len(room.agents()) == 1
    assert not room.processes("sleep 301")


async def test_an_agent_that_dies_ends_the_turn_with_its_code(room: Room) -> None:  # SES-8
    await room.start()
    await room.open()

    ended = await room.turn(1, "die 3")

    assert ended.state == ERROR
    assert ended.failure.reason == FAILURE_REASON_AGENT_EXITED
    assert "exit code 3" in ended.failure.message
    assert (await room.turn(2, "say again")).state == IDLE


async def test_an_agent_that_ends_while_it_starts_is_told_at_once_with_its_code(tmp_path: Path) -> None:  # SES-8
    async with sandbox_room(tmp_path, local={"agents": {"mock": ["sh", "-c", "exit 126"]}}) as room:
        await room.start()
        started = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError, match="mock did not start: it ended with code 126"):
            await room.open()
        assert time.monotonic() - started < 15
        assert not room.agents()
        await room.stop()


async def test_an_agent_that_died_between_turns_is_replaced(room: Room) -> None:
    await room.start()
    await room.open()
    await room.turn(1, "say first")
    for agent in room.agents():
        agent.kill()

    assert (await room.turn(2, "append done.txt: done")).state == IDLE
    assert await room.file("done.txt") == "done\n"


async def test_permission_is_asked_answered_and_the_turn_goes_on(room: Room) -> None:  # SES-5, F26
    await room.start()
    await room.open()
    await room.prompt(1, "ask May I?\nwait 0.5\nsay allowed")
    asked = await room.question()

    await room.answer(asked.id, "allow")
    await room.answer(asked.id, "reject")  # late, and dropped

    assert (await room.ended(1)).state == IDLE
    assert "allowed\n" in room.coordinator.said()
    assert [state.state for state in room.coordinator.sessions] == [IDLE, WAITING, RUNNING, IDLE]
    told = room.coordinator.requests[asked.id]
    assert (told.state, told.answer.option_id) == (transcripts.INPUT_REQUEST_STATE_ANSWERED, "allow")


async def test_an_answer_that_was_given_is_shown_though_the_service_dies_in_it(room: Room) -> None:
    await room.start(kill_at="answer told")
    await room.open()
    await room.prompt(1, "ask May I?")
    question = await room.question()

    await room.answer(question.id, "allow")
    await room.killed()
    await asyncio.sleep(1)  # the agent ends its turn meanwhile
    await room.start()

    assert (await room.ended(1)).state == IDLE
    told = room.coordinator.requests[question.id]
    assert (told.state, told.answer.option_id) == (transcripts.INPUT_REQUEST_STATE_ANSWERED, "allow")
    assert told.answered_by.user_id == "usr_1"


async def test_an_open_question_is_cancelled_with_its_turn_and_late_answers_are_dropped(room: Room) -> None:
    await room.start()
    await room.open()
    await room.prompt(1, "ask May I?\nwrite forbidden.txt: x")
    asked = await room.question()

    await room.cancel(1)
    await room.answer(asked.id, "allow")

    assert (await room.ended(1)).state == IDLE
    assert room.coordinator.requests[asked.id].state == transcripts.INPUT_REQUEST_STATE_CANCELLED
    assert (await room.execute("ls workspace/forbidden.txt")).exit_code != 0


async def test_a_closed_session_has_no_agent_left_when_it_says_so(room: Room) -> None:  # F8
    await room.start()
    await room.open()
    await room.turn(1, "run (sleep 302 >/dev/null 2>&1 &)")
    close = sandbox_pb2.CloseSessionRequest(session_id=SESSION)

    await asyncio.gather(*(room.stub.CloseSession(close, timeout=5) for _ in range(3)))
    await eventually(lambda: [state for state in room.coordinator.sessions if state.state == CLOSED])

    assert not room.agents()
    assert not room.processes("sleep 302")
    assert (await room.turn(2, "say reopened")).state == IDLE


@limits(head_seconds=1.0)
async def test_git_that_hangs_does_not_hold_up_the_end_of_a_turn(room: Room) -> None:  # F10, F18
    await room.start()
    await room.open()
    await room.execute("cd workspace && rm .git/HEAD && mkfifo .git/HEAD")

    await room.prompt(1, "say done")
    ended = await room.ended(1, seconds=15)

    assert (ended.state, ended.head_commit) == (IDLE, "")


async def test_nothing_that_an_agent_says_makes_a_large_entity(room: Room) -> None:  # F22
    await room.start()
    await room.open()

    await room.prompt(1, f"run head -c 3000000 /dev/zero | tr '\\0' x\nsay {'w' * 20_000}\nask {'q' * 30_000}")
    asked = await room.question()
    await room.answer(asked.id, "reject")

    assert (await room.ended(1)).state == IDLE
    assert room.coordinator.largest < 64 * 1024


async def test_destroying_a_sandbox_ends_the_turns_in_it(room: Room) -> None:  # F23
    await room.start()
    await room.open()
    await room.prompt(1, "say begun\nwait 60")
    await room.until_said("begun")

    await room.stub.DestroySandbox(sandbox_pb2.DestroySandboxRequest(sandbox_id=SANDBOX), timeout=30)

    ended = await room.ended(1)
    assert (ended.state, ended.failure.reason) == (ERROR, FAILURE_REASON_SANDBOX_LOST)
    assert not room.processes("")
    assert room.coordinator.sandboxes[-1].state == machine_pb2.SANDBOX_STATE_DESTROYED


class Proxy:
    """Stands between the service and a server, as the server's user, and can hold its tongue on what is open."""

    def __init__(self, target: int, user_id: int) -> None:
        self._target = target
        self._user_id = user_id
        self._flowing: set[asyncio.Task[None]] = set()
        self._kept: list[asyncio.StreamWriter] = []
        self.port = 0

    async def __aenter__(self) -> "Proxy":
        os.seteuid(self._user_id)
        try:
            listening = socket.create_server(("127.0.0.1", 0))
        finally:
            os.seteuid(0)
        self._server = await asyncio.start_server(self._connect, sock=listening)
        self.port = listening.getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.freeze()
        self._server.close()
        for writer in self._kept:
            writer.close()

    def freeze(self) -> None:
        for task in self._flowing:
            task.cancel()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._target)
        self._kept += [writer, back]
        for source, sink in ((reader, back), (there, writer)):
            task = asyncio.create_task(self._pump(source, sink))
            self._flowing.add(task)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(asyncio.CancelledError, ConnectionError):
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
            sink.close()
