"""What is known of a request that failed: whether it may have arrived."""

import asyncio

import pytest

from services.sandbox.agent_server import Unreachable
from services.sandbox.http import Http
from services.sandbox.providers.ports import free_port


async def test_a_request_to_where_nobody_listens_was_never_sent() -> None:
    http = Http()

    with pytest.raises(Unreachable) as failed:
        await http.send("GET", f"http://127.0.0.1:{free_port()}/v1/acp", 5.0)

    await http.close()
    assert not failed.value.sent


async def test_a_request_that_was_cut_off_may_have_arrived() -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    http, url = Http(), f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/acp"

    with pytest.raises(Unreachable) as asked:
        await http.send("POST", url, 5.0)
    with pytest.raises(Unreachable) as listened:
        async with http.listen(url, 5.0):
            pass

    await http.close()
    server.close()
    assert asked.value.sent
    assert listened.value.sent
