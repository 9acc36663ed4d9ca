"""Processes in a real machine: their output, input, signals, terminals and ends, and that they outlive the service."""

import asyncio
import contextlib
import json
import signal
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import pytest_asyncio
from branchline.v1 import processes_pb2
from branchline.v1.common_pb2 import (
    FAILURE_REASON_DIRECTORY_NOT_FOUND,
    FAILURE_REASON_INTERNAL,
    FAILURE_REASON_PROGRAM_NOT_FOUND,
    FAILURE_REASON_SANDBOX_LOST,
)
from branchline.v1.processes_pb2 import (
    DETACH_BEHAVIOR_STOP,
    PROCESS_STATE_ENDED,
    PROCESS_STATE_RUNNING,
    Process,
    ProcessEnd,
    ProcessSpec,
    StartProcessRequest,
    TerminalSize,
    WatchProcessRequest,
    WatchProcessResponse,
    WriteProcessInputRequest,
)

from cli.installation import python_paths
from services.runtime.clock import Clock
from services.runtime.config import read_config
from services.runtime.database import Database
from services.runtime.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    ResourceExhausted,
    Unavailable,
)
from services.runtime.principal import Principal, bind_principal
from services.runtime.spine.commands import Commands
from services.runtime.spine.outbox import COORDINATOR, Outbox
from services.sandbox import process_store
from services.sandbox.http import Http
from services.sandbox.machines import Machines
from services.sandbox.process_files import Status
from services.sandbox.process_follower import Follower, Pace
from services.sandbox.process_store import ProcessStore
from services.sandbox.processes import Processes
from services.sandbox.providers.local import LocalProvider, LocalProviderConfig
from services.sandbox.public_processes import ProcessServicer
from services.sandbox.store import SandboxStore

AGENT_SERVER = Path("node_modules/@sandbox-agent/cli-linux-x64/bin/sandbox-agent").absolute()
TASK, SANDBOX = "task_1", "sbx_1"
ID = "0192a000-0000-7000-8000-00000000000{}"
CONTEXT: Any = None


@dataclass
class Room:
    """A sandbox with its processes, and the part of the service that follows them."""

    database: Database
    machines: Machines
    provider: LocalProvider
    sandboxes: SandboxStore
    outbox: Outbox
    pace: Pace = field(default_factory=Pace)
    processes: Processes = field(init=False)
    public: ProcessServicer = field(init=False)
    following: "list[asyncio.Task[None]]" = field(default_factory=list["asyncio.Task[None]"])

    def __post_init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Begin as the service does, with nothing but the database and the machine."""
        store = ProcessStore(self.outbox, Clock())
        self.processes = Processes(self.database, store, self.machines, Clock(), self.pace)
        self.public = ProcessServicer(
            self.database, Commands(self.database, Clock()), self.sandboxes, store, self.processes
        )
        self.following.append(asyncio.ensure_future(self.processes.run()))

    async def stop(self) -> None:
        """End as if killed: nothing is written any more."""
        for task in self.following:
            task.cancel()
        await asyncio.gather(*self.following, return_exceptions=True)
        self.following.clear()

    async def start(self, *command: str, request_id: str = "", sandbox_id: str = "", **given: Any) -> Process:
        spec = ProcessSpec(command=command, **given)
        request = StartProcessRequest(request_id=request_id, task_id=TASK, sandbox_id=sandbox_id, spec=spec)
        return (await self.public.StartProcess(request, CONTEXT)).process

    async def sh(self, script: str, **given: Any) -> Process:
        return await self.start("sh", "-c", script, **given)

    def watch(
        self, process: Process, offset: int = 0, heartbeat: int = 0
    ) -> AsyncGenerator[WatchProcessResponse, None]:
        request = WatchProcessRequest(task_id=TASK, process_id=process.id, offset=offset)
        if heartbeat:
            request.heartbeat_interval.FromSeconds(heartbeat)
        return self.public.WatchProcess(request, CONTEXT)

    async def all_of(self, process: Process, offset: int = 0) -> list[WatchProcessResponse]:
        async with asyncio.timeout(30):
            return [response async for response in self.watch(process, offset) if not response.HasField("heartbeat")]

    async def said(self, process: Process, offset: int = 0) -> bytes:
        return b"".join(one.output.data for one in await self.all_of(process, offset))

    async def write(self, process: Process, offset: int, data: bytes, *, close: bool = False) -> int:
        request = WriteProcessInputRequest(task_id=TASK, process_id=process.id, offset=offset, data=data, close=close)
        return (await self.public.WriteProcessInput(request, CONTEXT)).offset

    async def signal(self, process: Process, name: int, request_id: str = "") -> Process:
        request = processes_pb2.SignalProcessRequest(
            request_id=request_id, task_id=TASK, process_id=process.id, signal=processes_pb2.Signal.ValueType(name)
        )
        return (await self.public.SignalProcess(request, CONTEXT)).process

    async def held(self, process: Process) -> Process:
        return await self.database.read(self.processes.store.get, process.id)

    async def until(self, process: Process, holds: Callable[[Process], bool], seconds: float = 30.0) -> Process:
        async with asyncio.timeout(seconds):
            while not holds(now := await self.held(process)):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        return now

    async def ended(self, process: Process) -> Process:
        return await self.until(process, lambda now: now.state == PROCESS_STATE_ENDED)

    async def running(self, process: Process) -> Process:
        return await self.until(process, lambda now: now.state == PROCESS_STATE_RUNNING)

    async def seen(self, process: Process, words: bytes) -> None:
        """Wait until the process has said something."""
        async with asyncio.timeout(30), aclosing(self.watch(process)) as responses:
            said = b""
            async for response in responses:
                said += response.output.data
                if words in said:
                    return
        raise AssertionError(said)

    def runner(self, process: Process) -> psutil.Process:
        [found] = [one for one in self.provider.processes.of(SANDBOX) if process.id in " ".join(one.cmdline())]
        return found


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@asynccontextmanager
async def a_room(
    database: Database, sandboxes: SandboxStore, outbox: Outbox, folder: Path
) -> AsyncGenerator[Room, None]:
    http = Http()
    config = {
        "sandbox_agent": AGENT_SERVER,
        "isolation": "none",
        "user_ids": (0, 0),
        "readable_paths": python_paths(),
    }
    provider = LocalProvider(folder, read_config(LocalProviderConfig, config), lambda: http)
    machines = Machines(database, sandboxes, Clock(), lambda: http, {"local": provider})
    await machines.create(SANDBOX, TASK, "org_1", "local")
    (folder / SANDBOX / "home" / "workspace" / "inner").mkdir(parents=True, exist_ok=True)
    bind_principal(Principal(user_id="user_1", organization_id="org_1", role=2))
    room = Room(database, machines, provider, sandboxes, outbox)
    try:
        yield room
    finally:
        bind_principal(None)
        await room.stop()
        await provider.destroy(SANDBOX)
        await http.close()


@pytest_asyncio.fixture
async def room(
    database: Database, sandboxes: SandboxStore, outbox: Outbox, tmp_path: Path
) -> AsyncGenerator[Room, None]:
    async with a_room(database, sandboxes, outbox, tmp_path / "local") as made:
        bind_principal(Principal(user_id="user_1", organization_id="org_1", role=2))
        yield made


def outputs(responses: list[WatchProcessResponse]) -> list[tuple[int, int, bytes]]:
    found = [one.output for one in responses if one.HasField("output")]
    return [(one.offset, one.stream, one.data) for one in found]


async def told(outbox: Outbox) -> list[Process]:
    line = outbox.line(COORDINATOR)
    line.fall_behind()
    rows = await asyncio.wait_for(line.take(1000), 5)
    return [Process.FromString(row.payload) for row in rows if row.holds(Process)]


async def test_both_streams_come_in_order_with_offsets_over_both(room: Room) -> None:
    process = await room.sh("printf one; sleep 0.3; printf two >&2; sleep 0.3; printf three; exit 7")
    assert process.id.startswith("proc_")
    assert (process.creator.user_id, process.sandbox_id) == ("user_1", SANDBOX)
    responses = await room.all_of(process)
    assert outputs(responses) == [(0, 1, b"one"), (3, 2, b"two"), (6, 1, b"three")]
    assert responses[-1].end.exit_code == 7
    assert 0.5 < responses[-1].end.run_duration.ToTimedelta().total_seconds() < 5
    held = await room.held(process)
    assert (held.state, held.output_tail, held.output_bytes) == (PROCESS_STATE_ENDED, b"onetwothree", 11)
    assert await room.said(process, 4) == b"wothree"
    assert await room.said(process, -5) == b"three"
    assert await room.said(process, 11) == b""
    assert await room.said(process, 99) == b""


async def test_it_runs_where_and_with_what_it_is_told_and_secrets_are_not_shown(room: Room, tmp_path: Path) -> None:
    process = await room.sh('pwd; echo "$TOKEN"; ls -a "$OLDPWD"', directory="inner", environment={"TOKEN": "secret"})
    where, token = (await room.said(process)).decode().splitlines()[:2]
    assert (where.endswith("workspace/inner"), token) == (True, "secret")
    held = await room.held(process)
    assert dict(held.spec.environment) == {"TOKEN": ""}
    assert (await room.database.read(room.processes.store.whole, process.id))[0] == ProcessSpec()
    folder = tmp_path / "local" / SANDBOX / "home/.branchline/processes" / process.id
    assert (folder / "state.json").exists()
    assert not (folder / "spec.json").exists()


async def test_a_start_that_is_repeated_is_made_once(room: Room) -> None:
    first, second = [await room.sh("echo x >> count", request_id=ID.format(1)) for _ in range(2)]
    assert first.id == second.id
    await room.ended(first)
    assert await room.said(await room.start("cat", "count")) == b"x\n"


async def test_what_cannot_be_started_is_refused_or_told(room: Room, tmp_path: Path) -> None:
    for given in ({"directory": "/etc"}, {"directory": "../.."}):
        with pytest.raises(InvalidArgument):
            await room.start("true", **given)
    for command in ([""], ["echo", "\0"]):
        with pytest.raises(InvalidArgument):
            await room.start(*command)
    with pytest.raises(FailedPrecondition):
        await room.start("true", sandbox_id="sbx_other")
    program = await room.ended(await room.start("no-such-program"))
    assert program.end.failure.reason == FAILURE_REASON_PROGRAM_NOT_FOUND
    directory = await room.ended(await room.start("true", directory="missing"))
    assert directory.end.failure.reason == FAILURE_REASON_DIRECTORY_NOT_FOUND
    assert "missing" in directory.end.failure.message
    (tmp_path / "local" / SANDBOX / "home/workspace/notes").write_text("")
    closed = await room.ended(await room.start("./notes"))
    assert closed.end.failure.reason == FAILURE_REASON_PROGRAM_NOT_FOUND
    assert "Permission denied" in closed.end.failure.message
    assert not any(one.end.failure.retryable for one in (program, directory, closed))
    await room.machines.destroy(SANDBOX)
    with pytest.raises(FailedPrecondition):
        await room.start("true")


async def test_another_organization_sees_no_process(room: Room) -> None:
    process = await room.sh("true")
    bind_principal(Principal(user_id="user_2", organization_id="org_2", role=3))
    with pytest.raises(NotFound):
        await room.all_of(process)
    with pytest.raises(FailedPrecondition):
        await room.start("true")


async def test_input_is_taken_once_by_its_offset(room: Room) -> None:
    process = await room.start("cat")
    assert await room.write(process, 0, b"hello ") == 6
    assert await room.write(process, 0, b"hello ") == 6
    assert await room.write(process, 3, b"lo world") == 11
    with pytest.raises(OutOfRange) as refused:
        await room.write(process, 12, b"x")
    assert (refused.value.reason, refused.value.metadata["offset"]) == ("OFFSET_GAP", "11")
    assert await room.write(process, 11, b"!", close=True) == 12
    assert await room.said(process) == b"hello world!"
    assert (await room.ended(process)).end.exit_code == 0
    assert await room.write(process, 11, b"!", close=True) == 12  # the answer may have been lost
    with pytest.raises(FailedPrecondition) as over:
        await room.write(process, 12, b"more")
    assert over.value.reason == "PROCESS_ENDED"


async def test_input_after_its_end_is_refused(room: Room) -> None:
    process = await room.sh("cat; sleep 30")
    await room.write(process, 0, b"a", close=True)
    assert await room.write(process, 0, b"a", close=True) == 1
    with pytest.raises(FailedPrecondition) as refused:
        await room.write(process, 1, b"b")
    assert refused.value.reason == "STATE_FORBIDS"


async def test_much_input_waits_for_who_reads_slowly(room: Room) -> None:
    process = await room.sh("sleep 0.5; wc -c")
    offset = 0
    for _ in range(20):
        offset = await room.write(process, offset, b"x" * 65536)
    await room.write(process, offset, b"", close=True)
    assert (await room.said(process)).strip() == str(20 * 65536).encode()


async def test_a_signal_reaches_all_that_was_started(room: Room, tmp_path: Path) -> None:
    process = await room.sh("setsid sleep 97 & sleep 98 & echo up; wait")
    await room.seen(process, b"up")
    await room.signal(process, processes_pb2.SIGNAL_TERM, ID.format(2))
    assert (await room.ended(process)).end.signal == signal.SIGTERM
    assert not [one for one in room.provider.processes.of(SANDBOX) if one.cmdline()[:1] == ["sleep"]]
    again = await room.signal(process, processes_pb2.SIGNAL_TERM)
    assert again.state == PROCESS_STATE_ENDED


async def test_a_process_that_takes_too_long_is_killed(room: Room) -> None:
    spec = ProcessSpec()
    spec.timeout.FromMilliseconds(300)
    process = await room.start("sleep", "60", timeout=spec.timeout)
    end = (await room.ended(process)).end
    assert (end.timed_out, end.signal) == (True, signal.SIGTERM)


async def test_a_terminal_has_a_size_and_job_control(room: Room) -> None:
    process = await room.start("sh", terminal={"rows": 33, "columns": 99})
    offset = await room.write(process, 0, b"stty size\n")
    await room.seen(process, b"33 99")
    size = TerminalSize(rows=44, columns=88)
    request = processes_pb2.ResizeTerminalRequest(task_id=TASK, process_id=process.id, size=size)
    await room.public.ResizeTerminal(request, CONTEXT)
    offset = await room.write(process, offset, b"stty size; echo $TERM\n")
    await room.seen(process, b"44 88\r\nxterm-256color")
    offset = await room.write(process, offset, b"sleep 99\n")
    await asyncio.sleep(0.3)
    offset = await room.write(process, offset, b"\x03echo interrupted $?\n")
    await room.seen(process, b"interrupted 130")
    await room.write(process, offset, b"exit 5\n")
    assert (await room.ended(process)).end.exit_code == 5


async def test_only_terminals_have_a_size(room: Room) -> None:
    process = await room.start("sleep", "30")
    request = processes_pb2.ResizeTerminalRequest(
        task_id=TASK, process_id=process.id, size=TerminalSize(rows=4, columns=8)
    )
    with pytest.raises(FailedPrecondition):
        await room.public.ResizeTerminal(request, CONTEXT)


async def test_output_is_bounded_and_a_gap_is_told(room: Room, tmp_path: Path) -> None:
    process = await room.sh("head -c 5000000 /dev/zero | tr '\\0' x; printf end >&2")
    await room.ended(process)
    responses = await room.all_of(process)
    kept = responses[0].gap.next_offset
    assert 5_000_003 - 1024 * 1024 - 100_000 < kept < 5_000_003 - 400_000
    at = kept
    for one in responses[1:-1]:
        assert one.output.offset == at
        at += len(one.output.data)
        assert len(one.output.data) <= 65536
    assert at == 5_000_003
    assert responses[-2].output.data.endswith(b"end")
    held = await room.held(process)
    assert (held.output_bytes, held.kept_offset, len(held.output_tail)) == (5_000_003, kept, 65536)
    folder = tmp_path / "local" / SANDBOX / "home/.branchline/processes" / process.id
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 3 * 1024 * 1024


async def test_several_watch_at_once_and_a_watcher_that_goes_ends_nothing(room: Room) -> None:
    process = await room.sh("for i in 1 2 3 4 5 6; do echo $i; sleep 0.1; done")
    leaving = room.watch(process)
    await anext(leaving)
    await leaving.aclose()
    first, second = await asyncio.gather(room.said(process), room.said(process, 4))
    assert (first, second) == (b"1\n2\n3\n4\n5\n6\n", b"3\n4\n5\n6\n")


async def test_a_quiet_process_gives_signs_of_life(room: Room) -> None:
    process = await room.start("sleep", "30")
    async with asyncio.timeout(10), aclosing(room.watch(process, heartbeat=1)) as responses:
        assert (await anext(responses)).HasField("heartbeat")
        assert (await anext(responses)).HasField("heartbeat")


async def test_what_runs_is_told_now_and_then_and_its_end_at_once(room: Room, outbox: Outbox) -> None:
    room.processes.pace = room.pace = Pace(tell_seconds=0.5)
    process = await room.sh("for i in $(seq 40); do echo $i; sleep 0.05; done; exit 1")
    assert [one.state for one in await told(outbox)] == [processes_pb2.PROCESS_STATE_STARTING]
    running = await room.running(process)
    assert running.state == PROCESS_STATE_RUNNING
    held = await room.ended(process)
    assert 4 <= held.revision <= 9  # 2 s of output, told twice a second
    [last] = await told(outbox)
    assert last == held
    assert last.output_tail.endswith(b"40\n")


async def test_what_nobody_watches_any_more_is_stopped_where_that_is_wanted(room: Room) -> None:
    room.processes.pace = room.pace = Pace(detach_seconds=0.5)
    never = await room.start("sleep", "50", detach_behavior=DETACH_BEHAVIOR_STOP)
    kept = await room.start("sleep", "51")
    process = await room.start("sleep", "52", detach_behavior=DETACH_BEHAVIOR_STOP)
    for one in (kept, process):
        await room.running(one)
        watching = asyncio.ensure_future(room.all_of(one))
        await asyncio.sleep(0.2)
        watching.cancel()
    assert (await room.ended(process)).end.signal == signal.SIGTERM
    for one in (never, kept):
        assert (await room.held(one)).state == PROCESS_STATE_RUNNING


async def test_the_service_goes_on_after_it_was_killed(room: Room) -> None:
    """What it knew is gone; the process never noticed."""
    process = await room.sh("echo begun; read line; echo got $line; sleep 0.5; exit 4")
    await room.seen(process, b"begun")
    await room.write(process, 0, b"he")
    await room.stop()
    room.begin()
    await room.processes.sweep()
    assert await room.write(process, 0, b"hello\n") == 6
    assert await room.said(process) == b"begun\ngot hello\n"
    assert (await room.ended(process)).end.exit_code == 4


async def test_what_ended_while_the_service_was_away_is_found(room: Room) -> None:
    process = await room.sh("sleep 0.7; echo last; exit 9")
    await room.running(process)
    await room.stop()
    await asyncio.sleep(1.5)
    room.begin()
    await room.processes.sweep()
    assert (await room.ended(process)).end.exit_code == 9
    assert await room.said(process) == b"last\n"


async def test_what_was_recorded_and_not_begun_is_begun(room: Room) -> None:
    await room.stop()
    process = await room.sh("echo once >> begun; cat begun", request_id=ID.format(3))
    room.begin()
    await room.processes.sweep()
    assert await room.said(process) == b"once\n"


async def test_a_start_that_was_broken_off_anywhere_is_made_once(room: Room) -> None:
    process = await room.sh("echo once >> begun; sleep 30")
    for _ in range(6):
        await asyncio.sleep(0.03)
        await room.stop()
        room.begin()
        await room.processes.sweep()
    await room.running(process)
    assert await room.said(await room.start("cat", "begun")) == b"once\n"


async def test_a_stop_that_was_wanted_is_not_forgotten_with_the_service(room: Room) -> None:
    room.processes.pace = room.pace = Pace(detach_seconds=1.0)
    process = await room.start("sleep", "53", detach_behavior=DETACH_BEHAVIOR_STOP)
    await room.running(process)
    watching = asyncio.ensure_future(room.all_of(process))
    await asyncio.sleep(0.2)
    watching.cancel()
    await room.stop()
    room.begin()
    await room.processes.sweep()
    assert (await room.ended(process)).end.signal == signal.SIGTERM


async def test_the_machine_goes_and_the_process_is_lost(room: Room) -> None:
    process = await room.sh("echo here; sleep 60")
    await room.seen(process, b"here")
    await room.until(process, lambda now: now.output_bytes > 0)
    watching = asyncio.ensure_future(room.all_of(process))
    await asyncio.sleep(0.2)
    for one in room.provider.processes.of(SANDBOX):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended with one before
            one.kill()
    held = await room.ended(process)
    assert held.end.failure.reason == FAILURE_REASON_SANDBOX_LOST
    assert held.output_tail == b"here\n"
    assert (await watching)[-1].end.failure.reason == FAILURE_REASON_SANDBOX_LOST
    assert await room.said(process) == b"here\n"  # wakes the machine, which has the file still


async def test_a_supervisor_that_is_killed_takes_its_process_with_it(room: Room) -> None:
    room.processes.pace = room.pace = Pace(alive_seconds=0.2)
    process = await room.start("sleep", "54")
    await room.running(process)
    room.runner(process).kill()
    assert (await room.ended(process)).end.failure.reason == FAILURE_REASON_SANDBOX_LOST
    assert not [one for one in room.provider.processes.of(SANDBOX) if one.cmdline() == ["sleep", "54"]]


async def test_a_machine_that_is_stopped_loses_its_processes(room: Room) -> None:
    process = await room.sh("trap '' TERM; echo up; sleep 60")
    await room.seen(process, b"up")
    await room.provider.pause(SANDBOX)
    assert (await room.ended(process)).end.failure.reason == FAILURE_REASON_SANDBOX_LOST
    assert not room.provider.processes.of(SANDBOX)


async def test_nonsense_in_the_files_is_no_more_than_a_lost_process(room: Room, tmp_path: Path) -> None:
    process = await room.sh("echo x; sleep 60")
    await room.seen(process, b"x")
    folder = tmp_path / "local" / SANDBOX / "home/.branchline/processes" / process.id
    room.runner(process).kill()
    (folder / "state.json").write_text(
        '{"pid": 1, "began": "7", "running": true, "output_bytes": 9000, "parts": [0, 5], "input": 3, "closed": 0,'
        ' "answers": {"a": {}}, "end": {"exit_code": 3, "seconds": -1e300, "time": 1e300, "timed_out": false}}'
    )
    (folder / f"output/{0:020}").write_bytes(b"\x09\xff\xff\xff\xff")
    held = await room.ended(process)
    assert (held.end.exit_code, held.end.run_duration.ToNanoseconds()) == (3, 0)
    assert held.end.end_time.ToDatetime().timestamp() < time.time() + 1
    assert (await room.all_of(process))[-1].end == held.end


ENDED = {"timed_out": False, "seconds": 1.0, "time": 1.0}
NONSENSE: dict[str, dict[str, Any]] = {
    "an exit code that is no number": {"end": {**ENDED, "exit_code": True}},
    "a signal that is no number": {"end": {**ENDED, "signal": True}},
    "a signal that is none": {"end": {**ENDED, "signal": 2**40}},
    "half a character": {"end": {**ENDED, "failure": ["program", "\ud800"]}},
    "half a character as a failure": {"end": {**ENDED, "failure": ["\ud800", ""]}},
    "an end that says not how": {"end": ENDED},
    "an end that says not when": {"end": {"exit_code": 0}},
    "an end in two ways": {"end": {**ENDED, "exit_code": 0, "signal": 9}},
    "a time that is no number": {"end": {**ENDED, "exit_code": 0, "time": float("nan")}},
    "an answer that is no number": {"answers": {"a": {"gap": "x"}}},
    "an answer that is too large": {"answers": {"a": {"offset": 2**70}}},
    "half a character in its beginning": {"began": "\ud800" * 10},
    "less than nothing": {"output_bytes": -1},
}


async def test_a_state_that_makes_no_sense_ends_its_process(room: Room, tmp_path: Path) -> None:
    for what, said in NONSENSE.items():
        process = await room.start("sleep", "60")
        await room.running(process)
        room.runner(process).suspend()
        spoil(tmp_path, process, said)
        held = await room.until(process, lambda now: now.state == PROCESS_STATE_ENDED, 5.0)
        assert (held.end.failure.reason, what) == (FAILURE_REASON_SANDBOX_LOST, what)
        assert "makes no sense" in held.end.failure.message
        assert (await room.all_of(process))[-1].end == held.end


def spoil(folder: Path, process: Process, said: dict[str, Any]) -> None:
    """Say something else in the place of a process's runner."""
    path = folder / "local" / SANDBOX / "home/.branchline/processes" / process.id / "state.json"
    new = path.with_suffix(".other")
    new.write_text(json.dumps(json.loads(path.read_text()) | said))
    new.replace(path)


@pytest.mark.parametrize("left_out", ["pid", "began", "running", "output_bytes", "parts", "input", "answers", "end"])
def test_a_state_says_all_that_there_is_to_say(left_out: str) -> None:
    text = '{"pid":1,"began":"1","running":true,"output_bytes":0,"parts":[],"input":0,"answers":{},"end":null}'
    msgspec.json.decode(text, type=Status)
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(text.replace(f'"{left_out}"', '"other"'), type=Status)


async def test_a_state_that_is_no_file_ends_its_process(room: Room, tmp_path: Path) -> None:
    process = await room.start("sleep", "60")
    await room.running(process)
    path = tmp_path / "local" / SANDBOX / "home/.branchline/processes" / process.id / "state.json"
    room.runner(process).suspend()
    path.rename(path.with_suffix(".other"))
    path.mkdir()
    held = await room.until(process, lambda now: now.state == PROCESS_STATE_ENDED, 15.0)
    assert held.end.failure.reason == FAILURE_REASON_SANDBOX_LOST


async def test_input_that_is_answered_with_nothing_may_have_been_taken(room: Room, tmp_path: Path) -> None:
    process = await room.start("cat")
    await room.running(process)
    folder = tmp_path / "local" / SANDBOX / "home/.branchline/processes" / process.id
    room.runner(process).suspend()
    writing = asyncio.ensure_future(room.write(process, 0, b"x"))
    async with asyncio.timeout(10):
        while not (asked := list((folder / "requests").glob("*.json"))):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    spoil(tmp_path, process, {"answers": {asked[0].stem: {}}})
    with pytest.raises(DeadlineExceeded) as refused:
        await writing
    assert refused.value.reason == "NOT_ANSWERED"


async def test_a_runner_that_cannot_be_asked_loses_its_process(room: Room, tmp_path: Path) -> None:
    process = await room.start("cat")
    await room.running(process)
    folder = tmp_path / "local" / SANDBOX / "home/.branchline/processes" / process.id
    (folder / "requests").rmdir()
    (folder / "requests").write_text("")
    with pytest.raises(Unavailable) as refused:
        await room.write(process, 0, b"x")
    assert refused.value.reason == "SANDBOX_UNREACHABLE"


async def test_what_cannot_be_followed_for_no_reason_that_passes_ends(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> ProcessEnd:
        raise ArithmeticError

    monkeypatch.setattr(Follower, "_how", broken)
    held = await room.ended(await room.start("true"))
    assert held.end.failure.reason == FAILURE_REASON_INTERNAL


async def test_there_are_so_many_at_once_and_no_more(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_store, "MOST_RUNNING", 2)
    first, second = [await room.start("sleep", "30") for _ in range(2)]
    with pytest.raises(ResourceExhausted) as refused:
        await room.start("true")
    assert refused.value.metadata["limit"] == "processes"
    await room.signal(first, processes_pb2.SIGNAL_KILL)
    await room.ended(first)
    await room.start("true")
    await room.signal(second, processes_pb2.SIGNAL_KILL)


async def test_the_oldest_are_forgotten_with_their_files(
    room: Room, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(process_store, "MOST_RUNNING", 1)
    monkeypatch.setattr(process_store, "MOST_KEPT", 3)
    made: list[Process] = []
    for _ in range(4):
        made.append(await room.start("true"))
        await room.ended(made[-1])
    folder = tmp_path / "local" / SANDBOX / "home/.branchline/processes"
    async with asyncio.timeout(10):
        while len(list(folder.iterdir())) > 2:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert {path.name for path in folder.iterdir()} == {made[2].id, made[3].id}
    with pytest.raises(NotFound):
        await room.all_of(made[0])
    monkeypatch.setattr(process_store, "KEEP_SECONDS", -60.0)
    await room.processes.sweep()
    assert not list(folder.iterdir())


async def test_what_is_left_running_does_not_hold_up_the_end(room: Room) -> None:
    process = await room.sh("sleep 3 & echo done")
    async with asyncio.timeout(2.5):
        assert (await room.all_of(process))[-1].end.exit_code == 0


def test_the_runner_needs_no_more_than_the_standard_library() -> None:
    text = Path("services/sandbox/runner.py").read_text()
    names = {line.split()[1].partition(".")[0] for line in text.splitlines() if line.startswith(("import ", "from "))}
    assert names <= set(sys.stdlib_module_names)
    assert len(text.encode()) < 100_000  # one word of a command line has 128 KiB at most
