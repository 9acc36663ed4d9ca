"""The `local` provider against the real sandbox-agent server: how starts fail and what is tried again."""

import socket
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from cli.installation import find_sandbox_agent
from services.sandbox.agent_server import AgentServer, open_http
from services.sandbox.commands import run
from services.sandbox.providers import ports
from services.sandbox.providers.base import Condition, ProviderError
from services.sandbox.providers.local import LocalProvider, LocalProviderConfig

AGENT_SERVER = find_sandbox_agent()


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port that somebody else listens on."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield int(other.getsockname()[1])


@pytest_asyncio.fixture
async def http() -> AsyncGenerator[httpx.AsyncClient, None]:
    async with open_http() as client:
        yield client


async def test_a_program_that_ends_at_once_is_told_with_its_code(
    tmp_path: Path, http: httpx.AsyncClient
) -> None:  # SBX-2
    provider = LocalProvider(tmp_path, LocalProviderConfig(sandbox_agent=Path("/bin/false")), http)

    with pytest.raises(ProviderError, match="ended with code 1"):
        await provider.create("sbx_ends")
    assert not provider.processes.of("sbx_ends")


async def test_a_port_that_was_taken_meanwhile_is_given_up_for_another(
    tmp_path: Path, taken_port: int, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:  # SBX-2
    find, guesses = ports.free_port, iter([taken_port])

    def guess() -> int:
        return next(guesses, None) or find()

    monkeypatch.setattr(ports, "free_port", guess)
    provider = LocalProvider(tmp_path, LocalProviderConfig(sandbox_agent=AGENT_SERVER), http)
    try:
        machine = await provider.create("sbx_port")
        probe = await provider.probe("sbx_port")
        assert not machine.url.endswith(f":{taken_port}")
        assert (probe.condition, probe.machine) == (Condition.ALIVE, machine)
    finally:
        await provider.destroy("sbx_port")
    assert await provider.known() == set()


async def test_a_sandbox_sees_the_project_and_not_the_data_within_it(
    tmp_path: Path, http: httpx.AsyncClient
) -> None:  # SBX-2, F14
    project, data = tmp_path / "project", tmp_path / "project" / "data"
    data.mkdir(parents=True)
    (project / "README").write_text("read me")
    (data / "signing.key").write_text("secret")
    config = LocalProviderConfig(
        sandbox_agent=AGENT_SERVER, isolation="bubblewrap", hidden_paths=[data, tmp_path], readable_paths=[project]
    )
    provider = LocalProvider(data / "local", config, http)
    try:
        server = AgentServer(await provider.create("sbx_sees"), http)
        seen = await run(
            server, ["sh", "-c", f"cat {project}/README; ls {data}; echo x > {project}/README"], "/", {}, 10
        )
        assert seen.stdout == "read melocal\n"
        assert seen.end.exit_code != 0
        assert "Read-only" in seen.stderr
    finally:
        await provider.destroy("sbx_sees")
