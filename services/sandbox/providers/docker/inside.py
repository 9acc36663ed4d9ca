"""Finds and ends agents inside a sandbox. A program of its own, run by `python -c` in the container.

`agents` prints the names of the processes that the sandbox-agent server has started other than commands; `end NAME`
ends one with all its descendants and those that carry its mark, and prints whether none of them is left. A name is the
process's id and when it began, which is never the same again in one container.
"""

import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

_COMMAND = "timeout"
_SERVER = "sandbox-agent"
_WAITS = ((signal.SIGTERM, 0.3), (signal.SIGKILL, 2.0), (signal.SIGKILL, 2.0))


class Process:
    """A process that was there a moment ago."""

    def __init__(self, pid: int) -> None:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        self.pid, self.parent, self.began = pid, int(words[1]), int(words[19])
        self.alive = words[0] not in "ZX"
        self.command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]

    @property
    def name(self) -> str:
        """What it is called outside."""
        return f"{self.pid}/{self.began}"

    @property
    def program(self) -> str:
        """The last part of its program's path."""
        return os.path.basename(self.command[0]) if self.command else ""  # noqa: PTH119 - it need be no path

    def marked(self, mark: str) -> bool:
        """Say whether it says that it was started by an agent."""
        try:
            return f"BRANCHLINE_AGENT={mark}".encode() in Path(f"/proc/{self.pid}/environ").read_bytes().split(b"\0")
        except OSError:
            return False


def main() -> None:
    """Do what the arguments say."""
    if sys.argv[1] == "agents":
        print(json.dumps([agent.name for agent in _agents()]))  # noqa: T201 - that is how it answers
    else:
        print(json.dumps(_end(sys.argv[2])))  # noqa: T201


def _all() -> dict[int, Process]:
    found: dict[int, Process] = {}
    for entry in os.listdir("/proc"):  # noqa: PTH208 - names alone are wanted
        if entry.isdigit() and int(entry) != os.getpid():
            with suppress(OSError, IndexError, ValueError):
                process = Process(int(entry))
                if process.alive:
                    found[process.pid] = process
    return found


def _agents() -> list[Process]:
    there = _all()
    servers = {one.pid for one in there.values() if one.program == _SERVER and one.parent == 1}
    children = [one for one in there.values() if one.parent in servers and one.command]
    return [one for one in children if one.program not in (_COMMAND, _SERVER)]


def _tree(name: str) -> list[Process]:
    there = _all()
    pid, began = map(int, name.split("/"))
    found = {pid for one in there.values() if (one.pid, one.began) == (pid, began)}
    found |= {one.pid for one in there.values() if one.began >= began and one.marked(str(pid))}
    while True:
        more = {one.pid for one in there.values() if one.parent in found} - found
        if not more:
            return [there[one] for one in found]
        found |= more


def _end(name: str) -> bool:
    for how, seconds in _WAITS:
        deadline = time.monotonic() + seconds
        for process in _tree(name):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(process.pid, how)
        while _tree(name) and time.monotonic() < deadline:
            time.sleep(0.02)
    return not _tree(name)


if __name__ == "__main__":
    main()
