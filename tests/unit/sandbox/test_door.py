"""Where the door leads, and what it says to whoever is no sandbox: over real sockets."""

import asyncio
import base64
import socket
import threading
from collections.abc import AsyncGenerator
from contextlib import suppress
from ipaddress import IPv4Network
from typing import Any

import psutil
import pytest
import pytest_asyncio

from services.sandbox.door import dialler
from services.sandbox.door.config import DoorConfig
from services.sandbox.door.destinations import Place, leads_to, named, place_of, public
from services.sandbox.door.door import Door, Guest
from services.sandbox.door.tokens import DOOR, SERVER, Minter
from services.sandbox.providers.ports import free_port

MINTER = Minter(b"a key")
INSIDE = [
    *("127.0.0.1", "10.1.2.3", "172.18.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "224.0.0.1", "100.64.0.1"),
    *("::1", "fe80::1%eth0", "fd00::1", "::ffff:127.0.0.1", "fec0::1", "::7f00:1", "ff02::1"),
    *("64:ff9b::a9fe:a9fe", "64:ff9b:1::a00:1", "2002:7f00:1::", "2001:0:7f00:1::1"),
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
    assert not public(address)
    assert not named(DoorConfig(), address)


def test_what_is_public_or_named_is_reached() -> None:
    for address in ("140.82.121.3", "2606:50c0:8000::153", "64:ff9b::8c52:7903"):
        assert public(address)
    assert named(DoorConfig(private_networks=["10.1.0.0/16"]), "10.1.2.3")
    assert named(DoorConfig(private_networks=["10.1.0.0/16"]), "::ffff:10.1.2.3")
    assert not named(DoorConfig(private_networks=["10.1.0.0/16"]), "10.2.2.3")


def test_what_the_operator_named_in_other_letters_or_as_an_address_is_reached() -> None:
    config = DoorConfig(egress=["API.example.com:443", "[2001:db8::1]:443"])
    for url in ("https://api.example.com/", "https://[2001:db8::1]/"):
        place = place_of(url)
        assert place is not None
        assert leads_to(config, "", place)


@pytest.mark.parametrize(
    "given",
    [{"egress": ["example.com"]}, {"private_networks": ["10.0.0.1/8"]}, {"listen": "here"}, {"listen": "[::]:7710"}],
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


def a_door(remote: str, admitted: str = "127.0.0.0/8", **given: Any) -> Door:
    """Return a door for one sandbox, which is at 127.0.0.1."""
    settings: dict[str, Any] = {"listen": f"127.0.0.1:{free_port()}", "private_networks": ["127.0.0.0/8"], **given}
    config = DoorConfig(**settings)

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


async def test_a_request_is_passed_on_to_the_host_of_its_url_alone(echo: int) -> None:
    """It may be of a time without a Host, and what stands under Connection is for the door."""
    door = a_door(f"http://127.0.0.1:{echo}/x.git")
    await door.start()
    try:
        head = f"GET http://me:word@127.0.0.1:{echo}?y=1 HTTP/1.0\r\nConnection: x-mine\r\nX-Mine: 1\r\n".encode()
        said = (await told(door, head + shown() + b"\r\n", end=True)).lower()
        assert said.startswith(f"get /?y=1 http/1.1\r\nhost: 127.0.0.1:{echo}\r\n".encode())
        assert b"x-mine" not in said
        assert b"via: 1.1 door" in said
    finally:
        await door.stop()


async def test_a_token_that_is_not_for_the_door_opens_it_only_for_the_doors_own(echo: int) -> None:
    door = a_door(f"http://127.0.0.1:{echo}/x.git")
    await door.start()
    mine = shown().removeprefix(b"Proxy-")
    try:
        assert b" 200 " in await told(door, b"GET /v1/sandbox HTTP/1.1\r\nHost: x\r\n" + mine + b"\r\n")
        head = f"GET http://127.0.0.1:{echo}/x HTTP/1.1\r\nHost: x\r\n".encode()
        assert (await told(door, head + mine + b"\r\n")).startswith(b"HTTP/1.1 407 ")
    finally:
        await door.stop()


async def connect(door: Door, place: str) -> bytes:
    """Return the first line that the door says to who wants a tunnel."""
    answer = await told(door, f"CONNECT {place} HTTP/1.1\r\nHost: x\r\n".encode() + shown() + b"\r\n", end=True)
    return answer.partition(b"\r\n")[0]


async def test_every_address_of_a_place_is_tried(echo: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def two(*_: object, **__: object) -> list[tuple[object, ...]]:
        kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
        return [(*kind, ("127.0.0.2", echo)), (*kind, ("127.0.0.1", echo))]

    monkeypatch.setattr(socket, "getaddrinfo", two)
    door = a_door(f"https://git.example:{echo}/x.git")
    await door.start()
    try:
        assert b" 200 " in await connect(door, f"git.example:{echo}")
    finally:
        await door.stop()


async def test_names_that_nobody_answers_for_hold_up_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()

    def wait(*_: object, **__: object) -> list[object]:
        answered.wait(20)
        raise socket.gaierror("nobody answers")

    door = a_door("", head_seconds=0.3, egress=["*.example:443"])
    await door.start()
    monkeypatch.setattr(socket, "getaddrinfo", wait)
    try:
        answers = await asyncio.gather(*(connect(door, f"git{number % 8}.example:443") for number in range(40)))
        assert {answer.split(b" ")[1] for answer in answers} == {b"502", b"429"}
        async with asyncio.timeout(2):
            assert await asyncio.to_thread(lambda: True)
        answered.set()
    finally:
        answered.set()
        await door.stop()


async def test_a_name_that_is_none_is_not_reached() -> None:
    door = a_door("", egress=["*.example:443"])
    await door.start()
    try:
        assert b" 502 " in await connect(door, f"{'x' * 70}.example:443")
    finally:
        await door.stop()


async def test_this_host_is_not_reached_by_an_address_that_is_public(
    echo: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its firewalls would not see it: what is sent to oneself comes in from oneself."""

    def yes(address: str) -> bool:
        return bool(address)

    monkeypatch.setattr(dialler, "public", yes)  # as the host's own address is, where it has one
    door = a_door(f"https://127.0.0.1:{echo}/x.git", private_networks=[])
    await door.start()
    try:
        assert b" 421 " in await connect(door, f"127.0.0.1:{echo}")
    finally:
        await door.stop()


async def test_who_hears_nothing_is_cut_off() -> None:
    """All that a sandbox did not read would otherwise be kept, with its descriptor, for as long as it likes."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            for _ in range(100):
                writer.write(b"x" * 100_000)
                await writer.drain()
        writer.close()

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        door = a_door(f"https://127.0.0.1:{port}/x.git", head_seconds=0.3, idle_seconds=0.3)
        await door.start()
        process = psutil.Process()
        before = process.num_fds()
        deaf = socket.create_connection(("127.0.0.1", door.config.port))
        try:
            deaf.sendall(f"CONNECT 127.0.0.1:{port} HTTP/1.1\r\nHost: x\r\n".encode() + shown() + b"\r\n")
            async with asyncio.timeout(10):
                while process.num_fds() <= before + 1:  # noqa: ASYNC110 - the kernel tells nobody
                    await asyncio.sleep(0.01)
                while process.num_fds() > before + 1:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        finally:
            deaf.close()
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
        _, beyond = await asyncio.open_connection("127.0.0.1", door.config.port)
        beyond.write(b"GET ")
        await asyncio.sleep(0.1)
        assert await told(door, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n") == b""
        held.close()
        beyond.close()
    finally:
        await door.stop()
