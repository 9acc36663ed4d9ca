"""A sandbox's server that says what it never would: it is told so, and nothing fails in another way. SBX-2."""

from collections.abc import Awaitable, Callable
from typing import Any, cast

import httpx
import pytest

from services.runtime.errors import DomainError
from services.sandbox.agent_server import AgentError, AgentServer, Garbled
from services.sandbox.http import Http
from services.sandbox.providers.base import Machine

SAYINGS = (
    b"",
    b"null",
    b"[]",
    b"{}",
    b'"x"',
    b"\xff",
    b'{"servers": {}}',
    b'{"entries": [1], "agents": 2}',
    b"[[" * 9999,
)
CALLS: dict[str, Callable[[AgentServer], Awaitable[Any]]] = {
    "start": lambda server: server.start_process(["true"], "/", {}),
    "process": lambda server: server.process("1"),
    "output": lambda server: server.output("1"),
    "stat": lambda server: server.stat_file("/x"),
    "read": lambda server: server.read_file("/x"),
    "agents": lambda server: server.agents(),
    "connections": lambda server: server.connections(),
    "request": lambda server: server.request("c", "session/new", {}, 1),
}


class Saying:
    """HTTP that is answered with the same words always."""

    def __init__(self, status: int, content: bytes) -> None:
        self.answer = httpx.Response(status, content=content)

    async def send(self, *_: Any, **__: Any) -> httpx.Response:
        return self.answer


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("status", [200, 500])
@pytest.mark.parametrize("said", SAYINGS)
async def test_what_makes_no_sense_is_told_as_such(call: str, status: int, said: bytes) -> None:
    server = AgentServer(Machine("http://nowhere", "token", "/", "none"), cast("Http", Saying(status, said)))
    try:
        found = await CALLS[call](server)
    except (DomainError, AgentError) as error:
        assert status == 500 or isinstance(error, Garbled)  # noqa: PT017 - some of what is said makes sense to some
    else:
        assert not found


@pytest.mark.parametrize("error", [b"1", b"null", b'"x"', b"[]", b'{"message": {}}'])
async def test_an_error_of_any_shape_is_one(error: bytes) -> None:
    said = Saying(200, b'{"error": ' + error + b"}")
    server = AgentServer(Machine("http://nowhere", "token", "/", "none"), cast("Http", said))
    with pytest.raises(AgentError):
        await server.request("c", "session/new", {}, 1)


@pytest.mark.parametrize("call", ["start", "process", "stat", "request"])
async def test_where_a_machine_lives_on_its_host_is_in_no_error(call: str) -> None:
    home = "/srv/data/sandbox/local/sbx_1/home"
    said = Saying(400, b'{"detail": "path is not a directory: %s/workspace/README.md"}' % home.encode())
    server = AgentServer(Machine("http://nowhere", "token", home, "none"), cast("Http", said))
    with pytest.raises((DomainError, AgentError), match=r"not a directory: ~/workspace/README\.md"):
        await CALLS[call](server)
