"""Follows one process to its end: looks at what its runner says, tells the task, and sees whether it is there."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from branchline.v1.common_pb2 import (
    FAILURE_REASON_DIRECTORY_NOT_FOUND,
    FAILURE_REASON_PROGRAM_NOT_FOUND,
    FAILURE_REASON_SANDBOX_LOST,
    FailureReason,
)
from branchline.v1.errors_pb2 import ERROR_REASON_SANDBOX_UNREACHABLE
from branchline.v1.processes_pb2 import PROCESS_STATE_STARTING, Process, ProcessEnd

from services.runtime.errors import InvalidArgument, NotFound, Unavailable
from services.runtime.failures import failed
from services.runtime.signal import Signal
from services.sandbox.agent_server import AgentServer, Unreachable
from services.sandbox.process_files import End, Files, Lost, Status
from services.sandbox.process_store import Output

if TYPE_CHECKING:
    from services.sandbox.processes import Processes

_APPEAR_SECONDS = 10.0
_ATTEMPTS = 3
_SOONEST_SECONDS, WATCHED_SECONDS, _UNWATCHED_SECONDS = 0.005, 0.1, 0.5
_SLOWER = 1.5
_FAILURES: Mapping[str, FailureReason.ValueType] = {
    "program": FAILURE_REASON_PROGRAM_NOT_FOUND,
    "directory": FAILURE_REASON_DIRECTORY_NOT_FOUND,
    "sandbox": FAILURE_REASON_SANDBOX_LOST,
}

_FINAL = frozenset({FAILURE_REASON_PROGRAM_NOT_FOUND, FAILURE_REASON_DIRECTORY_NOT_FOUND})
"""Trying again does not help without a change."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How often what is looked at, in seconds."""

    tell_seconds: float = 2.0
    """How often the task is told of output, at most."""

    alive_seconds: float = 2.0
    """How often it is looked whether the runner is there."""

    detach_seconds: float = 30.0
    """How long a process that nobody watches any more goes on, where it shall stop."""


@dataclass(slots=True)
class Live:
    """A process that has not ended, as far as it is known here."""

    files: Files
    sandbox_id: str = ""
    changed: Signal = field(default_factory=Signal)
    """For watchers: the status is another one, or it is over."""

    wanted: Signal = field(default_factory=Signal)
    """For the follower: somebody waits."""

    status: Status | None = None
    over: bool = False
    stops: bool = False
    watchers: int = 0
    watched: bool = False
    alone_since: float = 0.0
    server: AgentServer | None = None
    attempts: int = 0
    faults: int = 0
    """How often it could not be followed, for no reason that passes, since it last told something new."""


@dataclass(slots=True)
class Follower:
    """Follows one process whose runner was started."""

    all: "Processes"
    live: Live
    process: Process
    server: AgentServer
    _told: float = float("-inf")
    _alive: float = float("-inf")
    _stopped: bool = False

    async def run(self) -> None:
        """Follow it to its end. Raise Lost, or Unavailable to be called again."""
        live, began, pause = self.live, now(), _SOONEST_SECONDS
        while True:
            ticket = live.wanted.ticket
            status = await self._look()
            if status is None:
                if now() - began > _APPEAR_SECONDS:
                    raise self._missing()
            else:
                if status != live.status:
                    pause = _SOONEST_SECONDS
                    live.status, live.faults = status, 0
                    live.changed.notify()
                if status.end is not None:
                    await self._end(status, status.end)
                    return
                await self._tell(status)
                await self._check(status)
            most = WATCHED_SECONDS if live.watchers else _UNWATCHED_SECONDS
            pause = min(pause * _SLOWER, most)
            if await live.wanted.wait(ticket, pause):
                pause = _SOONEST_SECONDS
                await asyncio.sleep(pause)

    async def _look(self) -> Status | None:
        try:
            return await self.live.files.status(self.server)
        except Unreachable:
            self.server = self.live.server = await self.all.server(self.live.sandbox_id)
            return await self.live.files.status(self.server)

    def _missing(self) -> Exception:
        if self.process.state != PROCESS_STATE_STARTING or self.live.attempts >= _ATTEMPTS:
            return Lost("nothing is left of the process")
        return Unavailable(ERROR_REASON_SANDBOX_UNREACHABLE, "the runner does not begin")

    async def _tell(self, status: Status) -> None:
        """Tell that it runs, and what it wrote, now and then."""
        told = self.process
        news = told.state == PROCESS_STATE_STARTING or told.output_bytes != status.output_bytes
        if not status.running or not news or now() - self._told < self.all.pace.tell_seconds:
            return
        output = await self._tail(status)
        if output is not None:
            write = self.all.database.write
            self.process = await write(self.all.store.running, told.id, output)
            self._told = now()

    async def _tail(self, status: Status) -> Output | None:
        """Return the end of the output; None if it is dropped while it is read, or is no file."""
        try:
            return await self.live.files.tail(self.server, status)
        except (NotFound, InvalidArgument):
            return None

    async def _check(self, status: Status) -> None:
        """Look whether the runner is there, and whether anybody watches where that matters."""
        live, time = self.live, now()
        if time - self._alive > self.all.pace.alive_seconds:
            self._alive = time
            if not await live.files.is_alive(self.server, status):
                again = await self._look()
                if again is None or again.end is None:
                    raise Lost("the process's supervisor is gone")
        alone = live.stops and live.watched and not live.watchers
        if alone and not self._stopped and status.running and time - live.alone_since > self.all.pace.detach_seconds:
            self._stopped = True
            await live.files.ask(self.server, {"what": "stop"})

    async def _end(self, status: Status, told: End) -> None:
        output = await self._tail(status) if status.output_bytes else Output(0, 0, b"")
        await self.all.end(self.live, self._how(told), output)

    def _how(self, told: End) -> ProcessEnd:
        """Return the end that a runner told; when that was, and how long it took, is bounded by what is known."""
        end = ProcessEnd(timed_out=told.timed_out)
        if told.exit_code is not None:
            end.exit_code = told.exit_code
        if told.signal is not None:
            end.signal = told.signal
        if told.failure is not None:
            what, why = told.failure
            reason, words = _FAILURES[what], _words(what, why, self.process)
            end.failure.CopyFrom(failed(reason, words, retryable=reason not in _FINAL))
        began, present = self.process.create_time.ToDatetime().timestamp(), self.all.clock.seconds()
        end.run_duration.FromMilliseconds(int(min(max(told.seconds, 0.0), 1e9) * 1000))
        end.end_time.FromMilliseconds(int(max(min(told.time, present), began) * 1000))
        return end


def _words(what: str, why: str, process: Process) -> str:
    if what == "program":
        return f'"{process.spec.command[0]}" cannot be run: {why}'
    if what == "directory":
        return f'the directory "{process.spec.directory}" cannot be entered: {why}'
    return why


def now() -> float:
    """Return the event loop's time."""
    return asyncio.get_running_loop().time()
