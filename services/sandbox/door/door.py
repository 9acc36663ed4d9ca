"""The listener that sandboxes reach, and all that they reach: an HTTP proxy to the few places where a sandbox may go.

A sandbox says who it is by its token, and must be where that sandbox is: the token of another does not help it. CONNECT
gives it a tunnel; a request for an http:// URL is passed on, one to a connection. GET /v1/sandbox tells it who it is.
Source: RFC 9110 (CONNECT, Proxy-Authorization), RFC 9112 (absolute form); h11 reads and writes the heads.
"""

import asyncio
import base64
import binascii
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import IPv4Network, ip_address
from urllib.parse import urlsplit

import h11

from services.runtime.errors import DomainError, Unavailable
from services.runtime.logging import get_logger
from services.sandbox.door.config import DoorConfig
from services.sandbox.door.destinations import Place, leads_to, place_of
from services.sandbox.door.dialler import NO_WAY, READ_BYTES, Dialler, Ends, Refused
from services.sandbox.door.tokens import DOOR, Minter
from services.sandbox.providers.base import ProviderError

log = get_logger(__name__)

_HEAD_BYTES = 16 * 1024
_LINGER_SECONDS = 1.0
_FOR_THE_DOOR = frozenset(
    {b"connection", b"host", b"keep-alive", b"proxy-authorization", b"proxy-connection", b"upgrade"}
)


@dataclass(frozen=True, slots=True)
class Guest:
    """A sandbox that may pass."""

    sandbox_id: str
    task_id: str
    remote_url: str


@dataclass(slots=True)
class Door:
    """One listener for all sandboxes."""

    config: DoorConfig
    minter: Minter
    admitted: IPv4Network
    """Where sandboxes are. Others are turned away unheard."""

    is_at: Callable[[str, str], Awaitable[bool]]
    """Says whether a sandbox has an address. Raises ProviderError."""

    guest: Callable[[str], Awaitable[Guest]]
    """Returns what is known of a sandbox. Raises DomainError if there is none, or no more."""

    _dialler: Dialler = field(init=False)
    _server: asyncio.Server | None = None
    _held: Counter[str] = field(default_factory=Counter[str])
    _passing: set[asyncio.Task[None]] = field(default_factory=set[asyncio.Task[None]])

    def __post_init__(self) -> None:
        self._dialler = Dialler(self.config)

    async def start(self) -> None:
        """Listen. Raise OSError if the port is taken."""
        self._server = await asyncio.start_server(self._take, self.config.host, self.config.port, limit=READ_BYTES)

    async def stop(self) -> None:
        """Close the door, with all that pass."""
        if self._server is not None:
            self._server.close()
        for task in self._passing:
            task.cancel()
        if self._passing:
            await asyncio.wait(self._passing)
        self._dialler.close()

    def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("peername")  # none, where it is gone already
        address = str(peer[0]) if peer else ""
        admitted = peer and ip_address(address) in self.admitted
        if not admitted or self._held[address] >= 2 * self.config.connections:
            writer.transport.abort()
            return
        self._held[address] += 1
        task = asyncio.ensure_future(self._serve(reader, writer, address))
        self._passing.add(task)
        task.add_done_callback(self._passing.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: str) -> None:
        try:
            await self._answer((reader, writer), address)
        except (OSError, TimeoutError):
            pass  # it is gone, or hears nothing
        except Exception:
            log.exception("a connection at the door failed", address=address)
        finally:
            self._held[address] -= 1
            if not self._held[address]:
                del self._held[address]
            writer.transport.abort()  # closing would wait for who hears nothing

    async def _answer(self, client: Ends, address: str) -> None:
        reader, writer = client
        talk = h11.Connection(h11.SERVER, max_incomplete_event_size=_HEAD_BYTES)
        try:
            if self._held[address] > self.config.connections:
                raise Refused(429, f"a sandbox may have {self.config.connections} connections at a time")
            async with asyncio.timeout(self.config.head_seconds):
                request = await _head(talk, reader)
            if request is None:
                return
            guest = await self._known(request, address)
            if request.method == b"CONNECT":
                await self._tunnel(talk, request, guest, client)
            elif request.target.startswith(b"http://"):
                await self._pass_on(talk, request, guest, client)
            else:
                _say(talk, writer, *_own_answer(request, guest))
        except h11.RemoteProtocolError as error:
            _say(talk, writer, error.error_status_hint, f"it is not understood: {error}")
        except Refused as refused:
            log.info("refused at the door", address=address, reason=str(refused))
            _say(talk, writer, refused.status, str(refused))
        async with asyncio.timeout(self.config.head_seconds):
            await _part(client)

    async def _known(self, request: h11.Request, address: str) -> Guest:
        """Return who asks. Raise Refused."""
        sandbox_id, token = _credentials(request)
        if not token or not self.minter.knows(DOOR, sandbox_id, token):
            raise Refused(407, "the door wants a sandbox's id and token (BRANCHLINE_DOOR_TOKEN)")
        try:
            if not await self.is_at(sandbox_id, address):
                raise Refused(403, "the token is another sandbox's")
            return await self.guest(sandbox_id)
        except Unavailable as error:
            raise Refused(503, error.message) from error
        except DomainError as error:
            raise Refused(403, error.message) from error
        except ProviderError as error:
            raise Refused(503, str(error)) from error

    async def _reach(self, place: Place | None, guest: Guest) -> Ends:
        """Connect to a place. Raise Refused if a sandbox may not go there, or nobody is there."""
        if place is None:
            raise Refused(400, "it names no host and port")
        if not leads_to(self.config, guest.remote_url, place):
            words = f"the door does not lead to {place}: a sandbox reaches its git remote and sandbox.door.egress"
            raise Refused(NO_WAY, words)
        return await self._dialler.reach(place, guest.sandbox_id)

    async def _tunnel(self, talk: h11.Connection, request: h11.Request, guest: Guest, client: Ends) -> None:
        beyond = await self._reach(place_of(request.target.decode(errors="replace"), 443), guest)
        client[1].write(talk.send(h11.Response(status_code=200, headers=[], reason=b"Connection established")) or b"")
        await self._carry(client, beyond, talk.trailing_data[0])

    async def _pass_on(self, talk: h11.Connection, request: h11.Request, guest: Guest, client: Ends) -> None:
        url = request.target.decode(errors="replace")
        head = _onward(request, url)
        beyond = await self._reach(place_of(url, 80), guest)
        await self._carry(client, beyond, head + talk.trailing_data[0])

    async def _carry(self, client: Ends, beyond: Ends, first: bytes) -> None:
        """Carry bytes both ways until the far side has ended, or both are silent for too long."""
        try:
            async with asyncio.timeout(self.config.idle_seconds) as silence:

                def heard() -> None:
                    if not silence.expired():
                        silence.reschedule(asyncio.get_running_loop().time() + self.config.idle_seconds)

                beyond[1].write(first)
                outward = asyncio.ensure_future(_pump(client[0], beyond[1], heard))
                try:
                    await _pump(beyond[0], client[1], heard)
                finally:
                    outward.cancel()
                    await asyncio.gather(outward, return_exceptions=True)
        finally:
            beyond[1].transport.abort()


async def _head(talk: h11.Connection, reader: asyncio.StreamReader) -> h11.Request | None:
    """Read what is wanted; None if the other side goes away without a word."""
    while True:
        event = talk.next_event()
        if isinstance(event, h11.Request):
            return event
        if event is not h11.NEED_DATA:
            return None
        talk.receive_data(await reader.read(READ_BYTES))


async def _part(client: Ends) -> None:
    """Let the other side hear the last word before the connection is closed, whatever it says itself meanwhile."""
    reader, writer = client
    writer.transport.set_write_buffer_limits(0)
    await writer.drain()
    writer.write_eof()
    with suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_SECONDS):
            while await reader.read(READ_BYTES):
                pass


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, heard: Callable[[], None]) -> None:
    while data := await source.read(READ_BYTES):
        heard()
        sink.write(data)
        await sink.drain()
    with suppress(OSError):
        sink.write_eof()


def _credentials(request: h11.Request) -> tuple[str, str]:
    """Return the sandbox's id and the token that a request shows the door; empty ones where it shows none."""
    headers = dict(request.headers)
    shown = headers.get(b"proxy-authorization", b"")
    if not shown and request.target.startswith(b"/"):  # of any other, it is for whom the request is passed on to
        shown = headers.get(b"authorization", b"")
    scheme, _, value = shown.partition(b" ")
    if scheme.lower() != b"basic":
        return "", ""
    try:
        sandbox_id, _, token = base64.b64decode(value, validate=True).decode().partition(":")
    except (binascii.Error, ValueError):
        return "", ""
    return sandbox_id, token


def _onward(request: h11.Request, url: str) -> bytes:
    """Return the head of a request as it is passed on. Raise Refused if it cannot be."""
    try:
        parts = urlsplit(url)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        named = {
            word.strip().lower() for key, value in request.headers if key == b"connection" for word in value.split(b",")
        }
        kept = [(key, value) for key, value in request.headers if key not in _FOR_THE_DOOR | named]
        host = parts.netloc.rpartition("@")[2]
        headers = [(b"Host", host.encode()), *kept, (b"Via", b"1.1 door"), (b"Connection", b"close")]
        return h11.Connection(h11.CLIENT).send(h11.Request(method=request.method, target=path, headers=headers)) or b""
    except (ValueError, h11.LocalProtocolError) as error:
        raise Refused(400, f"it cannot be passed on: {error}") from error


def _own_answer(request: h11.Request, guest: Guest) -> tuple[int, str]:
    if request.method != b"GET" or request.target != b"/v1/sandbox":
        return 404, "the door knows GET /v1/sandbox"
    told = {"sandbox_id": guest.sandbox_id, "task_id": guest.task_id, "git_remote": guest.remote_url}
    return 200, json.dumps(told)


def _say(talk: h11.Connection, writer: asyncio.StreamWriter, status: int, words: str) -> None:
    """Answer, and end the connection."""
    if talk.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
        return
    body = f"{words}\n".encode()
    headers = [("Content-Length", str(len(body))), ("Content-Type", "text/plain"), ("Connection", "close")]
    if status == 407:
        headers.append(("Proxy-Authenticate", 'Basic realm="door"'))
    for event in (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
        writer.write(talk.send(event) or b"")
