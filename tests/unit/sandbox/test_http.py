"""What is known of a request that failed: whether it may have arrived."""

import asyncio
import gzip
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress

import pytest

from services.sandbox.agent_server import Unreachable
from services.sandbox.http import ANSWER_BYTES, Http
from services.sandbox.providers.ports import free_port


async def test_a_request_to_where_nobody_listens_was_never_sent() -> None:
    http = Http()

    with pytest.raises(Unreachable) as failed:
        await http.send("GET", f"http://127.0.0.1:{free_port()}/v1/acp", 5.0, None)

    await http.close()
    assert not failed.value.sent


def forever(piece: bytes) -> Iterator[bytes]:
    """What is said without an end, up to three times what is heard."""
    for _ in range(3 * ANSWER_BYTES // len(piece)):
        yield piece


@pytest.mark.parametrize(
    ("kind", "piece"),
    [
        ("application/json\r\nconnection: close", b" " * 65536),
        ("text/event-stream\r\nconnection: close", b"data: " + b"x" * 65529 + b"\n"),
        ("application/json\r\ncontent-encoding: gzip\r\nconnection: close", gzip.compress(b"{}", mtime=0)),
    ],
)
async def test_an_answer_without_an_end_is_broken_off(kind: str, piece: bytes) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\n\r\n".encode())
        with suppress(ConnectionError):
            for one in forever(piece):
                writer.write(one)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    http, url = Http(), f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/acp"
    tracemalloc.start()

    async def hear() -> None:
        if "event-stream" not in kind:
            await http.send("GET", url, 5.0, None)
            return
        async with http.listen(url, 5.0, None) as source:
            async for _ in source.aiter_sse():
                pass

    with pytest.raises(Unreachable, match="says too much"):
        await hear()
    held = tracemalloc.get_traced_memory()[1]

    tracemalloc.stop()
    await http.close()
    server.close()
    assert held < 3 * ANSWER_BYTES


async def test_events_are_bounded_one_by_one() -> None:
    event = b"data: " + b"x" * 65536 + b"\n\n"
    count = ANSWER_BYTES // len(event) + 10

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
        for _ in range(count):
            writer.write(event)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    http, url = Http(), f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/acp"

    async with http.listen(url, 5.0, None) as source:
        heard = [one.data async for one in source.aiter_sse()]

    await http.close()
    server.close()
    assert len(heard) == count


async def test_a_request_that_was_cut_off_may_have_arrived() -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    http, url = Http(), f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/acp"

    with pytest.raises(Unreachable) as asked:
        await http.send("POST", url, 5.0, None)
    with pytest.raises(Unreachable) as listened:
        async with http.listen(url, 5.0, None):
            pass

    await http.close()
    server.close()
    assert asked.value.sent
    assert listened.value.sent
