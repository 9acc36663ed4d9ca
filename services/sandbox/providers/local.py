"""The `local` provider: a sandbox-agent server per sandbox on this host, inside bubblewrap and as a user of its own.

The server outlives the service, so that a restart loses no agent. Its processes carry the sandbox's id in their
environment: that is how they are found again, and how none is left behind.
"""

import asyncio
import json
import os
import secrets
import shutil
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.runtime.config import Config
from services.runtime.logging import get_logger
from services.sandbox.agent_server import Unreachable
from services.sandbox.providers import isolation, launcher, ports
from services.sandbox.providers.base import NOBODY, Condition, Machine, Overuse, Owner, Probe, ProviderError
from services.sandbox.providers.furniture import environment, furniture
from services.sandbox.providers.processes import SANDBOX_MARK, SandboxProcesses, is_root
from services.sandbox.providers.sharing import share
from services.sandbox.providers.users import ACCOUNTS, User, Users

if TYPE_CHECKING:
    from services.sandbox.http import Http

log = get_logger(__name__)

_START_SECONDS = 20.0
_START_ATTEMPTS = 5  # another process may take the port between our look and the server's start
_PROBE_SECONDS = 2.0
_LIMITS = {"RLIMIT_CORE": 0, "RLIMIT_NOFILE": 8192, "RLIMIT_NPROC": 8192}
_UMASK, _SHARED_UMASK = 0o022, 0o002  # what sandboxes push to a folder they share must be open to their group


class LocalProviderConfig(Config, frozen=True):
    """Configuration of the `local` provider."""

    sandbox_agent: Path
    """The sandbox-agent program."""

    agents: Mapping[str, Sequence[str]] = {}
    """Command line of agents by name, in the place of what sandbox-agent would install."""

    isolation: str = "auto"
    """"auto" and "bubblewrap" need bubblewrap; "none" does without, deliberately."""

    user_ids: tuple[int, int] = (40000, 59999)
    """First and last of the users, unused otherwise, that sandboxes run as where the backend is root's: each has one
    of its own. Their group is the first one's. 0, 0 has them run as root, too: for agents that are trusted like the
    backend."""

    hidden_paths: Sequence[Path] = ()
    """Folders that sandboxes must not see, such as the backend's data and the user's home."""

    readable_paths: Sequence[Path] = ()
    """Folders that sandboxes may read though they lie inside hidden ones. What is hidden inside these stays hidden."""

    writable_paths: Sequence[Path] = ()
    """Folders that sandboxes may change, such as bare repositories on this host. Where the backend is root's they are
    opened to the sandboxes' group, with what is in them."""

    def __post_init__(self) -> None:
        first, last = self.user_ids
        if not (0 < first <= last or first == last == 0):
            raise ValueError("user_ids: the first user comes before the last, and neither is root, or both are")


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
        self._users = Users(self._root, *config.user_ids) if is_root() and config.user_ids[0] else None
        self.processes = SandboxProcesses(self._root, str(self._program), self._users)

    async def start(self) -> None:
        """Find out how sandboxes are isolated, and close the backend's files to them."""
        how = isolation.find_isolation(self._config.isolation)
        await asyncio.to_thread(self._root.mkdir, parents=True, exist_ok=True)
        user = None
        if self._users is not None:
            user = self._users.sample()
            if how == isolation.NONE:
                await asyncio.to_thread(isolation.close_to_others, self._root, self._mounts)
        elif how == isolation.NONE:
            isolation.warn_of_trust()
        command = self._launcher(self._root, how, user)
        plan = launcher.plan(**_ground(user), home="/", files={}, command=["true", launcher.HIDDEN], token="")
        await isolation.require(command, plan, how)
        self._isolation = how

    async def create(self, sandbox_id: str, owner: Owner = NOBODY) -> Machine:
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
        user = await asyncio.to_thread(self._furnish, folder)
        if user is not None:
            await asyncio.to_thread(share, self._mounts.writable, user.group_id)
        ended: int | None = None
        for _ in range(_START_ATTEMPTS):
            known = _Known(ports.free_port(), secrets.token_hex(24), self._isolation)
            _write_private(folder / "server.json", json.dumps({name: getattr(known, name) for name in known.__slots__}))
            server = await self._spawn(sandbox_id, folder, known, user)
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

    async def resume(self, sandbox_id: str, owner: Owner = NOBODY) -> Machine:
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

    async def watch(self, ended: Callable[[Overuse], Awaitable[None]]) -> None:
        """Bound nothing, and so end nothing."""
        await asyncio.Event().wait()

    async def close(self) -> None:
        """Hold nothing."""

    def _known(self, sandbox_id: str) -> _Known | None:
        try:
            return _Known(**json.loads((self._root / sandbox_id / "server.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None

    async def _ask(self, sandbox_id: str, known: _Known) -> Machine | None:
        url = f"http://127.0.0.1:{known.port}"
        headers = {"Authorization": f"Bearer {known.token}"}
        vouched = partial(self.processes.listens, sandbox_id, known.port)
        try:
            answer = await self._http().send("GET", f"{url}/v1/acp", _PROBE_SECONDS, vouched, headers=headers)
        except Unreachable:
            return None
        if not answer.is_success:
            return None
        home = str(self._root / sandbox_id / "home")
        return Machine(url, known.token, home, known.isolation, launcher.interpreter(), vouched)

    async def _answering(self, sandbox_id: str, known: _Known, server: asyncio.subprocess.Process) -> Machine | None:
        """Wait until the server answers; none if it ends before, or takes too long."""
        deadline = asyncio.get_running_loop().time() + _START_SECONDS
        while server.returncode is None and asyncio.get_running_loop().time() < deadline:
            machine = await self._ask(sandbox_id, known)
            if machine is not None:
                return machine
            await asyncio.sleep(0.05)
        return None

    def _furnish(self, folder: Path) -> User | None:
        """Make a sandbox's folder, and return who it will run as."""
        home = folder / "home"
        folder.mkdir(parents=True, exist_ok=True)
        if self._users is None:
            home.mkdir(exist_ok=True)
            return None
        folder.chmod(0o711)
        user = self._users.settle(home)
        for name, accounts in zip(ACCOUNTS, user.accounts(home), strict=True):
            (folder / name).write_text(accounts)
            (folder / name).chmod(0o644)
        return user

    def _launcher(self, home: Path, how: str, user: User | None) -> list[str]:
        """Return the command that reads a plan and becomes a sandbox's server."""
        if how == isolation.NONE:
            return launcher.arguments()
        return [*isolation.bubblewrap(home, self._mounts, user), *launcher.arguments()]

    async def _spawn(
        self, sandbox_id: str, folder: Path, known: _Known, user: User | None
    ) -> asyncio.subprocess.Process:
        home = folder / "home"
        variables = {**environment(home, os.environ.get("PATH", os.defpath)), SANDBOX_MARK: sandbox_id}
        if user is not None:
            variables |= {"USER": "sandbox", "LOGNAME": "sandbox"}
        command = [
            *(str(self._program), "server", "--no-telemetry"),
            *("--token", launcher.HIDDEN, "--host", "127.0.0.1", "--port", str(known.port)),
        ]
        files = furniture(home, self._config.agents)
        plan = launcher.plan(**_ground(user), home=str(home), files=files, command=command, token=known.token)
        log_file = folder / "server.log"
        log_file.touch(mode=0o600)
        with log_file.open("ab") as output:
            server = await asyncio.create_subprocess_exec(
                *self._launcher(home, known.isolation, user),
                cwd=self._root,
                env=variables,
                stdin=asyncio.subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        await _hand(server, plan)
        return server

    async def _stop_processes(self, sandbox_id: str) -> None:
        if not await asyncio.to_thread(self.processes.end, sandbox_id):
            raise ProviderError("its processes do not end")


def _ground(user: User | None) -> dict[str, Any]:
    """Return the part of a launcher's plan that is the same for all that a user starts."""
    return {
        "limits": _LIMITS,
        "umask": _UMASK if user is None else _SHARED_UMASK,
        "user": None if user is None else (user.user_id, user.group_id),
    }


async def _hand(server: asyncio.subprocess.Process, plan: bytes) -> None:
    """Write a launcher's plan to it. One that has ended already is noticed by its code."""
    assert server.stdin is not None
    with suppress(ConnectionError):
        server.stdin.write(plan)
        await server.stdin.drain()
        server.stdin.close()
        await server.stdin.wait_closed()


def _write_private(path: Path, content: str) -> None:
    path.touch(mode=0o600)
    path.write_text(content)
