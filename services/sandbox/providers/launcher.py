"""Becomes the server of a sandbox. A program of its own, run by `python -c`; the provider imports its names alone.

It reads from standard input, or from a variable where there is none, what it shall do: drop the backend's user, furnish
the home, and become the server. All that a hostile home could turn against the backend, such as a link in the place of
a file, happens as the sandbox's user and within its walls.

sandbox-agent 0.4.2 takes its token from the command line alone, which everybody on a host may read. So the command
line holds a word in its place, and before the server's first instruction the word's pointer is led to the token, which
lies where only the same user can read (proc(5), `environ`). The traced program is killed if that fails.
"""

import ctypes
import json
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

HIDDEN = "(hidden)"
"""Word on the command line in the place of the token."""

PLAN = "BRANCHLINE_PLAN"
"""Variable that holds the plan where standard input does not."""

_TOKEN = "BRANCHLINE_SERVER_TOKEN"  # noqa: S105 - the name of a variable
_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS, _PR_SET_PTRACER = 4, 38, 0x59616D61  # prctl(2)
_CONT, _DETACH, _SEIZE = 7, 17, 0x4206  # ptrace(2)
_TRACE_EXEC, _EXIT_KILL, _EVENT_EXEC, _WALL = 0x10, 0x100000, 4, 0x40000000
_GO = b"go"

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def main() -> None:
    """Do what standard input says."""
    given = os.environ.pop(PLAN, "")
    plan = json.loads(given) if given else json.load(sys.stdin)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.umask(plan["umask"])
    for name, most in plan["limits"].items():
        _limit(getattr(resource, name), most)
    if plan["user"] is not None:
        _become(*plan["user"])
    os.chdir(plan["home"])
    for path, (content, mode) in plan["files"].items():
        _put(Path(path), content, mode)
    _execute(plan["command"], dict(os.environ), plan["token"])


def _limit(which: int, most: int) -> None:
    hard = resource.getrlimit(which)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(which, (most, most))


def _become(user_id: int, group_id: int) -> None:
    os.setgroups([])
    os.setresgid(group_id, group_id, group_id)
    os.setresuid(user_id, user_id, user_id)
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)  # sudo and its like make it nobody else
    _libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)  # or the new user could not trace it


def _put(path: Path, content: str, mode: int) -> None:
    """Write a file anew, whatever lies in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.write_text(content)
    fresh.chmod(mode)
    fresh.replace(path)


def _execute(command: list[str], environment: Mapping[str, str], token: str) -> NoReturn:
    """Become a program that finds the token where its command line says `HIDDEN`."""
    ours, theirs = socket.socketpair()
    server = os.getpid()
    child = os.fork()
    if child == 0:
        if os.fork() == 0:  # a grandchild, so that the server gets no child that it does not know
            _trace(server, theirs)
        os._exit(0)
    os.waitpid(child, 0)
    _libc.prctl(_PR_SET_PTRACER, int(ours.recv(64)), 0, 0, 0)
    ours.sendall(_GO)
    answer = ours.recv(1024)
    if answer != _GO:
        sys.exit(f"the server's token cannot be hidden here: {answer.decode()}")
    os.execvpe(command[0], command, {**environment, _TOKEN: token})  # noqa: S606 - no shell is wanted


def _trace(server: int, launcher: socket.socket) -> NoReturn:
    try:
        launcher.sendall(str(os.getpid()).encode())
        launcher.recv(64)
        _ptrace(_SEIZE, server, _TRACE_EXEC | _EXIT_KILL)
    except OSError as error:
        launcher.sendall(str(error).encode())
        os._exit(1)
    launcher.sendall(_GO)
    launcher.close()
    try:
        if _stops_at_exec(server):
            _hide_token(server)
            _ptrace(_DETACH, server, 0)
    finally:
        os._exit(0)


def _stops_at_exec(server: int) -> bool:
    while True:
        _, status = os.waitpid(server, _WALL)
        if not os.WIFSTOPPED(status):
            return False
        if status >> 8 == signal.SIGTRAP | _EVENT_EXEC << 8:
            return True
        _ptrace(_CONT, server, os.WSTOPSIG(status))


def _hide_token(server: int) -> None:
    """Lead the argument to the token, and the environment's entry elsewhere, so that no child inherits it."""
    line = next(line for line in Path(f"/proc/{server}/maps").read_text().splitlines() if line.endswith("[stack]"))
    first, last = (int(word, 16) for word in line.split()[0].split("-"))
    with Path(f"/proc/{server}/mem").open("r+b", buffering=0) as memory:
        memory.seek(first)
        stack = memory.read(last - first)

        def address(text: str) -> int:
            return first + stack.index(b"\0" + text.encode()) + 1

        def lead(pointer: int, to: int) -> None:
            memory.seek(first + stack.index(struct.pack("P", pointer)))
            memory.write(struct.pack("P", to))

        token, entry = f"{_TOKEN}=", address(f"{_TOKEN}=")
        lead(address(f"{HIDDEN}\0"), entry + len(token))
        lead(entry, address("HOME="))


def _ptrace(request: int, server: int, data: int) -> None:
    if _libc.ptrace(request, server, None, data) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"ptrace: {os.strerror(code)}")


def arguments() -> list[str]:
    """Return the command that runs this program. Besides the interpreter it needs `sys.base_prefix`."""
    return [interpreter(), "-I", "-S", "-c", Path(__file__).read_text()]


def interpreter() -> str:
    """Return the interpreter that sandboxes have."""
    return os.path.realpath(sys.executable)


def plan(**given: Any) -> bytes:
    """Return what the program reads."""
    return json.dumps(given).encode()


if __name__ == "__main__":
    main()
