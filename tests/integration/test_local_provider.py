"""The `local` provider against the real sandbox-agent server: how starts fail, and what sandboxes see of the host."""

import asyncio
import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from cli.installation import python_paths
from services.runtime.config import read_config
from services.sandbox.agent_server import AgentServer
from services.sandbox.commands import CommandResult, run
from services.sandbox.http import Http
from services.sandbox.providers import ports
from services.sandbox.providers.base import Condition, ProviderError
from services.sandbox.providers.local import LocalProvider, LocalProviderConfig
from services.sandbox.providers.processes import is_root

AGENT_SERVER = Path("node_modules/@sandbox-agent/cli-linux-x64/bin/sandbox-agent").absolute()
BOTH = pytest.mark.parametrize("isolation", ["bubblewrap", "none"])


@pytest.fixture(autouse=True, scope="module")
def bubblewrap() -> None:
    assert shutil.which("bwrap"), "these tests need the Debian package bubblewrap"


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A folder that other users can reach, as the data of a backend that runs as root must be."""
    folder = Path(tempfile.mkdtemp(dir="/var/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port that somebody else listens on."""
    with socket.create_server(("127.0.0.1", ports.free_port())) as other:
        yield int(other.getsockname()[1])


@pytest_asyncio.fixture
async def http() -> AsyncGenerator[Http, None]:
    client = Http()
    yield client
    await client.close()


def a_provider(root: Path, http: Http, isolation: str = "bubblewrap", **given: object) -> LocalProvider:
    config = {"sandbox_agent": AGENT_SERVER, "isolation": isolation, "readable_paths": python_paths(), **given}
    return LocalProvider(root, read_config(LocalProviderConfig, config), lambda: http)


async def said(provider: LocalProvider, http: Http, script: str, sandbox_id: str = "sbx_1") -> CommandResult:
    machine = await provider.create(sandbox_id)
    return await run(AgentServer(machine, http), ["sh", "-c", script], machine.home, {}, 20)


async def test_a_program_that_ends_at_once_is_told_with_its_code(tmp_path: Path, http: Http) -> None:  # SBX-2
    provider = a_provider(tmp_path, http, sandbox_agent=Path("/bin/false"))
    with pytest.raises(ProviderError, match="ended with code 1"):
        await provider.create("sbx_1")
    assert not provider.processes.of("sbx_1")


async def test_a_port_that_was_taken_meanwhile_is_given_up_for_another(
    tmp_path: Path, taken_port: int, monkeypatch: pytest.MonkeyPatch, http: Http
) -> None:  # F13
    find = ports.free_port
    given = iter([taken_port])
    monkeypatch.setattr(ports, "free_port", lambda: next(given, None) or find())
    provider = a_provider(tmp_path, http)
    try:
        machine = await provider.create("sbx_1")
        assert not machine.url.endswith(f":{taken_port}")
        assert (await provider.probe("sbx_1")).machine == machine
    finally:
        await provider.destroy("sbx_1")
    assert await provider.known() == set()


async def test_a_paused_machine_is_unknown_and_a_killed_one_gone(tmp_path: Path, http: Http) -> None:  # F21
    provider = a_provider(tmp_path, http)
    try:
        machine = await provider.create("sbx_1")
        for process in provider.processes.of("sbx_1"):
            process.suspend()
        await asyncio.sleep(0.5)  # threads stop one after the other
        assert (await provider.probe("sbx_1")).condition is Condition.UNKNOWN
        with pytest.raises(ProviderError):
            await provider.create("sbx_1")
        for process in provider.processes.of("sbx_1"):
            process.resume()
        assert (await provider.probe("sbx_1")).machine == machine
        for process in provider.processes.of("sbx_1"):
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended with one before
                process.kill()
        psutil.wait_procs(provider.processes.of("sbx_1"), timeout=5)
        assert (await provider.probe("sbx_1")).condition is Condition.GONE
        assert (await provider.resume("sbx_1")).home == machine.home
    finally:
        await provider.destroy("sbx_1")


async def test_a_sandbox_sees_the_project_and_not_the_data_within_it(tmp_path: Path, http: Http) -> None:  # F14
    project, data = tmp_path / "project", tmp_path / "project" / "data"
    data.mkdir(parents=True)
    (project / "README").write_text("read me")
    (data / "signing.key").write_text("secret")
    provider = a_provider(data / "local", http, "auto", hidden_paths=[data, tmp_path], readable_paths=[project])
    try:
        seen = await said(provider, http, f"cat {project}/README; ls {data}; echo x > {project}/README")
        assert seen.stdout == "read melocal\n"
        assert seen.end.exit_code != 0
        assert "Read-only" in seen.stderr
    finally:
        await provider.destroy("sbx_1")


@BOTH
async def test_the_backends_keys_and_data_cannot_be_read_in_a_sandbox(
    open_path: Path, isolation: str, http: Http
) -> None:  # F14
    assert isolation == "bubblewrap" or is_root(), "only a backend that runs as root can give sandboxes another user"
    data, remotes = open_path / "data", open_path / "data" / "remotes"
    secrets = [
        data / "signing.key",
        data / "encryption.key",
        data / "task" / "task.sqlite",
        data / "sandbox" / "x.sqlite",
        open_path / "branchline.toml",
    ]
    for secret in secrets:
        secret.parent.mkdir(parents=True, exist_ok=True)
        secret.write_text("secret")
    remotes.mkdir()
    remotes.chmod(0o777)
    hidden = [data, open_path / "branchline.toml"]
    provider = a_provider(data / "sandbox" / "local", http, isolation, hidden_paths=hidden, writable_paths=[remotes])
    mask = os.umask(0o022)
    try:
        await provider.start()
        late = data / "sandbox" / "made-later.sqlite"
        late.write_text("secret")
        for secret in (*secrets, late):
            seen = await said(provider, http, f"cat {secret}")
            assert seen.end.exit_code != 0
            assert "secret" not in seen.stdout
        token = await said(provider, http, f"cat {data}/sandbox/local/sbx_1/server.json")
        assert "token" not in token.stdout
        worked = await said(provider, http, f"git init -q w && echo x > w/a && cp w/a {remotes}/a && cat {remotes}/a")
        assert worked.stdout == "x\n", worked.stderr
    finally:
        os.umask(mask)
        await provider.destroy("sbx_1")


async def test_without_bubblewrap_nothing_starts_and_the_package_is_named(
    tmp_path: Path, http: Http, monkeypatch: pytest.MonkeyPatch
) -> None:  # F14
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ProviderError, match=r'Debian package bubblewrap.*isolation = "none"'):
        await a_provider(tmp_path, http, "auto").start()


@pytest.mark.skipif(not is_root(), reason="another user is given only by root")
async def test_data_that_the_other_user_cannot_reach_is_refused_with_the_folder(
    open_path: Path, http: Http
) -> None:  # F14
    closed = open_path / "closed"
    closed.mkdir(mode=0o700)
    mask = os.umask(0o022)
    try:
        with pytest.raises(ProviderError, match=f"may not pass {closed}"):
            await a_provider(closed / "data" / "local", http, "none").start()
    finally:
        os.umask(mask)


async def test_a_missing_program_and_a_missing_directory_are_told_alike(tmp_path: Path, http: Http) -> None:  # SBX-6
    provider = a_provider(tmp_path, http)
    try:
        server = AgentServer(await provider.create("sbx_1"), http)
        for command, directory in ((["nonesuch"], "/"), (["true"], "/nonesuch")):
            with pytest.raises(Exception, match=r"nonesuch|directory|No such") as raised:
                await run(server, command, directory, {}, 10)
            assert getattr(raised.value, "reason", "") == "COMMAND_FAILED"
        shell = await run(server, ["sh", "-c", "nonesuch"], "/", {}, 10)
        assert shell.end.exit_code == 127
        broken = await run(server, ["sh", "-c", "head -c 2000000 /dev/zero | tr '\\0' '\\377'"], "/", {}, 20)
        assert len(broken.stdout.encode()) <= 1024 * 1024
    finally:
        await provider.destroy("sbx_1")


async def test_one_hundred_commands_at_once_do_not_wait_for_streams(tmp_path: Path, http: Http) -> None:  # F21
    """The one client that all machines share has no bound on connections that streams could use up."""
    provider = a_provider(tmp_path, http)
    try:
        server = AgentServer(await provider.create("sbx_1"), http)
        held = [asyncio.ensure_future(run(server, ["sleep", "20"], "/", {}, 30)) for _ in range(60)]
        await asyncio.sleep(1)
        async with asyncio.timeout(10):
            assert (await run(server, ["echo", "quick"], "/", {}, 10)).stdout == "quick\n"
        for command in held:
            command.cancel()
        await asyncio.gather(*held, return_exceptions=True)
    finally:
        await provider.destroy("sbx_1")
