"""The `local` provider: a sandbox-agent server per sandbox on this host, inside bubblewrap.

The server outlives the service, so that a restart loses no agent. Its processes carry the sandbox's id in their
environment: that is how they are found again, and how none is left behind.
"""

import asyncio
import json
import os
import secrets
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from services.runtime.config import Config
from services.runtime.logging import get_logger
from services.sandbox.agent_server import Unreachable
from services.sandbox.providers import isolation, ports
from services.sandbox.providers.base import Condition, Machine, Probe, ProviderError
from services.sandbox.providers.processes import SANDBOX_MARK, SandboxProcesses

if TYPE_CHECKING:
    from services.sandbox.http import Http

log = get_logger(__name__)

_START_SECONDS = 20.0
_START_ATTEMPTS = 5  # another process may take the port between our look and the server's start
_PROBE_SECONDS = 2.0
_LIMITS = ("--core=0", "--nofile=8192", "--nproc=8192")
_ACP_TIMEOUT_MS = str(24 * 3600 * 1000)

_LAUNCHER = """#!/bin/sh
# Runs an agent, marks what it starts, and says on the agent's own channel when it ends, which the server would not.
export BRANCHLINE_AGENT=$$
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


class LocalProviderConfig(Config, frozen=True):
    """Configuration of the `local` provider."""

    sandbox_agent: Path
    """The sandbox-agent program."""

    agents: Mapping[str, Sequence[str]] = {}
    """Command line of agents by name, in the place of what sandbox-agent would install."""

    isolation: str = "auto"
    """"auto" and "bubblewrap" need bubblewrap; "none" does without, deliberately."""

    user_id: int = 65534
    """User that sandboxes run as where isolation is "none" and the backend is root's. `writable_paths` must be
    writable for it. 0 has them run as root, too: for agents that are trusted like the backend."""

    hidden_paths: Sequence[Path] = ()
    """Folders that sandboxes must not see, such as the backend's data and the user's home."""

    readable_paths: Sequence[Path] = ()
    """Folders that sandboxes may read though they lie inside hidden ones. What is hidden inside these stays hidden."""

    writable_paths: Sequence[Path] = ()
    """Folders that sandboxes may change, such as bare repositories on this host."""


@dataclass(frozen=True, slots=True)
class _Known:
    """What is written down of a sandbox's server."""

    port: int
    token: str
    isolation: str


class LocalProvider:
    """Runs sandboxes as processes of this host."""

    name = "local"

    def __init__(self, root: Path, config: LocalProviderConfig, http: "Callable[[], Http]") -> None:
        self._root = root.absolute()
        self._config = config
        self._http = http
        self._program = config.sandbox_agent.resolve()
        self._mounts = isolation.Mounts(
            hidden=tuple(config.hidden_paths),
            readable=(*config.readable_paths, self._program),
            writable=tuple(config.writable_paths),
        )
        self._isolation = ""
        self._user_id: int | None = None
        self.processes = SandboxProcesses(self._root, str(self._program))

    async def start(self) -> None:
        """Find out how sandboxes are isolated, and close the backend's files to them."""
        self._isolation = await isolation.find_isolation(self._config.isolation, self._root, self._mounts)
        self._user_id = isolation.user_of_sandboxes(self._isolation, self._config.user_id)
        if self._user_id is not None:
            await asyncio.to_thread(isolation.close_to_others, self._root, self._mounts, self._user_id)

    async def create(self, sandbox_id: str) -> Machine:
        """Start the server in a home of its own, or return it if it runs."""
        running = await self.probe(sandbox_id)
        if running.machine is not None:
            return running.machine
        if running.condition is Condition.UNKNOWN:
            raise ProviderError("its server is there and does not answer")
        if not self._isolation:
            await self.start()
        await self._stop_processes(sandbox_id)
        folder = self._root / sandbox_id
        await asyncio.to_thread(self._furnish, folder)
        ended: int | None = None
        for _ in range(_START_ATTEMPTS):
            known = _Known(ports.free_port(), secrets.token_hex(24), self._isolation)
            _write_private(folder / "server.json", json.dumps({name: getattr(known, name) for name in known.__slots__}))
            server = await self._spawn(sandbox_id, folder, known)
            machine = await self._answering(sandbox_id, known, server)
            if machine is not None:
                return machine
            ended = server.returncode
            await self._stop_processes(sandbox_id)
            if ended is None:
                break
        how = "did not answer in time" if ended is None else f"ended with code {ended}"
        tail = (folder / "server.log").read_text(errors="replace")[-2000:]
        raise ProviderError(f"the sandbox-agent server {how}: {tail}")

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

    async def probe(self, sandbox_id: str) -> Probe:
        """Ask the server, with our token. One that does not answer is gone only if its process is."""
        known = self._known(sandbox_id)
        machine = await self._ask(sandbox_id, known) if known is not None else None
        if machine is not None:
            return Probe(Condition.ALIVE, machine)
        there = await asyncio.to_thread(self.processes.has_server, sandbox_id)
        return Probe(Condition.UNKNOWN if there else Condition.GONE)

    async def known(self) -> set[str]:
        """Return the sandboxes that have a folder here or a process on this host."""
        folders = {path.name for path in self._root.iterdir()} if self._root.exists() else set[str]()
        return folders | {name for name, _ in await asyncio.to_thread(self.processes.all)}

    async def agents(self, sandbox_id: str) -> set[str]:
        """Return the names of the processes that the server started as agents."""
        return await asyncio.to_thread(self.processes.agents, sandbox_id)

    async def end_agent(self, sandbox_id: str, process: str) -> bool:
        """End an agent's process with all its descendants."""
        return await asyncio.to_thread(self.processes.end_agent, sandbox_id, process)

    def _known(self, sandbox_id: str) -> _Known | None:
        try:
            return _Known(**json.loads((self._root / sandbox_id / "server.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None

    async def _ask(self, sandbox_id: str, known: _Known) -> Machine | None:
        url = f"http://127.0.0.1:{known.port}"
        headers = {"Authorization": f"Bearer {known.token}"}
        try:
            answer = await self._http().send("GET", f"{url}/v1/acp", _PROBE_SECONDS, headers=headers)
        except Unreachable:
            return None
        if not answer.is_success:
            return None
        return Machine(url, known.token, str(self._root / sandbox_id / "home"), known.isolation)

    async def _answering(self, sandbox_id: str, known: _Known, server: asyncio.subprocess.Process) -> Machine | None:
        """Wait until the server answers; none if it ends before, or takes too long."""
        deadline = asyncio.get_running_loop().time() + _START_SECONDS
        while server.returncode is None and asyncio.get_running_loop().time() < deadline:
            machine = await self._ask(sandbox_id, known)
            if machine is not None:
                return machine
            await asyncio.sleep(0.05)
        return None

    def _furnish(self, folder: Path) -> None:
        home = folder / "home"
        launchers = home / ".local/share/sandbox-agent/bin/agent_processes"
        launchers.mkdir(parents=True, exist_ok=True)
        for agent, command in self._config.agents.items():
            launcher = launchers / f"{agent}-acp"
            launcher.write_text(_LAUNCHER.format(command=shlex.join(command)))
            launcher.chmod(0o755)
        (home / ".gitconfig").write_text(_GITCONFIG)
        if self._user_id is not None:
            folder.chmod(0o711)
            isolation.give_away(home, self._user_id)

    async def _spawn(self, sandbox_id: str, folder: Path, known: _Known) -> asyncio.subprocess.Process:
        home = folder / "home"
        prefix = isolation.bubblewrap(home, self._mounts) if known.isolation == isolation.BUBBLEWRAP else []
        limits = ["prlimit", *_LIMITS] if shutil.which("prlimit") else []
        user = [] if self._user_id is None else isolation.as_user(self._user_id)
        environment = {
            "HOME": str(home),
            "PATH": os.environ.get("PATH", os.defpath),
            "LANG": "C.UTF-8",
            "TERM": "dumb",
            "GIT_TERMINAL_PROMPT": "0",
            "SANDBOX_AGENT_ACP_REQUEST_TIMEOUT_MS": _ACP_TIMEOUT_MS,
            SANDBOX_MARK: sandbox_id,
        }
        log_file = folder / "server.log"
        log_file.touch(mode=0o600)
        with log_file.open("ab") as output:
            return await asyncio.create_subprocess_exec(
                *isolation.OPEN_FILES,
                *limits,
                *user,
                *prefix,
                *(str(self._program), "server", "--no-telemetry"),
                *("--token", known.token, "--host", "127.0.0.1", "--port", str(known.port)),
                cwd=home,
                env=environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    async def _stop_processes(self, sandbox_id: str) -> None:
        if not await asyncio.to_thread(self.processes.end, sandbox_id):
            raise ProviderError("its processes do not end")


def _write_private(path: Path, content: str) -> None:
    path.touch(mode=0o600)
    path.write_text(content)
