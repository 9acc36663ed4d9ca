"""How local sandboxes are kept apart from the host and from each other: by bubblewrap, by users, or by both.

Inside bubblewrap a sandbox sees the system's programs, what it is shown, and its own home; the rest of the host is not
there. A backend that runs as root gives each sandbox a user of its own besides (`users.py`), with bubblewrap or without
it; without it the backend closes its files to all others. One that does not run as root and does without bubblewrap
can keep nothing apart, and says so aloud.
"""

import asyncio
import os
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from services.runtime.logging import get_logger
from services.sandbox.providers.base import ProviderError
from services.sandbox.providers.sharing import repositories
from services.sandbox.providers.users import ACCOUNTS, User

log = get_logger(__name__)

BUBBLEWRAP = "bubblewrap"
NONE = "none"

_HOW = (
    'install the Debian package bubblewrap, or choose isolation = "none" deliberately: '
    "agents can then read and change whatever their user can"
)
_EMPTY = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 - each sandbox gets empty ones of its own, open to its user
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_SETTINGS = (
    *("alternatives", "ca-certificates", "ca-certificates.conf", "crypto-policies", "pki", "ssl"),
    *("gai.conf", "host.conf", "hosts", "nsswitch.conf", "protocols", "resolv.conf", "services"),
    *("bash.bashrc", "group", "gitconfig", "inputrc", "localtime", "mime.types", "passwd", "profile", "terminfo"),
    *("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "timezone"),
)
"""What programs need of /etc. Nothing in it is secret where the user may not read it anyway."""

_NAMESPACES = ("--unshare-ipc", "--unshare-pid", "--unshare-uts", "--unshare-cgroup-try")


@dataclass(frozen=True, slots=True)
class Mounts:
    """What sandboxes see of the host."""

    hidden: tuple[Path, ...]
    readable: tuple[Path, ...]
    writable: tuple[Path, ...]


def find_isolation(wanted: str) -> str:
    """Return how sandboxes will be isolated. Raise ProviderError if bubblewrap is needed and not there."""
    if wanted == NONE:
        return NONE
    if not shutil.which("bwrap"):
        raise ProviderError(f"sandboxes need bubblewrap, which is not installed: {_HOW}")
    return BUBBLEWRAP


async def require(command: list[str], plan: bytes, isolation: str) -> None:
    """Try to start something as a sandbox's server will be started. Raise ProviderError if that does not work."""
    pipe = asyncio.subprocess.PIPE
    environment = {"HOME": "/", "PATH": os.environ.get("PATH", os.defpath)}
    trial = await asyncio.create_subprocess_exec(
        *command, env=environment, stdin=pipe, stdout=asyncio.subprocess.DEVNULL, stderr=pipe
    )
    _, errors = await trial.communicate(plan)
    if trial.returncode:
        words = errors.decode(errors="replace").strip()
        if isolation == BUBBLEWRAP:
            raise ProviderError(f"bubblewrap does not work here ({words}): {_HOW}")
        raise ProviderError(f"sandboxes cannot be started here ({words})")


def bubblewrap(home: Path, mounts: Mounts, user: User | None) -> list[str]:
    """Return the command that a sandbox's launcher is put behind.

    Root makes no user namespace: the launcher needs the power to become another user of the host, and no other.
    """
    command = ["bwrap", "--unshare-all", "--share-net"]
    if user is not None:
        command = ["bwrap", *_NAMESPACES, "--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    command += ["--dev", "/dev", "--proc", "/proc", "--dir", "/etc"]
    for path in (*_SYSTEM, *(f"/etc/{name}" for name in _SETTINGS)):
        command += ["--ro-bind-try", path, path]
    for name in ACCOUNTS:
        command += ["--ro-bind-try", str(home.parent / name), f"/etc/{name}"]
    ordered = [
        *((path, _hide(path)) for path in mounts.hidden),
        *((Path(path), ["--perms", "1777", "--tmpfs", path]) for path in _EMPTY),
        *((path, ["--ro-bind", str(path), str(path)]) for path in (Path(sys.base_prefix), *mounts.readable)),
        *((path, ["--bind", str(path), str(path)]) for path in (*mounts.writable, home)),
        *_repositories(mounts.writable),
    ]
    for path, mount in sorted(ordered, key=lambda one: len(one[0].parts)):  # what lies deeper decides
        command += ["--dir", str(path.parent), *mount]  # or the way to what is closed would be closed, too
    return [*command, "--chdir", "/"]


def _repositories(folders: Iterable[Path]) -> Iterator[tuple[Path, list[str]]]:
    """Close what git runs for everybody who uses a repository; a push needs nothing of it."""
    for folder in folders:
        for repository, pushed in repositories(folder):
            yield repository, ["--ro-bind", str(repository), str(repository)]
            yield from ((path, ["--bind", str(path), str(path)]) for path in pushed)


def _hide(path: Path) -> list[str]:
    """Return the mount that lies over a folder, or over a file."""
    return ["--ro-bind", os.devnull, str(path)] if path.is_file() else ["--tmpfs", str(path)]


def warn_of_trust() -> None:
    """Say that sandboxes are not kept apart at all."""
    log.warning(
        "sandboxes run without isolation and as this user: agents can read the backend's keys and data; "
        "run it with bubblewrap, or as root with other `user_ids`, to prevent that"
    )


def close_to_others(root: Path, mounts: Mounts) -> None:
    """Close the backend's files to all but root, and leave open the sandboxes' homes and what they may see.

    What is made later is closed by the process's umask. Raise ProviderError if the way is closed further up, where
    the folders are not ours.
    """
    os.umask(0o077)
    root.mkdir(parents=True, exist_ok=True)
    shown = (root, *mounts.readable, *mounts.writable)
    for folder in mounts.hidden:
        if folder.is_file():
            folder.chmod(folder.stat().st_mode & 0o700)
        elif folder == root or folder in root.parents:
            _close(folder, shown)
    root.chmod(0o711)
    for parent in root.parents:
        if not parent.stat().st_mode & stat.S_IXOTH:
            raise ProviderError(
                f"sandboxes run as other users, who may not pass {parent}: keep the data elsewhere, or "
                f"allow it with `chmod o+x {parent}`"
            )


def _close(folder: Path, shown: tuple[Path, ...]) -> None:
    folder.chmod(0o711)
    for inside in folder.iterdir():
        if inside.is_symlink() or inside in shown:
            continue
        if any(inside in path.parents for path in shown):
            _close(inside, shown)
        else:
            inside.chmod(inside.stat().st_mode & 0o700)
