"""Speaks to the sandbox-agent server in a sandbox: commands, files, and agents over ACP.

Source: https://sandboxagent.dev (HTTP API v1) and https://agentclientprotocol.com. ACP is JSON-RPC 2.0; requests
are posted, everything the agent says comes as numbered server-sent events that can be replayed from any number.
"""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import httpx
from httpx_sse import aconnect_sse

from services.runtime.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from services.sandbox.providers.base import Machine

Json = dict[str, Any]

_TIMEOUT_SECONDS = 30.0
_CONNECT_SECONDS = 5.0
_DISCONNECT_SECONDS = 1.0
_COMMAND_GRACE_SECONDS = 10.0


class AgentError(Exception):
    """The agent, or the server that runs it, refused a request."""


class AgentUnknownError(AgentError):
    """The server knows no such agent."""


@dataclass(frozen=True, slots=True)
class CommandResult:
    """How a command ended. The exit code is -1 if it was killed."""

    exit_code: int
    stdout: str
    stderr: str
    timed_out: bool
    duration_ms: int


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

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._http = httpx.AsyncClient(
            base_url=machine.url,
            headers={"Authorization": f"Bearer {machine.token}"},
            timeout=httpx.Timeout(_TIMEOUT_SECONDS, connect=_CONNECT_SECONDS),
            trust_env=False,
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def run(
        self, command: Sequence[str], directory: str, environment: Mapping[str, str], timeout_seconds: int
    ) -> CommandResult:
        """Run a command to its end. Raise FailedPrecondition if it cannot be started."""
        body = {
            "command": command[0],
            "args": list(command[1:]),
            "cwd": directory,
            "env": dict(environment),
            "timeoutMs": timeout_seconds * 1000,
        }
        wait = httpx.Timeout(timeout_seconds + _COMMAND_GRACE_SECONDS, connect=_CONNECT_SECONDS)
        answer = await self._send("POST", "/v1/processes/run", json=body, timeout=wait)
        if not answer.is_success:
            raise FailedPrecondition("COMMAND_NOT_STARTED", _detail(answer))
        result = answer.json()
        exit_code = result["exitCode"] if result["exitCode"] is not None else -1
        return CommandResult(
            exit_code, result["stdout"], result["stderr"], result["timedOut"], int(result["durationMs"])
        )

    async def list_files(self, path: str) -> list[FileEntry]:
        """List a directory, by name. Raise NotFound."""
        answer = await self._file("GET", "/v1/fs/entries", path)
        found = [
            FileEntry(
                entry["name"],
                entry["entryType"] == "directory",
                int(entry["size"]),
                datetime.fromisoformat(entry["modified"][:26] + "+00:00"),
            )
            for entry in answer.json()
        ]
        return sorted(found, key=lambda entry: entry.name)

    async def read_file(self, path: str) -> bytes:
        """Read a file. Raise NotFound."""
        return (await self._file("GET", "/v1/fs/file", path)).content

    async def write_file(self, path: str, content: bytes) -> None:
        """Write a file, its directories included."""
        await self._file("PUT", "/v1/fs/file", path, content=content)

    async def delete_file(self, path: str) -> None:
        """Delete a file or an empty directory. Raise NotFound."""
        await self._file("DELETE", "/v1/fs/entry", path)

    async def agents(self) -> list[str]:
        """Return the names of the agents that the server knows."""
        answer = await self._send("GET", "/v1/agents")
        return [agent["id"] for agent in answer.json()["agents"]]

    async def connections(self) -> set[str]:
        """Return the ids of the open agent connections."""
        answer = await self._send("GET", "/v1/acp")
        return {server["serverId"] for server in answer.json()["servers"]}

    async def disconnect(self, connection: str) -> None:
        """Stop the agent of a connection.

        The server forgets the connection at once and may not answer until the process is gone, so the answer is
        not waited for.
        """
        with suppress(httpx.ReadTimeout):
            await self._http.delete(f"/v1/acp/{connection}", timeout=_DISCONNECT_SECONDS)

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
        message = {"jsonrpc": "2.0", "id": rpc_id, "method": method, "params": params}
        wait = httpx.Timeout(timeout_seconds, connect=_CONNECT_SECONDS)
        query = {"agent": agent} if agent else {}
        answer = await self._send("POST", f"/v1/acp/{connection}", json=message, params=query, timeout=wait)
        if not answer.is_success:
            if "unsupported_agent" in answer.text:
                raise AgentUnknownError(_detail(answer))
            raise AgentError(_detail(answer))
        body: Json = answer.json()
        if "error" in body:
            raise AgentError(rpc_error(body["error"]))
        return body.get("result") or {}

    async def post(self, connection: str, message: Json) -> None:
        """Send a notification or a response to the agent. Raise AgentError if it is gone."""
        answer = await self._send("POST", f"/v1/acp/{connection}", json={"jsonrpc": "2.0", **message})
        if answer.is_error:
            raise AgentError(_detail(answer))

    @asynccontextmanager
    async def events(self, connection: str, after: int) -> AsyncGenerator[AsyncIterator[AgentEvent], None]:
        """Follow what the agent says after an event number. Raise AgentError if there is no such connection."""
        wait = httpx.Timeout(None, connect=_CONNECT_SECONDS)
        headers = {"Last-Event-ID": str(after)}
        path = f"/v1/acp/{connection}"
        async with aconnect_sse(self._http, "GET", path, headers=headers, timeout=wait) as source:
            if source.response.is_error:
                await source.response.aread()
                raise AgentError(_detail(source.response))

            async def parsed() -> AsyncIterator[AgentEvent]:
                async for event in source.aiter_sse():
                    if event.id and event.data:
                        yield AgentEvent(int(event.id), json.loads(event.data))

            yield parsed()

    async def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            return await self._http.request(method, path, **options)
        except httpx.HTTPError as error:
            raise Unavailable("SANDBOX_UNREACHABLE", f"the sandbox does not answer: {error!r}") from error

    async def _file(self, method: str, api: str, path: str, **options: Any) -> httpx.Response:
        answer = await self._send(method, api, params={"path": path}, **options)
        if not answer.is_error:
            return answer
        detail = _detail(answer)
        if "not found" in detail:
            raise NotFound("file", path)
        raise InvalidArgument("path", detail)


def rpc_error(error: Json) -> str:
    """Return words for a JSON-RPC error."""
    words = str(error.get("message") or "error")
    data = error.get("data")
    return f"{words}: {json.dumps(data)}" if data else words


def _detail(answer: httpx.Response) -> str:
    try:
        body: Json = answer.json()
    except ValueError:
        return answer.text[:500] or f"HTTP {answer.status_code}"
    return str(body.get("detail") or body.get("title") or body)[:2000]
