"""The `local` provider against the real sandbox-agent server: how starts fail and what is tried again."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.installation import find_sandbox_agent
from services.sandbox.agent_server import AgentServer
from services.sandbox.commands import run
from services.sandbox.providers import local
from services.sandbox.providers.base import ProviderError
from services.sandbox.providers.local import LocalProvider, LocalProviderConfig

AGENT_SERVER = find_sandbox_agent()


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port that somebody else listens on."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield int(other.getsockname()[1])


async def test_a_program_that_ends_at_once_is_told_with_its_code(tmp_path: Path) -> None:  # SBX-2
    provider = LocalProvider(tmp_path, LocalProviderConfig(sandbox_agent=Path("/bin/false"), isolation="none"))
    with pytest.raises(ProviderError, match="ended with code 1"):
        await provider.create("sbx_ends")
    assert not [name for name, _ in provider._processes() if name == "sbx_ends"]  # pyright: ignore[reportPrivateUsage]


async def test_a_port_that_was_taken_meanwhile_is_given_up_for_another(
    tmp_path: Path, taken_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:  # SBX-2
    find = local._free_port  # pyright: ignore[reportPrivateUsage]
    ports = iter([taken_port])
    monkeypatch.setattr(local, "_free_port", lambda: next(ports, None) or find())
    provider = LocalProvider(tmp_path, LocalProviderConfig(sandbox_agent=AGENT_SERVER, isolation="none"))
    try:
        machine = await provider.create("sbx_port")
        assert not machine.url.endswith(f":{taken_port}")
        assert await provider.probe("sbx_port") == machine
    finally:
        await provider.destroy("sbx_port")
    assert await provider.list_running() == set()


async def test_a_sandbox_sees_the_project_and_not_the_data_within_it(tmp_path: Path) -> None:  # SBX-2
    project, data = tmp_path / "project", tmp_path / "project" / "data"
    data.mkdir(parents=True)
    (project / "README").write_text("read me")
    (data / "signing.key").write_text("secret")
    config = LocalProviderConfig(
        sandbox_agent=AGENT_SERVER,
        hidden_paths=[data, tmp_path],
        readable_paths=[project],
    )
    provider = LocalProvider(data / "local", config)
    assert await provider.isolation() == "bubblewrap"
    server = AgentServer(await provider.create("sbx_sees"))
    try:
        seen = await run(
            server, ["sh", "-c", f"cat {project}/README; ls {data}; echo x > {project}/README"], "/", {}, 10
        )
        assert seen.stdout == "read melocal\n"
        assert seen.end.exit_code != 0
        assert "Read-only" in seen.stderr
    finally:
        await server.close()
        await provider.destroy("sbx_sees")
