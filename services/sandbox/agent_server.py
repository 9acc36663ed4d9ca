"""Speaks to the sandbox-agent server in a sandbox: commands, files, and agents over ACP.

Source: https://sandboxagent.dev (HTTP API v1) and https://agentclientprotocol.com. ACP is JSON-RPC 2.0; requests
are posted, everything the agent says comes as numbered server-sent events that can be replayed from any number.
"""

import errno
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar, cast

import msgspec
from branchline.v1.common_pb2 import ENTITY_KIND_FILE
from branchline.v1.errors_pb2 import (
    ERROR_REASON_COMMAND_FAILED,
    ERROR_REASON_FILE_TOO_LARGE,
    ERROR_REASON_SANDBOX_UNREACHABLE,
)

from services.runtime.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from services.runtime.limits import CHUNK_BYTES
from services.sandbox.members import member, text_of
from services.sandbox.providers.base import Machine
from services.sandbox.words import clean

if TYPE_CHECKING:
    from httpx import Response

    from services.sandbox.http import Http

Json = dict[str, Any]

T = TypeVar("T")

_TIMEOUT_SECONDS = 30.0
_DISCONNECT_SECONDS = 1.0
_STOP_MS = 2000
_DETAIL_CHARACTERS = 2000

_NUMBER = re.compile(r"\(os error (\d+)\)$")
_REFUSALS: Mapping[int, str] = {
    errno.EPERM: "is closed to the sandbox's user",
    errno.EACCES: "is closed to the sandbox's user",
    errno.EROFS: "is on a file system that is not written to",
    errno.EBUSY: "is the working tree itself, or in use",
    errno.EEXIST: "lies below something that is no directory",
    errno.ENOTDIR: "is no directory, or lies below something that is none",
    errno.EISDIR: "is a directory",
    errno.EINVAL: "must be another place, and neither inside the other",
    errno.ENAMETOOLONG: "has a name that is too long",
    errno.ENOTEMPTY: "is a directory that is not empty",
    errno.ELOOP: "is a link that leads in a circle",
    errno.EXDEV: "is on another file system",
    errno.ENOSPC: "has no space left for it",
    errno.EDQUOT: "has no space left for it",
}

FILE_BYTES = CHUNK_BYTES
"""Largest file that is read or written whole."""


class AgentError(Exception):
    """The agent, or the server that runs it, refused a request."""

    def __init__(self, words: str, output: str = "") -> None:
        super().__init__(words)
        self.output = output
        """What the agent wrote on its standard error, where the server tells it."""

    @classmethod
    def of(cls, error: Json) -> "AgentError":
        """Return a JSON-RPC error."""
        words = text_of(error, "message") or "error"
        data, output = error.get("data"), ""
        if isinstance(data, dict):
            told = dict(cast("Json", data))
            output = str(told.pop("agentStderr", None) or "")
            data = told
        if data:
            words = f"{words}: {json.dumps(data, ensure_ascii=False)}"
        return cls(words[:_DETAIL_CHARACTERS], output)


class AgentUnknownError(AgentError):
    """The server knows no such agent."""


class Unreachable(Unavailable):
    """The server does not answer, or broke off."""

    def __init__(self, error: Exception, *, sent: bool) -> None:
        super().__init__(ERROR_REASON_SANDBOX_UNREACHABLE, f"the sandbox does not answer: {error!r}")
        self.sent = sent
        """Whether the request may have arrived."""


class Garbled(Unavailable):
    """The server answers what it never would: another program is in its place, such as the agent's own."""

    def __init__(self, error: Exception) -> None:
        super().__init__(ERROR_REASON_SANDBOX_UNREACHABLE, f"the sandbox's server makes no sense: {error}")


class _Started(msgspec.Struct):
    id: str


class _Process(msgspec.Struct, rename="camel"):
    status: str
    created_at_ms: int
    exited_at_ms: int | None = None
    exit_code: int | None = None


class _Output(msgspec.Struct):
    sequence: int
    stream: str
    data: bytes


class _Logs(msgspec.Struct):
    entries: list[_Output]


class _File(msgspec.Struct, rename="camel"):
    entry_type: str
    size: int
    modified: str


class _Agent(msgspec.Struct):
    id: str
    installed: bool
    capabilities: dict[str, Any]


class _Agents(msgspec.Struct):
    agents: list[_Agent]


class _Connection(msgspec.Struct, rename="camel"):
    server_id: str


class _Connections(msgspec.Struct):
    servers: list[_Connection]


@dataclass(frozen=True, slots=True)
class ProcessOutput:
    """A piece of what a process wrote. `number` counts them over both streams."""

    number: int
    error: bool
    data: bytes


@dataclass(frozen=True, slots=True)
class ProcessState:
    """Where a process stands. There is no exit code while it runs, nor if a signal ended it."""

    running: bool
    exit_code: int | None
    duration_ms: int


@dataclass(frozen=True, slots=True)
class AgentInfo:
    """An agent that the server knows. `capabilities` holds those it has, in the server's words."""

    name: str
    installed: bool
    capabilities: list[str]


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file or directory."""

    name: str
    directory: bool
    size_bytes: int
    modify_time: datetime


@dataclass(frozen=True, slots=True)
class AgentEvent:
    """One JSON-RPC message from the agent, with its number in the stream."""

    number: int
    message: Json


class AgentServer:
    """The server of one running machine."""

    def __init__(self, machine: Machine, http: "Http") -> None:
        self.machine = machine
        self._http = http
        self._headers = {"Authorization": f"Bearer {machine.token}"}

    async def start_process(self, command: Sequence[str], directory: str, environment: Mapping[str, str]) -> str:
        """Start a process and return its id. Raise FailedPrecondition if it cannot be started."""
        body = {"command": command[0], "args": list(command[1:]), "cwd": directory, "env": dict(environment)}
        answer = await self._send("POST", "/v1/processes", json=body)
        if answer.is_error:
            raise FailedPrecondition(ERROR_REASON_COMMAND_FAILED, self._said(answer))
        return _read(answer.content, _Started).id

    async def process(self, process_id: str) -> ProcessState:
        """Return where a process stands."""
        known = _read((await self._process("GET", process_id)).content, _Process)
        return ProcessState(known.status == "running", known.exit_code, (known.exited_at_ms or 0) - known.created_at_ms)

    async def output(self, process_id: str) -> list[ProcessOutput]:
        """Return what is kept of a process's output."""
        kept = _read((await self._process("GET", process_id, "/logs")).content, _Logs)
        return [_output(entry) for entry in kept.entries]

    async def follow_output(self, process_id: str) -> AsyncGenerator[ProcessOutput, None]:
        """Follow a process's output from its start. It does not end when the process does."""
        url = self._url(f"/v1/processes/{process_id}/logs")
        follow, headers = {"follow": "true"}, {**self._headers}
        async with self._http.listen(url, None, self.machine.vouched, params=follow, headers=headers) as source:
            async for event in source.aiter_sse():
                if event.data:
                    yield _output(_read(event.data, _Output))

    async def stop_process(self, process_id: str) -> None:
        """Ask a process to end, and forget it."""
        await self._process("POST", process_id, "/stop", params={"waitMs": _STOP_MS})
        await self._process("DELETE", process_id)

    async def forget_process(self, process_id: str) -> None:
        """Drop an ended process and its output."""
        await self._process("DELETE", process_id)

    async def stat_file(self, path: str) -> FileEntry:
        """Return what is known of the file or directory that a path leads to. Raise NotFound."""
        known = await self._file("GET", "/v1/fs/stat", path)
        return _file_entry(PurePosixPath(path).name, _read(known.content, _File))

    async def read_file(self, path: str) -> bytes:
        """Read a file. Raise NotFound, or FailedPrecondition if it is too large."""
        size = (await self.stat_file(path)).size_bytes
        if size > FILE_BYTES:
            words = f"{PurePosixPath(path).name} has {size} bytes, more than 1 MiB"
            shown = path.replace(self.machine.home, "~")
            raise FailedPrecondition(ERROR_REASON_FILE_TOO_LARGE, words, path=shown, size_bytes=str(size))
        return (await self._file("GET", "/v1/fs/file", path)).content[:FILE_BYTES]

    async def read_head(self, path: str, most_bytes: int) -> bytes:
        """Read the beginning of a file in one call. Raise NotFound, or InvalidArgument for what is no file."""
        options = {"params": {"path": path}, "headers": self._headers}
        url, vouched = self._url("/v1/fs/file"), self.machine.vouched
        answer, content = await self._http.read(url, most_bytes, _TIMEOUT_SECONDS, vouched, **options)
        if not answer.is_error:
            return content
        words = content.decode(errors="replace")[:_DETAIL_CHARACTERS]
        if "not found" in words:
            raise NotFound(ENTITY_KIND_FILE, path)
        if answer.is_client_error:
            raise InvalidArgument("path", words)
        raise Unavailable(ERROR_REASON_SANDBOX_UNREACHABLE, f"the sandbox does not give a file: {words}")

    async def write_file(self, path: str, content: bytes) -> None:
        """Write a file of at most 1 MiB, its directories included; the server takes no more than 2 at once."""
        await self._file("PUT", "/v1/fs/file", path, content=content)

    async def agents(self) -> list[AgentInfo]:
        """Return the agents that the server knows."""
        answer = await self._send("GET", "/v1/agents")
        return [_agent_info(agent) for agent in _read(answer.content, _Agents).agents]

    async def connections(self) -> set[str]:
        """Return the ids of the open agent connections."""
        answer = await self._send("GET", "/v1/acp")
        if answer.is_error:
            raise self._refusal(answer)
        return {server.server_id for server in _read(answer.content, _Connections).servers}

    async def disconnect(self, connection: str) -> None:
        """Have the server forget a connection. Its agent's processes may go on.

        The server does not answer until the agent has ended, so the answer is not waited for.
        """
        try:
            await self._send("DELETE", f"/v1/acp/{connection}", _DISCONNECT_SECONDS)
        except Unreachable as error:
            if not error.sent:
                raise

    async def ask(
        self,
        connection: str,
        method: str,
        params: Json,
        rpc_id: int,
        agent: str = "",
        timeout_seconds: float | None = _TIMEOUT_SECONDS,
    ) -> Json:
        """Make a request to the agent and return its answer, good or bad. Raise AgentError if the server refuses."""
        message = {"jsonrpc": "2.0", "id": rpc_id, "method": method, "params": params}
        query = {"agent": agent} if agent else {}
        answer = await self._send("POST", f"/v1/acp/{connection}", timeout_seconds, json=message, params=query)
        if not answer.is_success:
            if "unsupported_agent" in answer.text:
                raise AgentUnknownError(self._said(answer))
            raise self._refusal(answer)
        return _parsed(answer.text)

    async def request(
        self,
        connection: str,
        method: str,
        params: Json,
        rpc_id: int,
        agent: str = "",
        timeout_seconds: float | None = _TIMEOUT_SECONDS,
    ) -> Json:
        """Make a request to the agent and return its result. Raise AgentError."""
        body = await self.ask(connection, method, params, rpc_id, agent, timeout_seconds)
        if "error" in body:
            raise AgentError.of(member(body, "error"))
        return member(body, "result")

    async def post(self, connection: str, message: Json) -> None:
        """Send a notification or a response to the agent. Raise AgentError if it is gone."""
        answer = await self._send("POST", f"/v1/acp/{connection}", json={"jsonrpc": "2.0", **message})
        if answer.is_error:
            raise self._refusal(answer)

    @asynccontextmanager
    async def events(
        self, connection: str, after: int, silence_seconds: float
    ) -> AsyncGenerator[AsyncIterator[AgentEvent], None]:
        """Follow what the agent says after an event number.

        Raise AgentError if there is no such connection, Unreachable if the stream breaks or is silent, without even a
        heartbeat, for too long.
        """
        headers = {**self._headers, "Last-Event-ID": str(after)}
        url, vouched = self._url(f"/v1/acp/{connection}"), self.machine.vouched
        async with self._http.listen(url, silence_seconds, vouched, headers=headers) as source:
            if source.response.is_error:
                await source.response.aread()
                raise self._refusal(source.response)

            async def parsed() -> AsyncIterator[AgentEvent]:
                async for event in source.aiter_sse():
                    if event.id and event.data:
                        yield AgentEvent(_read(event.id, int), _parsed(event.data))

            yield parsed()

    def _url(self, path: str) -> str:
        return f"{self.machine.url}{path}"

    async def _send(
        self, method: str, path: str, timeout_seconds: float | None = _TIMEOUT_SECONDS, **options: Any
    ) -> "Response":
        vouched, url = self.machine.vouched, self._url(path)
        return await self._http.send(method, url, timeout_seconds, vouched, headers=self._headers, **options)

    async def _process(self, method: str, process_id: str, what: str = "", **options: Any) -> "Response":
        answer = await self._send(method, f"/v1/processes/{process_id}{what}", **options)
        if answer.is_error:
            raise Unavailable(ERROR_REASON_SANDBOX_UNREACHABLE, f"the sandbox lost the process: {self._said(answer)}")
        return answer

    async def _file(self, method: str, api: str, path: str, **options: Any) -> "Response":
        answer = await self._send(method, api, params={"path": path}, **options)
        if not answer.is_error:
            return answer
        said = self._said(answer)
        number = _NUMBER.search(said)
        if "not found" in said or (number and int(number[1]) == errno.ELOOP):
            raise NotFound(ENTITY_KIND_FILE, path)
        raise InvalidArgument("path", refusal(int(number[1])) if number else said)

    def _refusal(self, answer: "Response") -> AgentError:
        """Return the error of a request that the server refused."""
        try:
            problem = _read(answer.content, dict[str, Any])
        except Garbled:
            problem = dict[str, Any]()
        output = problem.get("agentStderr") or problem.get("agent_stderr") or ""
        return AgentError(self._said(answer), str(output))

    def _said(self, answer: "Response") -> str:
        """Return the server's words about an error. Where on its host a machine lives is nobody's business."""
        return _detail(answer).replace(self.machine.home, "~")


def refusal(number: int | None) -> str:
    """Return why something is not done to a file, by the number of the operating system's error."""
    return _REFUSALS.get(number or 0, "cannot be used so")


def _time(words: str) -> datetime:
    """Return a file's time. A file may have any: one of a year that is none here counts as the first of all."""
    try:
        return datetime.fromisoformat(words)
    except ValueError:
        return datetime.fromtimestamp(0, UTC)


def _read(said: str | bytes, kind: type[T]) -> T:
    """Read what the server says. Raise Garbled."""
    try:
        return msgspec.json.decode(said, type=kind)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise Garbled(error) from error


def _file_entry(name: str, entry: _File) -> FileEntry:
    return FileEntry(name, entry.entry_type == "directory", entry.size, _time(entry.modified))


def _agent_info(agent: _Agent) -> AgentInfo:
    return AgentInfo(agent.id, agent.installed, sorted(name for name, has in agent.capabilities.items() if has))


def _output(entry: _Output) -> ProcessOutput:
    return ProcessOutput(entry.sequence, entry.stream == "stderr", entry.data)


def _parsed(text: str) -> Json:
    """Parse what an agent says. Only escapes can stand for characters that cannot be kept."""
    try:
        message: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Garbled(error) from error
    if not isinstance(message, dict):
        raise Garbled(TypeError("a message is an object"))
    said = cast("Json", message)
    return clean(said) if "\\u" in text else said


def _detail(answer: "Response") -> str:
    try:
        body = _read(answer.content, dict[str, Any])
    except Garbled:
        return answer.text[:500] or f"HTTP {answer.status_code}"
    return str(body.get("detail") or body.get("title") or body)[:_DETAIL_CHARACTERS]
