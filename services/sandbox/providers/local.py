"""The `local` provider: a sandbox-agent server per sandbox on this host, inside bubblewrap where that works.

The server outlives the service, so that a restart loses no agent. Its processes carry the sandbox's id in their
environment: that is how they are found again, and how none is left behind.
"""

import asyncio
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx
import psutil
import structlog
from pydantic import BaseModel, ConfigDict

from services.sandbox.providers.base import Machine, ProviderError

log = structlog.get_logger()

_MARK = "BRANCHLINE_SANDBOX_ID"
_START_SECONDS = 20.0
_START_ATTEMPTS = 3  # another process may take the port between our look and the server's start
_STOP_SECONDS = (0.3, 5.0)
_LIMITS = ("--core=0", "--nofile=8192", "--nproc=8192")
_TMP = "/tmp"  # noqa: S108 - each sandbox gets an empty one of its own
_ACP_TIMEOUT_MS = str(24 * 3600 * 1000)

_LAUNCHER = """#!/bin/sh
# Runs an agent and says on the agent's own channel when it ends, which the server would not.
{command} "$@"
code=$?
printf '{{"jsonrpc":"2.0","method":"_branchline/agent_exited","params":{{"code":%d}}}}\\n' "$code"
exit "$code"
"""

_GITCONFIG = """[credential]
	helper = store --file ~/.git-credentials
[safe]
	directory = *
[init]
	defaultBranch = main
[push]
	autoSetupRemote = true
[advice]
	detachedHead = false
"""


class LocalProviderConfig(BaseModel):
    """Configuration of the `local` provider."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sandbox_agent: Path
    """The sandbox-agent program."""

    agents: Mapping[str, Sequence[str]] = {}
    """Command line of agents by name, in the place of what sandbox-agent would install."""

    isolation: str = "auto"
    """"auto" uses bubblewrap where it works; "bubblewrap" insists on it; "none" does without."""

    hidden_paths: Sequence[Path] = ()
    """Folders that sandboxes must not see, such as the backend's data and the user's home."""

    readable_paths: Sequence[Path] = ()
    """Folders that sandboxes may read though they lie inside hidden ones. What is hidden inside these stays hidden."""

    writable_paths: Sequence[Path] = ()
    """Folders that sandboxes may change, such as bare repositories on this host."""


class LocalProvider:
    """Runs sandboxes as processes of this host."""

    name = "local"

    def __init__(self, root: Path, config: LocalProviderConfig) -> None:
        self._root = root.absolute()
        self._config = config
        self._isolation: str | None = None

    async def create(self, sandbox_id: str) -> Machine:
        """Start the server in a home of its own, or return it if it runs."""
        running = await self.probe(sandbox_id)
        if running is not None:
            return running
        await self._stop_processes(sandbox_id)
        folder = self._root / sandbox_id
        await asyncio.to_thread(self._furnish, folder / "home")
        isolation = await self.isolation()
        ended: int | None = None
        for _ in range(_START_ATTEMPTS):
            port, token = _free_port(), secrets.token_hex(24)
            _write_private(folder / "server.json", json.dumps({"port": port, "token": token, "isolation": isolation}))
            server = await self._spawn(sandbox_id, folder, isolation, port, token)
            running = await self._answering(sandbox_id, server)
            if running is not None:
                return running
            ended = server.returncode
            await self._stop_processes(sandbox_id)
            if ended is None:
                break
        how = "did not answer in time" if ended is None else f"ended with code {ended}"
        tail = (folder / "server.log").read_text(errors="replace")[-2000:]
        raise ProviderError(f"the sandbox-agent server {how}: {tail}")

    async def _answering(self, sandbox_id: str, server: asyncio.subprocess.Process) -> Machine | None:
        """Wait until the server answers; none if it ends before, or takes too long."""
        deadline = asyncio.get_running_loop().time() + _START_SECONDS
        while server.returncode is None and asyncio.get_running_loop().time() < deadline:
            running = await self.probe(sandbox_id)
            if running is not None:
                return running
            await asyncio.sleep(0.05)
        return None

    async def resume(self, sandbox_id: str) -> Machine:
        """Start the server again; the files are as they were."""
        return await self.create(sandbox_id)

    async def pause(self, sandbox_id: str) -> None:
        """Stop the sandbox's processes."""
        await self._stop_processes(sandbox_id)

    async def destroy(self, sandbox_id: str) -> None:
        """Stop the sandbox's processes and remove its files."""
        await self._stop_processes(sandbox_id)
        await asyncio.to_thread(shutil.rmtree, self._root / sandbox_id, ignore_errors=True)

    async def probe(self, sandbox_id: str) -> Machine | None:
        """Return the machine if its server answers with our token."""
        try:
            known = json.loads((self._root / sandbox_id / "server.json").read_text())
        except (OSError, ValueError):
            return None
        url = f"http://127.0.0.1:{known['port']}"
        try:
            async with httpx.AsyncClient(trust_env=False, timeout=2.0) as http:
                answer = await http.get(f"{url}/v1/agents", headers={"Authorization": f"Bearer {known['token']}"})
        except httpx.HTTPError:
            return None
        if not answer.is_success:
            return None
        return Machine(url, known["token"], str(self._root / sandbox_id / "home"), known["isolation"])

    async def list_running(self) -> set[str]:
        """Return the sandboxes that have a folder here or a process on this host."""
        folders = {path.name for path in self._root.iterdir()} if self._root.exists() else set[str]()
        return folders | {name for name, _ in await asyncio.to_thread(self._processes)}

    async def isolation(self) -> str:
        """Return how sandboxes are isolated here; find it out on first use."""
        if self._isolation is None:
            self._isolation = await self._find_isolation()
        return self._isolation

    async def _find_isolation(self) -> str:
        if self._config.isolation == "none":
            return "none"
        if shutil.which("bwrap"):
            probe = await asyncio.create_subprocess_exec(
                *self._bubblewrap(self._root), "true", stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
            )
            _, errors = await probe.communicate()
            if probe.returncode == 0:
                return "bubblewrap"
            reason = errors.decode(errors="replace").strip()
        else:
            reason = "bwrap is not installed"
        if self._config.isolation == "bubblewrap":
            raise ProviderError(f"bubblewrap does not work here: {reason}")
        log.warning("sandboxes run as plain processes: agents can read and change what this user can", reason=reason)
        return "none"

    def _bubblewrap(self, home: Path) -> list[str]:
        home.mkdir(parents=True, exist_ok=True)
        command = ["bwrap", "--unshare-all", "--share-net", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc"]
        agent = self._config.sandbox_agent.resolve()
        mounts = [
            *((path, ["--tmpfs", str(path)]) for path in (Path(_TMP), *self._config.hidden_paths)),
            *((path, ["--ro-bind", str(path), str(path)]) for path in (*self._config.readable_paths, agent)),
            *((path, ["--bind", str(path), str(path)]) for path in (*self._config.writable_paths, home)),
        ]
        for _, mount in sorted(mounts, key=lambda mount: len(mount[0].parts)):  # what lies deeper decides
            command += mount
        return [*command, "--chdir", str(home)]

    def _furnish(self, home: Path) -> None:
        launchers = home / ".local/share/sandbox-agent/bin/agent_processes"
        launchers.mkdir(parents=True, exist_ok=True)
        for agent, command in self._config.agents.items():
            launcher = launchers / f"{agent}-acp"
            launcher.write_text(_LAUNCHER.format(command=shlex.join(command)))
            launcher.chmod(0o755)
        (home / ".gitconfig").write_text(_GITCONFIG)

    async def _spawn(
        self, sandbox_id: str, folder: Path, isolation: str, port: int, token: str
    ) -> asyncio.subprocess.Process:
        home = folder / "home"
        prefix = self._bubblewrap(home) if isolation == "bubblewrap" else []
        limits = ["prlimit", *_LIMITS] if shutil.which("prlimit") else []
        server = [str(self._config.sandbox_agent.resolve()), "server", "--no-telemetry"]
        environment = {
            "HOME": str(home),
            "PATH": os.environ.get("PATH", os.defpath),
            "LANG": "C.UTF-8",
            "TERM": "dumb",
            "GIT_TERMINAL_PROMPT": "0",
            "SANDBOX_AGENT_ACP_REQUEST_TIMEOUT_MS": _ACP_TIMEOUT_MS,
            _MARK: sandbox_id,
        }
        with (folder / "server.log").open("ab") as output:
            return await asyncio.create_subprocess_exec(
                *limits,
                *prefix,
                *server,
                *("--token", token, "--host", "127.0.0.1", "--port", str(port)),
                cwd=home,
                env=environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    async def _stop_processes(self, sandbox_id: str) -> None:
        await asyncio.to_thread(self._stop_now, sandbox_id)

    def _stop_now(self, sandbox_id: str) -> None:
        for how, patience in zip((signal.SIGTERM, signal.SIGKILL), _STOP_SECONDS, strict=True):
            found = [process for name, process in self._processes() if name == sandbox_id]
            for process in found:
                try:
                    process.send_signal(how)
                except psutil.NoSuchProcess:
                    continue
            _, alive = psutil.wait_procs(found, timeout=patience)
            if not alive:
                return

    def _processes(self) -> list[tuple[str, psutil.Process]]:
        """Find the processes of our sandboxes by the mark in their environment."""
        found: list[tuple[str, psutil.Process]] = []
        for process in psutil.process_iter():
            try:
                environment = process.environ()
            except (psutil.Error, OSError):
                continue
            name = environment.get(_MARK)
            if name and environment.get("HOME") == str(self._root / name / "home"):
                found.append((name, process))
        return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _write_private(path: Path, content: str) -> None:
    path.touch(mode=0o600)
    path.write_text(content)
