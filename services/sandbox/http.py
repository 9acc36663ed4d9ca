"""HTTP to the servers of all machines, through one client."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from httpx_sse import EventSource, aconnect_sse

from services.sandbox.agent_server import Unreachable

_CONNECT_SECONDS = 5.0
_IDLE_CONNECTIONS = 64


class Http:
    """The one client. Streams and prompts hold connections: these are not bounded."""

    def __init__(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=_IDLE_CONNECTIONS)
        # Plain HTTP on this host: no certificates, and no proxy of the environment.
        self._client = httpx.AsyncClient(limits=limits, trust_env=False, verify=False)  # noqa: S501

    async def send(self, method: str, url: str, timeout_seconds: float | None, **options: Any) -> httpx.Response:
        """Make a request and return the answer, good or bad. Raise Unreachable."""
        wait = httpx.Timeout(timeout_seconds, connect=min(_CONNECT_SECONDS, timeout_seconds or _CONNECT_SECONDS))
        try:
            return await self._client.request(method, url, timeout=wait, **options)
        except httpx.HTTPError as error:
            raise _unreachable(error) from error

    @asynccontextmanager
    async def listen(
        self, url: str, silence_seconds: float | None, **options: Any
    ) -> AsyncGenerator[EventSource, None]:
        """Follow a stream of events. Raise Unreachable if it breaks or is silent for too long."""
        wait = httpx.Timeout(silence_seconds, connect=_CONNECT_SECONDS)
        try:
            async with aconnect_sse(self._client, "GET", url, timeout=wait, **options) as source:
                yield source
        except httpx.HTTPError as error:
            raise _unreachable(error) from error

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()


def _unreachable(error: httpx.HTTPError) -> Unreachable:
    never_sent = httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout
    return Unreachable(error, sent=not isinstance(error, never_sent))
