"""Runs commands in a sandbox: output while it comes, an exit code, a timeout, and an end when nobody listens any more.

The command runs under coreutils' `timeout`, which gives it a process group of its own: its children end with it.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from branchline.v1.errors_pb2 import ERROR_REASON_COMMAND_FAILED

from services.runtime.errors import DomainError, FailedPrecondition
from services.runtime.logging import get_logger
from services.runtime.retry import Backoff
from services.sandbox.agent_server import AgentServer, ProcessOutput, ProcessState

log = get_logger(__name__)

OUTPUT_BYTES = 1024 * 1024
"""Most that `run` keeps of each stream; the end of what is longer."""

_KILL_SECONDS = 5
_TIMED_OUT = (124, 137, None)
_NOT_STARTED = (126, 127)
_GUARD_SAYS = b"timeout: "
_MOST_WORDS_BYTES = 8192
_WITH_PYTHON = '[ -x "$0" ] && exec "$0" "$@"; exec python3 "$@"'
"""The interpreter that the provider names may be closed to a sandbox's user where nothing but that keeps it apart."""

_FIRST_LOOK_SECONDS, _MOST_BETWEEN_LOOKS_SECONDS = 0.01, 0.25


@dataclass(frozen=True, slots=True)
class CommandEnd:
    """How a command ended. The exit code is -1 if it was killed."""

    exit_code: int
    timed_out: bool
    duration_ms: int


@dataclass(frozen=True, slots=True)
class CommandResult:
    """A command's end and its output."""

    end: CommandEnd
    stdout: str
    stderr: str


@dataclass(frozen=True, slots=True)
class Running:
    """A command that was started."""

    server: AgentServer
    process: str
    timeout_seconds: int


async def start(
    server: AgentServer, command: Sequence[str], directory: str, environment: Mapping[str, str], timeout_seconds: int
) -> Running:
    """Start a command. Raise FailedPrecondition if there is no such directory."""
    guarded = ["timeout", f"--kill-after={_KILL_SECONDS}", str(timeout_seconds), *command]
    return Running(server, await server.start_process(guarded, directory, environment), timeout_seconds)


async def follow(running: Running) -> AsyncGenerator[ProcessOutput | CommandEnd, None]:
    """Yield a command's output as it comes, then its end. The command is stopped if the caller goes away.

    Raise FailedPrecondition if its program cannot be started.
    """
    held: list[ProcessOutput] = []  # what may be the words of `timeout` about a program that is not there
    may_be_words = True
    async with aclosing(_follow(running)) as pieces:
        async for piece in pieces:
            if may_be_words and isinstance(piece, ProcessOutput) and _may_be_words([*held, piece]):
                held.append(piece)
                continue
            if held and isinstance(piece, CommandEnd) and piece.exit_code in _NOT_STARTED:
                words = _joined(held).decode(errors="replace").removeprefix(_GUARD_SAYS.decode()).strip()
                raise FailedPrecondition(ERROR_REASON_COMMAND_FAILED, words)
            for kept in held:
                yield kept
            held, may_be_words = [], False
            yield piece


def _may_be_words(pieces: Sequence[ProcessOutput]) -> bool:
    """Say whether a command's first output may be all that `timeout` says, which comes in several pieces."""
    said = _joined(pieces)
    begins = said.startswith(_GUARD_SAYS) or _GUARD_SAYS.startswith(said)
    return begins and len(said) < _MOST_WORDS_BYTES and all(piece.error for piece in pieces)


def _joined(pieces: Sequence[ProcessOutput]) -> bytes:
    return b"".join(piece.data for piece in pieces)


async def _follow(running: Running) -> AsyncGenerator[ProcessOutput | CommandEnd, None]:
    server, process = running.server, running.process
    ended = asyncio.ensure_future(_ended(server, process))
    try:
        seen = 0
        async with aclosing(server.follow_output(process)) as output:
            while (piece := await _next(output, ended)) is not None:
                seen = piece.number
                yield piece
        state = await ended
        for piece in await server.output(process):
            if piece.number > seen:
                yield piece
        timed_out = state.exit_code in _TIMED_OUT and state.duration_ms >= running.timeout_seconds * 1000
        exit_code = -1 if timed_out or state.exit_code is None else state.exit_code
        yield CommandEnd(exit_code, timed_out, state.duration_ms)
    finally:
        over = ended.done() and not ended.cancelled() and ended.exception() is None
        ended.cancel()
        try:
            await (server.forget_process(process) if over else server.stop_process(process))
        except DomainError as error:  # it ends by its timeout at the latest
            log.warning("command not stopped", process=process, reason=error.reason)


async def run(
    server: AgentServer, command: Sequence[str], directory: str, environment: Mapping[str, str], timeout_seconds: int
) -> CommandResult:
    """Run a command to its end. Raise FailedPrecondition if it cannot be started."""
    return await result(await start(server, command, directory, environment, timeout_seconds))


async def result(running: Running) -> CommandResult:
    """Wait for a command's end and return it with its output. Raise FailedPrecondition if it cannot be started."""
    end, stdout, stderr = await _result(running)
    return CommandResult(end, _words(stdout), _words(stderr))


async def run_bytes(
    server: AgentServer, command: Sequence[str], directory: str, timeout_seconds: int
) -> tuple[CommandEnd, bytes]:
    """Run a command to its end; return that, and the end of its standard output as it is."""
    end, stdout, _ = await _result(await start(server, command, directory, {}, timeout_seconds))
    return end, bytes(stdout)


def python(server: AgentServer, program: str, *given: str) -> list[str]:
    """Return the command that runs a Python program in a sandbox, whatever its locale and settings."""
    return ["sh", "-c", _WITH_PYTHON, server.machine.python, "-I", "-S", "-X", "utf8", "-c", program, *given]


async def _result(running: Running) -> tuple[CommandEnd, bytearray, bytearray]:
    stdout, stderr = bytearray(), bytearray()
    end = CommandEnd(-1, timed_out=False, duration_ms=0)
    async with aclosing(follow(running)) as pieces:
        async for piece in pieces:
            if isinstance(piece, CommandEnd):
                end = piece
                continue
            kept = stderr if piece.error else stdout
            kept += piece.data
            del kept[:-OUTPUT_BYTES]
    return end, stdout, stderr


def _words(data: bytearray) -> str:
    """Return output as text of no more bytes: what is no UTF-8 takes three in the place of one."""
    text = data.decode(errors="replace").encode()
    return text[-OUTPUT_BYTES:].decode(errors="ignore")


async def _next(
    output: AsyncGenerator[ProcessOutput, None], ended: asyncio.Future[ProcessState]
) -> ProcessOutput | None:
    """Return the next piece of output, or None once the command or the output has ended."""
    coming = asyncio.ensure_future(anext(output, None))
    try:
        await asyncio.wait({coming, ended}, return_when=asyncio.FIRST_COMPLETED)
        return coming.result() if coming.done() else None
    finally:
        if not coming.done():  # the generator must not be closed while it runs
            coming.cancel()
            await asyncio.wait({coming})


async def _ended(server: AgentServer, process: str) -> ProcessState:
    looks = Backoff(first_seconds=_FIRST_LOOK_SECONDS, most_seconds=_MOST_BETWEEN_LOOKS_SECONDS)
    while True:
        state = await server.process(process)
        if not state.running:
            return state
        await asyncio.sleep(looks.next_seconds())
