"""Follows the processes that run in sandboxes: starts them, tells where they stand, and passes their output on.

A process is supervised inside its machine (`runner.py`) and lives in files there, so that nothing of it depends on this
service: one that was killed finds the files again and goes on. There is one follower for each process that has not
ended, and any number of watchers.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from branchline.v1.common_pb2 import (
    FAILURE_REASON_INTERNAL,
    FAILURE_REASON_SANDBOX_LOST,
    FailureReason,
)
from branchline.v1.errors_pb2 import (
    ERROR_REASON_DRAINING,
    ERROR_REASON_NOT_ANSWERED,
    ERROR_REASON_PROCESS_ENDED,
    ERROR_REASON_SANDBOX_UNREACHABLE,
)
from branchline.v1.processes_pb2 import (
    DETACH_BEHAVIOR_STOP,
    OUTPUT_STREAM_STDOUT,
    PROCESS_STATE_ENDED,
    PROCESS_STATE_STARTING,
    Heartbeat,
    OutputGap,
    Process,
    ProcessEnd,
    ProcessOutput,
    ProcessSpec,
    WatchProcessResponse,
)

from services.runtime.clock import Clock
from services.runtime.database import Database
from services.runtime.errors import (
    DeadlineExceeded,
    DomainError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
    reason_of,
)
from services.runtime.failures import failed
from services.runtime.logging import get_logger
from services.runtime.loops import for_each
from services.runtime.retry import Backoff
from services.sandbox.agent_server import AgentServer
from services.sandbox.machines import Machines
from services.sandbox.process_files import Answer, Files, Lost, Piece, Status
from services.sandbox.process_follower import WATCHED_SECONDS, Follower, Live, Pace, now
from services.sandbox.process_store import Output, ProcessStore
from services.sandbox.providers.base import Condition

log = get_logger(__name__)

_DEFAULT_SECONDS = 60.0
_ASK_SECONDS = 10.0
_MOST_FAULTS = 5
T = TypeVar("T")


@dataclass(slots=True)
class Processes:
    """All processes of this service's sandboxes."""

    database: Database
    store: ProcessStore
    machines: Machines
    clock: Clock
    pace: Pace = field(default_factory=Pace)
    _live: dict[str, Live] = field(default_factory=dict[str, Live])
    _new: asyncio.Queue[str] = field(default_factory=asyncio.Queue[str])

    async def run(self) -> None:
        """Follow processes for ever."""
        async with asyncio.TaskGroup() as group:
            while True:
                group.create_task(self._see_to(await self._new.get()))

    async def sweep(self) -> None:
        """See to every process that has not ended; forget those that ended long ago."""
        for process_id in await self.database.read(self.store.unended):
            self.follow(process_id)
        while gone := await self.database.write(self.store.old):
            await self._remove(gone)

    def follow(self, process_id: str) -> Live:
        """See to a process that has not ended."""
        live = self._live.get(process_id)
        if live is None:
            live = self._live[process_id] = Live(Files(process_id), alone_since=now())
            self._new.put_nowait(process_id)
        return live

    async def ask(self, process: Process, request: Mapping[str, Any]) -> Answer:
        """Have the runner do something, and return its answer.

        Raise FailedPrecondition if the process has ended, DeadlineExceeded if it is not known whether it was done,
        Unavailable if it could not be asked.
        """
        if process.state == PROCESS_STATE_ENDED:
            raise _has_ended(process.id)
        live = self.follow(process.id)
        try:
            async with asyncio.timeout(_ASK_SECONDS):
                await self._until(live, lambda status: status.running)
                name = await self._ask(live, request)
                status = await self._until(live, lambda status: name in status.answers)
                return status.answers[name]
        except TimeoutError as error:
            words = "the process's supervisor does not answer; it may have done what was asked"
            raise DeadlineExceeded(ERROR_REASON_NOT_ANSWERED, words) from error
        except Lost as error:
            raise Unavailable(ERROR_REASON_SANDBOX_UNREACHABLE, str(error)) from error

    async def input_bytes(self, process: Process) -> int:
        """Return how many bytes of input a process that has ended was given, as far as it is known."""
        files = Files(process.id)
        try:
            status = await self._at_machine(process.sandbox_id, files.status)
        except (DomainError, Lost):
            return 0
        return status.input_bytes if status is not None else 0

    async def watch(
        self, process: Process, offset: int, heartbeat_seconds: float
    ) -> AsyncGenerator[WatchProcessResponse, None]:
        """Yield the output of a process from an offset, and its end; the process is read before."""
        was_live = process.state != PROCESS_STATE_ENDED
        if was_live:
            live = self.follow(process.id)
            if process.spec.detach_behavior == DETACH_BEHAVIOR_STOP and not live.watched:
                await self.database.write(self.store.watched, process.id)
                live.watched = True
            with _watching(live):
                sent = now()
                while not live.over:
                    ticket, status = live.changed.ticket, live.status
                    if status is not None:
                        offset = _resolved(offset, status.output_bytes)
                        responses = await self._next(live, status, offset)
                        for response in responses:
                            offset, sent = _after(response), now()
                            yield response
                        if responses:
                            continue
                    if not await live.changed.wait(ticket, max(0.0, sent + heartbeat_seconds - now())):
                        sent = now()
                        yield WatchProcessResponse(heartbeat=Heartbeat())
            process = await self.database.read(self.store.get, process.id)
            if process.state != PROCESS_STATE_ENDED:
                raise Unavailable(ERROR_REASON_DRAINING, "the service ends, the process goes on; watch it again")
        async for response in self._rest(process, offset, wake=not was_live):
            yield response
        yield WatchProcessResponse(end=process.end)

    async def _next(self, live: Live, status: Status, offset: int) -> list[WatchProcessResponse]:
        """Return what comes next for a watcher, if there is anything now."""
        if live.server is None or offset >= status.output_bytes:
            return []
        if offset < status.kept_offset:
            return [_gap(status.kept_offset)]
        try:
            pieces = await live.files.output(live.server, status, offset)
        except (
            NotFound,
            InvalidArgument,
            Unavailable,
        ):  # dropped meanwhile, or the follower finds out; there will be another status
            return []
        return [_output(piece) for piece in pieces]

    async def _rest(self, process: Process, offset: int, *, wake: bool) -> AsyncGenerator[WatchProcessResponse, None]:
        """Yield the output of a process that has ended: from its machine, or what is known without it."""
        files = Files(process.id)
        try:
            status = await self._at_machine(process.sandbox_id, files.status, wake=wake)
            if status is not None:
                offset = _resolved(offset, status.output_bytes)
                if offset < status.kept_offset:
                    offset = status.kept_offset
                    yield _gap(offset)
                while True:
                    read = partial(files.output, status=status, offset=offset)
                    pieces = await self._at_machine(process.sandbox_id, read, wake=wake)
                    if not pieces:
                        break
                    for piece in pieces:
                        yield _output(piece)
                    offset = pieces[-1].offset + len(pieces[-1].data)
        except (DomainError, Lost) as error:
            log.info("output is not read from its machine", process=process.id, reason=reason_of(error))
        kept = process.output_bytes - len(process.output_tail)
        offset = _resolved(offset, process.output_bytes)
        if offset < min(kept, process.output_bytes):
            offset = kept
            yield _gap(offset)
        left = process.output_tail[offset - kept :] if offset >= kept else b""
        if left:
            yield _output(Piece(offset, OUTPUT_STREAM_STDOUT, left))

    async def _at_machine(
        self, sandbox_id: str, call: Callable[[AgentServer], Awaitable[T]], *, wake: bool = False
    ) -> T:
        if wake:
            return await self.machines.use(sandbox_id, call)
        return await call(await self.server(sandbox_id))

    async def server(self, sandbox_id: str) -> AgentServer:
        """Return the server of a machine that is there, without waking one. Raise Lost, or Unavailable."""
        probe = await self.machines.look(sandbox_id)
        if probe.condition is Condition.GONE:
            raise Lost("its machine is gone")
        if probe.machine is None:
            raise Unavailable(ERROR_REASON_SANDBOX_UNREACHABLE, "its machine does not answer")
        return self.machines.server_of(probe.machine)

    async def _until(self, live: Live, holds: Callable[[Status], bool]) -> Status:
        while True:
            if live.over:
                raise _has_ended(live.files.process_id)
            ticket = live.changed.ticket
            if live.status is not None and holds(live.status):
                return live.status
            live.wanted.notify()
            await live.changed.wait(ticket, WATCHED_SECONDS)

    async def _ask(self, live: Live, request: Mapping[str, Any]) -> str:
        server = live.server or await self.server(live.sandbox_id)
        name = await live.files.ask(server, request)
        live.wanted.notify()
        return name

    async def _see_to(self, process_id: str) -> None:
        """Follow one process to its end."""
        live = self._live[process_id]
        backoff = Backoff(first_seconds=0.1, most_seconds=5.0)
        try:
            while not live.over:
                try:
                    await self._follow(live)
                    return
                except NotFound as error:
                    if error.kind == "process":  # its task is deleted
                        return
                    log.warning("process not followed", process=process_id, reason=error.message)
                except Exception as error:
                    live.server = None
                    if not isinstance(error, Unavailable):
                        log.exception("process not followed", process=process_id)
                    log.info("process is looked for again", process=process_id, reason=reason_of(error))
                await asyncio.sleep(backoff.next_seconds())
        finally:
            del self._live[process_id]
            live.over = True
            live.changed.notify()

    async def _follow(self, live: Live) -> None:
        """Follow one process to its end. Raise NotFound, or what another try may get over."""
        try:
            await self._try_to_follow(live)
        except Lost as lost:
            await self._fail(live, FAILURE_REASON_SANDBOX_LOST, f"the sandbox was lost: {lost}")
        except Unavailable:
            raise
        except Exception:
            live.faults += 1
            if live.faults < _MOST_FAULTS:
                raise
            log.exception("process given up", process=live.files.process_id)
            await self._fail(live, FAILURE_REASON_INTERNAL, "it cannot be followed; the server's log has why")

    async def _try_to_follow(self, live: Live) -> None:
        process = await self.database.read(self.store.get, live.files.process_id)
        if process.state == PROCESS_STATE_ENDED:
            return
        live.sandbox_id = process.sandbox_id
        live.stops = process.spec.detach_behavior == DETACH_BEHAVIOR_STOP
        whole, watched = await self.database.read(self.store.whole, process.id)
        live.watched = live.watched or watched
        if process.state == PROCESS_STATE_STARTING and not await self._start(live, whole):
            return
        live.server = live.server or await self.server(live.sandbox_id)
        await Follower(self, live, process, live.server).run()

    async def _start(self, live: Live, spec: ProcessSpec) -> bool:
        """Have the machine start the runner; say whether that can be hoped for."""

        async def begin(server: AgentServer) -> AgentServer:
            ran = await live.files.start(server, spec, _seconds(spec))
            if ran is not None and ran.end.exit_code:
                words = f"it is not started: {ran.stderr[-500:]}"
                raise FailedPrecondition(ERROR_REASON_PROCESS_ENDED, words, process_id=live.files.process_id)
            return server

        live.attempts += 1
        try:
            live.server = await self.machines.use(live.sandbox_id, begin)
        except (FailedPrecondition, NotFound) as error:
            probe = await self.machines.look(live.sandbox_id)
            lost = probe.condition is Condition.GONE
            reason = FAILURE_REASON_SANDBOX_LOST if lost else FAILURE_REASON_INTERNAL
            await self._fail(live, reason, reason_of(error))
            return False
        return True

    async def _fail(self, live: Live, reason: FailureReason.ValueType, words: str) -> None:
        await self.end(live, ProcessEnd(failure=failed(reason, words)), None)

    async def end(self, live: Live, end: ProcessEnd, output: Output | None) -> None:
        """Note that a process has ended, and forget what is too much."""
        process = await self.database.write(self.store.ended, live.files.process_id, end, output)
        live.over = True
        live.changed.notify()
        await self._remove(await self.database.write(self.store.excess, process.task_id))

    async def _remove(self, gone: list[Process]) -> None:
        """Remove the files of processes that are forgotten, where their machines are there."""

        async def remove(process: Process) -> None:
            try:
                await Files(process.id).remove(await self.server(process.sandbox_id))
            except (Lost, DomainError) as error:
                log.info("files of a process stay", process=process.id, reason=reason_of(error))

        await for_each(gone, "remove the files of a process", remove)


@contextmanager
def _watching(live: Live) -> Generator[None, None, None]:
    live.watchers += 1
    live.wanted.notify()
    try:
        yield
    finally:
        live.watchers -= 1
        live.alone_since = now()


def _seconds(spec: ProcessSpec) -> float:
    """Return how long a process may run; 0 means without end."""
    if spec.timeout.ToNanoseconds() > 0:
        return spec.timeout.ToNanoseconds() / 1e9
    return 0.0 if spec.HasField("terminal") else _DEFAULT_SECONDS


def _has_ended(process_id: str) -> FailedPrecondition:
    words = f"the process {process_id} has ended"
    return FailedPrecondition(ERROR_REASON_PROCESS_ENDED, words, process_id=process_id)


def _gap(offset: int) -> WatchProcessResponse:
    return WatchProcessResponse(gap=OutputGap(next_offset=offset))


def _output(piece: Piece) -> WatchProcessResponse:
    return WatchProcessResponse(output=ProcessOutput(offset=piece.offset, stream=piece.stream, data=piece.data))


def _after(response: WatchProcessResponse) -> int:
    """Return where a watcher stands after a gap or a piece of output."""
    if response.HasField("gap"):
        return response.gap.next_offset
    return response.output.offset + len(response.output.data)


def _resolved(offset: int, output_bytes: int) -> int:
    """Return an offset that counts from the beginning."""
    return offset if offset >= 0 else max(0, output_bytes + offset)
