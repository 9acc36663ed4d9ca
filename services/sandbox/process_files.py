"""The files in which a process's runner says how it goes (`runner.py`), read from outside.

They lie in the sandbox, where anybody may write anything into them: where the state makes no sense the process is lost,
and what makes none of its output counts as not there.
"""

import base64
import json
import secrets
import struct
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from branchline.v1.processes_pb2 import OUTPUT_STREAM_STDERR, OUTPUT_STREAM_STDOUT, OutputStream, ProcessSpec

from services.runtime.errors import InvalidArgument, NotFound
from services.sandbox import runner
from services.sandbox.agent_server import AgentServer
from services.sandbox.commands import CommandResult, python, run
from services.sandbox.machines import WORKSPACE
from services.sandbox.process_store import TAIL_BYTES, Output

_STATE_BYTES = 64 * 1024
_PART_BYTES = 256 * 1024
_CACHED_PARTS = 4
_START_SECONDS = 30
_REMOVE_SECONDS = 30
_PIECE_BYTES = 64 * 1024
_HEAD = struct.Struct(">BI")
_PROGRAM = Path(runner.__file__).read_text()

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class Lost(Exception):
    """The machine is gone, or was another one since; or what supervises a process there says what makes no sense."""


class Piece(NamedTuple):
    """A piece of output."""

    offset: int
    stream: OutputStream.ValueType
    data: bytes


class Answer(msgspec.Struct, frozen=True):
    """How a runner answered: where its input stands now, or why it took none; empty where it was no input."""

    offset: _Count | None = None
    gap: _Count | None = None
    closed: _Count | None = None


class End(msgspec.Struct, frozen=True):
    """How a process ended."""

    timed_out: bool
    seconds: float
    time: float
    exit_code: Annotated[int, msgspec.Meta(ge=0, le=255)] | None = None
    signal: Annotated[int, msgspec.Meta(ge=1, le=127)] | None = None
    failure: tuple[Literal["program", "directory", "sandbox"], str] | None = None

    def __post_init__(self) -> None:
        """Refuse an end that says not how, or more than one way."""
        if (self.exit_code, self.signal, self.failure).count(None) != 2:
            raise ValueError("an end has one exit code, signal or failure")


class Status(msgspec.Struct, frozen=True):
    """What a runner says of its process."""

    pid: _Count
    began: str
    running: bool
    output_bytes: _Count
    parts: tuple[_Count, ...]
    """Offset of the first byte of each part of the output that is kept."""
    input_bytes: _Count = msgspec.field(name="input")
    answers: dict[str, Answer]
    end: End | None

    @property
    def kept_offset(self) -> int:
        """Offset of the first byte that is kept."""
        return min((*self.parts, self.output_bytes)) if self.parts else 0


@dataclass(slots=True)
class Files:
    """The files of one process. The parts of its output that were read last are remembered."""

    process_id: str
    _parts: "OrderedDict[int, tuple[int, list[Piece]]]" = field(
        default_factory=OrderedDict[int, tuple[int, list[Piece]]]
    )

    def folder(self, server: AgentServer) -> str:
        """Return where they lie."""
        return f"{server.machine.home}/.branchline/processes/{self.process_id}"

    async def start(self, server: AgentServer, spec: ProcessSpec, seconds: float) -> CommandResult | None:
        """Start the runner, unless there was one. It starts the process at most once."""
        if await self.status(server) is not None:
            return None
        home, folder = server.machine.home, self.folder(server)
        size = [spec.terminal.rows, spec.terminal.columns] if spec.HasField("terminal") else None
        wanted = {
            "command": list(spec.command),
            "directory": f"{home}/{WORKSPACE}/{spec.directory}".rstrip("/"),
            "environment": dict(spec.environment),
            "seconds": seconds,
            "terminal": size,
        }
        await server.write_file(f"{folder}/spec.json", json.dumps(wanted).encode())
        return await run(server, python(server, _PROGRAM, folder), home, {}, _START_SECONDS)

    async def status(self, server: AgentServer) -> Status | None:
        """Return how it goes; None before the runner has begun. Raise Lost if it makes no sense."""
        try:
            told = await server.read_head(f"{self.folder(server)}/state.json", _STATE_BYTES)
            return msgspec.json.decode(told, type=Status)
        except NotFound:
            return None
        except (InvalidArgument, ValueError, RecursionError) as error:
            raise Lost(f"what the process's supervisor says makes no sense: {error}") from error

    async def is_alive(self, server: AgentServer, status: Status) -> bool:
        """Say whether the runner is there."""
        try:
            told = await server.read_head(f"/proc/{status.pid}/stat", 4096)
        except NotFound:
            return False
        words = told.decode(errors="replace").rpartition(")")[2].split()
        return len(words) > 19 and words[0] != "Z" and words[19] == status.began

    async def ask(self, server: AgentServer, request: Mapping[str, Any]) -> str:
        """Ask the runner for something; return the name under which it will answer in its status. Raise Lost."""
        name = secrets.token_hex(16)
        try:
            await server.write_file(f"{self.folder(server)}/requests/{name}.json", json.dumps(request).encode())
        except (InvalidArgument, NotFound) as error:
            raise Lost(f"the process's supervisor cannot be asked: {error}") from error
        return name

    async def remove(self, server: AgentServer) -> None:
        """Remove them."""
        await run(server, ["rm", "-rf", "--", self.folder(server)], server.machine.home, {}, _REMOVE_SECONDS)

    async def output(self, server: AgentServer, status: Status, offset: int) -> list[Piece]:
        """Return some of the output from an offset that is kept. Raise NotFound if it is kept no longer."""
        begin = max((part for part in status.parts if part <= offset), default=None)
        if begin is None or offset >= status.output_bytes:
            return []
        end = min((part for part in status.parts if part > begin), default=status.output_bytes)
        pieces = await self._part(server, begin, end)
        return _joined(cut for piece in pieces if (cut := _between(piece, offset, end)) is not None)

    async def tail(self, server: AgentServer, status: Status) -> Output:
        """Return what is known of the output, with its end."""
        offset = max(status.kept_offset, status.output_bytes - TAIL_BYTES)
        tail = bytearray()
        while True:
            pieces = await self.output(server, status, offset)
            if not pieces:
                return Output(status.output_bytes, status.kept_offset, bytes(tail))
            tail += b"".join(piece.data for piece in pieces)
            offset = pieces[-1].offset + len(pieces[-1].data)

    async def _part(self, server: AgentServer, begin: int, end: int) -> list[Piece]:
        known = self._parts.get(begin)
        if known is None or known[0] < end:
            data = await server.read_head(f"{self.folder(server)}/output/{begin:020}", _PART_BYTES)
            pieces = _pieces(begin, data)
            last = pieces[-1] if pieces else Piece(begin, OUTPUT_STREAM_STDOUT, b"")
            known = self._parts[begin] = last.offset + len(last.data), pieces
            while len(self._parts) > _CACHED_PARTS:
                self._parts.popitem(last=False)
        return known[1]


def input_request(offset: int, data: bytes, *, close: bool) -> dict[str, Any]:
    """Return the request to write to the input."""
    return {"what": "input", "offset": offset, "data": base64.b64encode(data).decode(), "close": close}


def _between(piece: Piece, begin: int, end: int) -> Piece | None:
    data = piece.data[max(0, begin - piece.offset) : max(0, end - piece.offset)]
    return Piece(max(begin, piece.offset), piece.stream, data) if data else None


def _joined(pieces: Iterable[Piece]) -> list[Piece]:
    """Put together neighbours of one stream."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if last is not None and last.stream == piece.stream and len(last.data) + len(piece.data) <= _PIECE_BYTES:
            joined[-1] = Piece(last.offset, last.stream, last.data + piece.data)
        else:
            joined.append(piece)
    return joined


def _pieces(begin: int, data: bytes) -> list[Piece]:
    """Parse frames; one that is not whole yet is left out."""
    found: list[Piece] = []
    at, offset = 0, begin
    while at + _HEAD.size <= len(data):
        stream, length = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        if at + length > len(data):
            break
        kind = OUTPUT_STREAM_STDERR if stream == OUTPUT_STREAM_STDERR else OUTPUT_STREAM_STDOUT
        found.append(Piece(offset, kind, data[at : at + length]))
        at, offset = at + length, offset + length
    return found
