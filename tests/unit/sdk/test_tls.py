"""Safe connections: when they are TLS, and what is said where they do not come about."""

import asyncio
import logging
import ssl
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import grpc
import pytest
from branchline import AsyncClient, BranchlineError, Client, TlsError, TlsFault
from branchline.tls import Endpoint, endpoint
from branchline.v1.users_pb2 import GetCurrentUserRequest

from cli.certificates import DOOR
from services.runtime.tls import Certificate
from tests.support.certificates import certificates, replace
from tests.unit.sdk.server import Server, served

HERE = ["127.0.0.1", "localhost"]
Serve = Callable[[], AbstractAsyncContextManager[Server]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return certificates(tmp_path)


@pytest.fixture
def tls_server(folder: Path) -> Serve:
    """Return what serves with the certificate that is there by then, whatever is wrong with it."""

    @asynccontextmanager
    async def serving() -> AsyncGenerator[Server, None]:
        key, certificate = ((folder / DOOR / name).read_bytes() for name in ("tls.key", "tls.crt"))
        async with served(grpc.ssl_server_credentials([(key, certificate)])) as server:
            yield server

    return serving


async def fault_of(client: AsyncClient) -> TlsError:
    """Call, and return why there is no connection; that is found long before the call's time is over."""
    began = time.monotonic()
    async with client:
        with pytest.raises(TlsError) as failed:
            await client.users.get_current_user(GetCurrentUserRequest())
    assert time.monotonic() - began < 15
    return failed.value


async def test_a_client_that_is_given_the_authority_calls(folder: Path, tls_server: Serve) -> None:
    async with tls_server() as server, AsyncClient(server.address, "secret", ca=folder / "ca" / "ca.crt") as client:
        await client.users.get_current_user(GetCurrentUserRequest())

    assert server.authorizations == ["Bearer secret"]


async def test_a_wrong_authority_is_said(tls_server: Serve, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = certificates(tmp_path_factory.mktemp("other")) / "ca" / "ca.crt"
    async with tls_server() as server:
        given = await fault_of(AsyncClient(server.address, ca=other))
        systems = await fault_of(AsyncClient(server.address, insecure=False))

    assert given.fault == systems.fault == TlsFault.UNKNOWN_AUTHORITY
    assert "signed by an authority that is not trusted here" in str(given)
    assert given.code == grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("names", "days", "fault", "words"),
    [
        (HERE, -0.001, TlsFault.EXPIRED, "has expired"),
        (["gateway.example"], 30, TlsFault.WRONG_NAME, "made for another name"),
    ],
)
async def test_what_is_wrong_with_a_certificate_is_said(
    folder: Path, tls_server: Serve, names: list[str], days: float, fault: TlsFault, words: str
) -> None:
    replace(folder, DOOR, names, days=days)
    async with tls_server() as server:
        found = await fault_of(AsyncClient(server.address, ca=folder / "ca" / "ca.crt"))
        watching = AsyncClient(server.address, ca=folder / "ca" / "ca.crt")
        async with watching, watching.watch_task("task_1") as view:
            with pytest.raises(TlsError) as failed:
                await view.wait_for(lambda _: True, timeout_seconds=20)

    assert found.fault == failed.value.fault == fault
    assert words in str(found)


async def test_plaintext_to_a_server_with_tls_is_said(tls_server: Serve) -> None:
    async with tls_server() as server:
        found = await fault_of(AsyncClient(server.address))

    assert found.fault == TlsFault.TLS_REQUIRED


async def test_tls_to_a_server_without_it_is_said(server: Server, folder: Path) -> None:
    found = await fault_of(AsyncClient(server.address, ca=folder / "ca" / "ca.crt"))

    assert found.fault == TlsFault.NO_TLS


async def test_a_server_that_is_not_there_is_no_fault_of_certificates() -> None:
    assert await Endpoint("127.0.0.1:9", secure=True).fault() is None
    assert await Endpoint("127.0.0.1:9", secure=False).fault() is None


async def test_looking_for_a_fault_takes_no_longer_than_the_call_may() -> None:
    """The first connection is closed, and those that come to look at why are left without a word."""
    connections: list[asyncio.StreamWriter] = []

    async def say_nothing(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        if len(connections) == 1:
            writer.close()

    server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, AsyncClient(f"127.0.0.1:{port}", "secret", timeout_seconds=0.5) as client:
        began = time.monotonic()
        with pytest.raises(BranchlineError) as failed:
            await client.users.get_current_user(GetCurrentUserRequest())
        assert time.monotonic() - began < 3
        assert not isinstance(failed.value, TlsError)
        assert len(connections) > 1
        for connection in connections:
            connection.close()


@pytest.mark.parametrize(
    ("address", "secure"),
    [
        ("127.0.0.1:7700", False),
        ("localhost:7700", False),
        ("unix:/run/gateway", False),
        ("branchline.example", True),
        ("10.0.0.1:7700", True),
        ("[2001:db8::1]:7700", True),
    ],
)
def test_only_this_host_is_spoken_to_in_plaintext(address: str, secure: bool) -> None:
    assert endpoint(address).secure is secure


def test_plaintext_to_another_host_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "branchline"):
        assert not endpoint("gateway.example:7700", insecure=True).secure

    assert "the connection to gateway.example:7700 is not encrypted" in caplog.text


def test_a_file_without_authorities_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text("nothing")

    for path in (tmp_path / "ca.crt", tmp_path / "missing"):
        with pytest.raises(ValueError, match="holds no certificates of authorities"):
            endpoint("gateway.example:7700", path)
    with pytest.raises(ValueError, match="leave out one of the two"):
        Client("here:1", ca="ca.crt", insecure=True)


async def test_a_new_certificate_is_shown_to_who_connects_and_old_connections_go_on(folder: Path) -> None:
    place = replace(folder, DOOR, HERE)
    certificate = Certificate(place / "tls.crt", place / "tls.key")
    async with (
        served(certificate.server_credentials()) as server,
        AsyncClient(server.address, ca=folder / "ca" / "ca.crt") as client,
    ):
        await client.users.get_current_user(GetCurrentUserRequest())
        first = await _shown(server.address)
        replace(folder, DOOR, HERE)
        second = await _shown(server.address, unlike=first)
        await client.users.get_current_user(GetCurrentUserRequest())

    assert second == (place / "tls.crt").read_text()


async def _shown(address: str, unlike: str = "") -> str:
    """Return the certificate that a new connection is shown, once it is another."""
    host, _, port = address.rpartition(":")
    async with asyncio.timeout(20):
        while (found := await asyncio.to_thread(ssl.get_server_certificate, (host, int(port)))) == unlike:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    return found
