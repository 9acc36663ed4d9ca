"""Finds and ends the processes of local sandboxes. Blocking: it is run in threads.

All processes of a sandbox carry its id in their environment, and where it has a user of its own, they are that user's
whatever they do to their environment. An agent is what the sandbox-agent server has started
itself and is no command. Its launcher marks what it starts in turn, so that a process is found even if its parents
have ended.
"""

import os
import signal
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from services.sandbox.providers import ports
from services.sandbox.providers.users import Users

SANDBOX_MARK = "BRANCHLINE_SANDBOX_ID"
AGENT_MARK = "BRANCHLINE_AGENT"

_STOP_SECONDS = (0.3, 2.0, 2.0)
_COMMAND = "timeout"
"""Commands are run under this program (`commands.py`)."""


@dataclass(frozen=True, slots=True)
class AgentName:
    """The name of an agent's process: its id here and in the sandbox, and when it began."""

    pid: int
    inner_pid: str
    began: float

    @classmethod
    def of(cls, process: psutil.Process) -> "AgentName":
        """Name a process."""
        return cls(process.pid, _inner_pid(process.pid), process.create_time())

    @classmethod
    def parse(cls, text: str) -> "AgentName":
        """Read what `str` wrote."""
        pid, inner, began = text.split("/")
        return cls(int(pid), inner, float(began))

    def __str__(self) -> str:
        return f"{self.pid}/{self.inner_pid}/{self.began:.2f}"

    def process(self) -> psutil.Process | None:
        """Return the process if it is there still."""
        try:
            found = psutil.Process(self.pid)
            same = abs(found.create_time() - self.began) < 0.05 and found.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return None
        return found if same else None


@dataclass(frozen=True, slots=True)
class SandboxProcesses:
    """The processes of the sandboxes whose homes are below one folder."""

    root: Path
    server: str
    """The sandbox-agent program."""

    users: Users | None = None
    """The sandboxes' users, if they have some of their own."""

    def all(self) -> list[tuple[str, psutil.Process]]:
        """Return every process with the id of its sandbox."""
        found: list[tuple[str, psutil.Process]] = []
        owners = self.users.owners() if self.users is not None else {}
        for process in psutil.process_iter():
            name = owners.get(_user_id(process)) or self._environment(process).get(SANDBOX_MARK)
            if name:
                found.append((name, process))
        return found

    def of(self, sandbox_id: str) -> list[psutil.Process]:
        """Return the processes of one sandbox."""
        return [process for name, process in self.all() if name == sandbox_id]

    def has_server(self, sandbox_id: str) -> bool:
        """Say whether the server of a sandbox is there, whether or not it answers."""
        return any(_command(process)[:1] == [self.server] for process in _alive(self.of(sandbox_id)))

    def listens(self, sandbox_id: str, port: int) -> bool:
        """Say whether it is the sandbox that listens at a port of 127.0.0.1, and not another that took the port."""
        there = ports.listener(port)
        if there is None:
            return False
        if self.users is not None:
            return self.users.has(sandbox_id, there.user_id)
        return any(_holds(process, there.inode) for process in self.of(sandbox_id))

    def agents(self, sandbox_id: str) -> set[str]:
        """Return the names of the processes that the server started itself, other than commands."""
        names: set[str] = set()
        for server in self.of(sandbox_id):
            try:
                if _command(server)[:1] != [self.server]:
                    continue
                for child in server.children():
                    if self._is_agent(child):
                        names.add(str(AgentName.of(child)))
            except (psutil.Error, OSError):
                continue
        return names

    def end(self, sandbox_id: str) -> bool:
        """End all processes of a sandbox; say whether none is left."""
        users = self.users
        return _end(lambda: self.of(sandbox_id), lambda: users.end_all(sandbox_id) if users is not None else None)

    def end_agent(self, sandbox_id: str, process: str) -> bool:
        """End an agent with all that it started; say whether nothing of it is left."""
        name = AgentName.parse(process)
        return _end(lambda: self._tree(sandbox_id, name))

    def _tree(self, sandbox_id: str, name: AgentName) -> list[psutil.Process]:
        found: dict[int, psutil.Process] = {}
        root = name.process()
        if root is not None:
            found[root.pid] = root
            with suppress(psutil.Error):
                found |= {child.pid: child for child in root.children(recursive=True)}
        for process in self.of(sandbox_id):
            try:
                marked = self._environment(process).get(AGENT_MARK) == name.inner_pid
                if marked and process.create_time() >= name.began - 0.05:
                    found[process.pid] = process
            except psutil.Error:
                continue
        return list(found.values())

    def _is_agent(self, child: psutil.Process) -> bool:
        command = _command(child)
        if not command or child.status() == psutil.STATUS_ZOMBIE:
            return False
        return command[0] != self.server and Path(command[0]).name != _COMMAND

    def _environment(self, process: psutil.Process) -> dict[str, str]:
        try:
            environment = process.environ()
        except (psutil.Error, OSError):
            return {}
        name = environment.get(SANDBOX_MARK)
        if not name or environment.get("HOME") != str(self.root / name / "home"):
            return {}
        return environment if _sees(process, environment["HOME"]) else {}


def _end(find: Callable[[], Sequence[psutil.Process]], sweep: Callable[[], None] = lambda: None) -> bool:
    for how, patience in zip((signal.SIGTERM, signal.SIGKILL, signal.SIGKILL), _STOP_SECONDS, strict=True):
        if how == signal.SIGKILL:
            sweep()
        found = _alive(find())
        if not found and how == signal.SIGKILL:  # before it, one that forks and ends might only have been missed
            return True
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(how)
        psutil.wait_procs(found, timeout=patience)
    return not _alive(find())


def _sees(process: psutil.Process, home: str) -> bool:
    """Say whether a folder is to a process what it is to us: it can say that it is another sandbox's, not see it."""
    try:
        return Path(f"/proc/{process.pid}/root{home}").samefile(home)
    except OSError:
        return False


def _holds(process: psutil.Process, inode: int) -> bool:
    try:
        files = Path(f"/proc/{process.pid}/fd").iterdir()
        return any(os.readlink(file) == f"socket:[{inode}]" for file in files)  # noqa: PTH115 - it is no path
    except OSError:
        return False


def _user_id(process: psutil.Process) -> int:
    try:
        return process.uids().real
    except psutil.Error:
        return -1


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.Error, OSError):
        return []


def _alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    alive: list[psutil.Process] = []
    for process in processes:
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
        except psutil.Error:
            continue
    return alive


def _inner_pid(pid: int) -> str:
    """Return a process's id in its own namespace, as it knows it itself (proc(5), NSpid)."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("NSpid:"):
                return line.split()[-1]
    except OSError:
        pass
    return str(pid)


def is_root() -> bool:
    """Say whether this process is the superuser's."""
    return os.geteuid() == 0
