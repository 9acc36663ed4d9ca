"""Where the door leads, and what it says to whoever is no sandbox: over real sockets."""

import asyncio
import base64
from collections.abc import AsyncGenerator
from contextlib import suppress
from ipaddress import IPv4Network

import pytest
import pytest_asyncio

from services.sandbox.door.config import DoorConfig
from services.sandbox.door.destinations import Place, leads_to, outside, place_of
from services.sandbox.door.door import Door, Guest
from services.sandbox.door.tokens import DOOR, SERVER, Minter
from services.sandbox.providers.ports import free_port

MINTER = Minter(b"a key")
INSIDE = [
    *("127.0.0.1", "10.1.2.3", "172.18.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "224.0.0.1", "100.64.0.1"),
    *("::1", "fe80::1%eth0", "fd00::1", "::ffff:127.0.0.1"),
]


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("https://github.com/a/b.git", Place("github.com", 443)),
        ("https://user:word@Example.COM:8443/x", Place("example.com", 8443)),
        ("http://10.0.0.1/x", Place("10.0.0.1", 80)),
        ("git@github.com:a/b.git", Place("github.com", 22)),
        ("ssh://git@host:2222/x", Place("host", 2222)),
        ("https://[2001:db8::1]/x", Place("2001:db8::1", 443)),
        ("file:///srv/x.git", None),
        ("https://host:99999/x", None),
        ("https://", None),
    ],
)
def test_a_remote_is_at_a_host_and_port(url: str, place: Place | None) -> None:
    assert place_of(url) == place


def test_the_door_leads_to_the_remote_and_to_what_the_operator_named() -> None:
    config = DoorConfig(egress=["api.example.com:443", "*.npmjs.org:443"])
    remote = "https://github.com/a/b.git"
    for place in (Place("github.com", 443), Place("api.example.com", 443), Place("registry.npmjs.org", 443)):
        assert leads_to(config, remote, place)
    for place in (
        Place("github.com", 22),
        Place("npmjs.org", 443),
        Place("example.com", 443),
        Place("evilnpmjs.org", 443),
    ):
        assert not leads_to(config, remote, place)


@pytest.mark.parametrize("address", INSIDE)
def test_what_is_inside_is_not_reached_unless_it_is_named(address: str) -> None:
    assert not outside(DoorConfig(), address)
    assert outside(DoorConfig(), "140.82.121.3")
    assert outside(DoorConfig(private_networks=["10.1.0.0/16"]), "10.1.2.3")
    assert not outside(DoorConfig(private_networks=["10.1.0.0/16"]), "10.2.2.3")


@pytest.mark.parametrize(
    "given", [{"egress": ["example.com"]}, {"private_networks": ["10.0.0.1/8"]}, {"listen": "here"}]
)
def test_settings_that_mean_nothing_are_refused(given: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=next(iter(given))):
        DoorConfig(**given)  # pyright: ignore[reportArgumentType]


def test_a_token_is_of_one_sandbox_and_one_purpose() -> None:
    token = MINTER.token(DOOR, "sbx_1")
    assert MINTER.knows(DOOR, "sbx_1", token)
    assert not MINTER.knows(DOOR, "sbx_2", token)
    assert not MINTER.knows(SERVER, "sbx_1", token)
    assert not Minter(b"another").knows(DOOR, "sbx_1", token)
    assert not MINTER.knows(DOOR, "sbx_1", "é")


@pytest_asyncio.fixture
async def echo() -> AsyncGenerator[int, None]:
    """A server that says what it hears."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


def a_door(remote: str, admitted: str = "127.0.0.0/8", **given: float) -> Door:
    """Return a door for one sandbox, which is at 127.0.0.1."""
    config = DoorConfig(
        listen=f"127.0.0.1:{free_port()}",
        private_networks=["127.0.0.0/8"],
        **given,  # pyright: ignore[reportArgumentType]
    )

    async def is_at(sandbox_id: str, address: str) -> bool:
        return (sandbox_id, address) == ("sbx_1", "127.0.0.1")

    async def guest(sandbox_id: str) -> Guest:
        return Guest(sandbox_id, "task_1", remote)

    return Door(config, MINTER, IPv4Network(admitted), is_at, guest)


async def told(door: Door, said: bytes, *, end: bool = False) -> bytes:
    """Return all that the door says to somebody, until it closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", door.config.port)
    try:
        writer.write(said)
        if end:
            writer.write_eof()
        async with asyncio.timeout(10):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


def shown(sandbox_id: str = "sbx_1", of: str = "") -> bytes:
    token = MINTER.token(DOOR, of or sandbox_id)
    return b"Proxy-Authorization: Basic " + base64.b64encode(f"{sandbox_id}:{token}".encode()) + b"\r\n"


async def test_a_tunnel_carries_what_is_said_until_the_far_side_ends(echo: int) -> None:
    door = a_door(f"https://127.0.0.1:{echo}/x.git")
    await door.start()
    try:
        head = f"CONNECT 127.0.0.1:{echo} HTTP/1.1\r\nHost: x\r\n".encode() + shown() + b"\r\n"
        answer = await told(door, head + b"at once" + b"x" * 200_000, end=True)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert answer.partition(b"\r\n\r\n")[2] == b"at once" + b"x" * 200_000
    finally:
        await door.stop()


async def test_a_request_is_passed_on_without_the_sandboxs_token(echo: int) -> None:
    door = a_door(f"http://127.0.0.1:{echo}/x.git")
    await door.start()
    try:
        head = f"GET http://127.0.0.1:{echo}/x?y=1 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer mine\r\n".encode()
        said = (await told(door, head + shown() + b"\r\n", end=True)).lower()
        assert said.startswith(b"get /x?y=1 http/1.1\r\n")
        assert b"authorization: bearer mine" in said
        assert b"connection: close" in said
        assert b"proxy-authorization" not in said
    finally:
        await door.stop()


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (b"CONNECT 127.0.0.1:1 HTTP/1.1\r\nHost: x\r\n\r\n", b"407"),
        (b"CONNECT 127.0.0.1:1 HTTP/1.1\r\nHost: x\r\n" + shown(of="sbx_2") + b"\r\n", b"407"),
        (b"CONNECT 127.0.0.1:1 HTTP/1.1\r\nHost: x\r\n" + shown("sbx_2") + b"\r\n", b"403"),
        (b"CONNECT 127.0.0.1:1 HTTP/1.1\r\nHost: x\r\n" + shown() + b"\r\n", b"421"),
        (b"GET http://example.com/ HTTP/1.1\r\nHost: x\r\n" + shown() + b"\r\n", b"421"),
        (b"GET http:///x HTTP/1.1\r\nHost: x\r\n" + shown() + b"\r\n", b"400"),
        (b"GET /nonesuch HTTP/1.1\r\nHost: x\r\n" + shown() + b"\r\n", b"404"),
        (b"GET /v1/sandbox HTTP/1.1\r\nHost: x\r\nProxy-Authorization: Basic %%%\r\n\r\n", b"407"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 200_000 + b"\r\n\r\n", b"431"),
        (b"no http at all\r\n\r\n", b"400"),
    ],
)
async def test_what_is_not_done_is_refused_with_a_status(said: bytes, status: bytes) -> None:
    door = a_door("https://github.com/a/b.git")
    await door.start()
    try:
        assert (await told(door, said)).partition(b"\r\n")[0].split(b" ")[1] == status
    finally:
        await door.stop()


async def test_who_is_in_no_sandboxs_network_is_turned_away_unheard() -> None:
    door = a_door("https://github.com/a/b.git", admitted="10.0.0.0/8")
    await door.start()
    try:
        assert await told(door, b"GET /v1/sandbox HTTP/1.1\r\nHost: x\r\n" + shown() + b"\r\n") == b""
    finally:
        await door.stop()


async def test_who_says_nothing_and_a_tunnel_that_is_silent_are_closed_in_time(echo: int) -> None:
    door = a_door(f"https://127.0.0.1:{echo}/x.git", head_seconds=0.2, idle_seconds=0.2)
    await door.start()
    try:
        assert await told(door, b"GET ") == b""
        head = f"CONNECT 127.0.0.1:{echo} HTTP/1.1\r\nHost: x\r\n".encode() + shown() + b"\r\n"
        assert (await told(door, head)).startswith(b"HTTP/1.1 200 ")
    finally:
        await door.stop()


async def test_connections_beyond_the_bound_are_refused(echo: int) -> None:
    door = a_door(f"https://127.0.0.1:{echo}/x.git", connections=1)
    await door.start()
    try:
        _, held = await asyncio.open_connection("127.0.0.1", door.config.port)
        held.write(b"GET ")
        await asyncio.sleep(0.1)
        assert (await told(door, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")).startswith(b"HTTP/1.1 429 ")
        held.close()
    finally:
        await door.stop()
