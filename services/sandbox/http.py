"""HTTP to the servers of all machines, through one client."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from httpx_sse import EventSource, aconnect_sse

from services.sandbox.agent_server import Unreachable

_CONNECT_SECONDS = 5.0
_IDLE_CONNECTIONS = 64

ANSWER_BYTES = 16 * 1024 * 1024
"""Most that an answer, or one event of a stream, may have: it is held in memory, and an agent may have written it."""

Vouched = Callable[[], bool] | None
"""`Machine.vouched`."""


class Http:
    """The one client. Streams and prompts hold connections: these are not bounded."""

    def __init__(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=_IDLE_CONNECTIONS)
        # Plain HTTP on this host: no certificates, and no proxy of the environment.
        plain = httpx.AsyncHTTPTransport(limits=limits, trust_env=False, verify=False)
        self._client = httpx.AsyncClient(
            transport=_Bounded(plain), trust_env=False, headers={"Accept-Encoding": "identity"}
        )

    async def send(
        self, method: str, url: str, timeout_seconds: float | None, vouched: Vouched, **options: Any
    ) -> httpx.Response:
        """Make a request and return the answer, good or bad. Raise Unreachable."""
        wait = httpx.Timeout(timeout_seconds, connect=min(_CONNECT_SECONDS, timeout_seconds or _CONNECT_SECONDS))
        try:
            return await self._client.request(method, url, timeout=wait, extensions=_guarded(vouched), **options)
        except httpx.HTTPError as error:
            raise _unreachable(error) from error

    async def read(
        self, url: str, most_bytes: int, timeout_seconds: float, vouched: Vouched, **options: Any
    ) -> tuple[httpx.Response, bytes]:
        """Read the beginning of what there is, at most so many bytes of it. Raise Unreachable."""
        wait = httpx.Timeout(timeout_seconds, connect=min(_CONNECT_SECONDS, timeout_seconds))
        content = bytearray()
        try:
            guarded = _guarded(vouched)
            async with self._client.stream("GET", url, timeout=wait, extensions=guarded, **options) as answer:
                async for piece in answer.aiter_bytes():
                    content += piece
                    if len(content) >= most_bytes:
                        break
        except httpx.HTTPError as error:
            raise _unreachable(error) from error
        return answer, bytes(content[:most_bytes])

    @asynccontextmanager
    async def listen(
        self, url: str, silence_seconds: float | None, vouched: Vouched, **options: Any
    ) -> AsyncGenerator[EventSource, None]:
        """Follow a stream of events. Raise Unreachable if it breaks or is silent for too long."""
        wait = httpx.Timeout(silence_seconds, connect=_CONNECT_SECONDS)
        try:
            guarded = _guarded(vouched)
            async with aconnect_sse(self._client, "GET", url, timeout=wait, extensions=guarded, **options) as source:
                yield source
        except httpx.HTTPError as error:
            raise _unreachable(error) from error

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()


@dataclass(frozen=True, slots=True)
class _Bounded(httpx.AsyncBaseTransport):
    """Breaks off an answer that is too large, or packed."""

    plain: httpx.AsyncBaseTransport

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        answer = await self.plain.handle_async_request(request)
        packed = answer.headers.get("content-encoding", "identity") != "identity"
        events = answer.headers.get("content-type", "").startswith("text/event-stream")
        assert isinstance(answer.stream, httpx.AsyncByteStream)
        answer.stream = _BoundedStream(answer.stream, 0 if packed else ANSWER_BYTES, events)
        return answer

    async def aclose(self) -> None:
        await self.plain.aclose()


@dataclass(frozen=True, slots=True)
class _BoundedStream(httpx.AsyncByteStream):
    whole: httpx.AsyncByteStream
    most: int
    events: bool
    """Whether each event is bounded, and not all of them together."""

    async def __aiter__(self) -> AsyncGenerator[bytes, None]:
        held = 0
        async for part in self.whole:
            held = len(part) if self.events and b"\n\n" in part else held + len(part)
            if held > self.most:
                raise httpx.ReadError("the sandbox's server says too much, or says it packed")
            yield part

    async def aclose(self) -> None:
        await self.whole.aclose()


def _guarded(vouched: Vouched) -> dict[str, Any]:
    """Return what keeps a request from being sent to somebody else: no byte goes out before it is known who listens.

    Source: httpx, "Extensions", `trace`; what is raised there ends the request.
    """
    if vouched is None:
        return {}

    async def trace(event: str, given: Mapping[str, Any]) -> None:
        if not event.startswith("connection.connect_tcp.") or event.endswith(".failed"):
            return
        if not await asyncio.to_thread(vouched):
            connection = given.get("return_value")
            if connection is not None:
                await connection.aclose()
            raise httpx.ConnectError("another program listens in the place of the sandbox's server")

    return {"trace": trace}


def _unreachable(error: httpx.HTTPError) -> Unreachable:
    never_sent = httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout
    return Unreachable(error, sent=not isinstance(error, never_sent))
