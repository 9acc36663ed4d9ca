"""How local sandboxes are kept apart from the host: inside bubblewrap, or, if that is chosen, only by their user.

The backend's keys and data are never readable for the user that sandboxes run as. Bubblewrap hides them. Without it a
backend that runs as root gives sandboxes another user and closes its files to all others; one that does not run as
root cannot, and says so aloud.
"""

import asyncio
import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

from services.runtime.logging import get_logger
from services.sandbox.providers.base import ProviderError
from services.sandbox.providers.processes import is_root

log = get_logger(__name__)

BUBBLEWRAP = "bubblewrap"
NONE = "none"

_TMP = "/tmp"  # noqa: S108 - each sandbox gets an empty one of its own
_HOW = (
    'install the Debian package bubblewrap, or choose isolation = "none" deliberately: '
    "agents can then read and change whatever their user can"
)

OPEN_FILES = ("sh", "-c", 'umask 022 && exec "$@"', "sh")
"""Put before a command, so that others may read what it makes. uvloop cannot set the umask of what it starts."""


@dataclass(frozen=True, slots=True)
class Mounts:
    """What sandboxes see of the host."""

    hidden: tuple[Path, ...]
    readable: tuple[Path, ...]
    writable: tuple[Path, ...]


async def find_isolation(wanted: str, root: Path, mounts: Mounts) -> str:
    """Return how sandboxes will be isolated. Raise ProviderError if bubblewrap is needed and does not work."""
    if wanted == NONE:
        return NONE
    if not shutil.which("bwrap"):
        raise ProviderError(f"sandboxes need bubblewrap, which is not installed: {_HOW}")
    await asyncio.to_thread(root.mkdir, parents=True, exist_ok=True)
    trial = await asyncio.create_subprocess_exec(
        *bubblewrap(root, mounts), "true", stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    _, errors = await trial.communicate()
    if trial.returncode:
        raise ProviderError(f"bubblewrap does not work here ({errors.decode(errors='replace').strip()}): {_HOW}")
    return BUBBLEWRAP


def bubblewrap(home: Path, mounts: Mounts) -> list[str]:
    """Return the command that a sandbox's server is put behind."""
    command = ["bwrap", "--unshare-all", "--share-net", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc"]
    ordered = [
        *((path, _hide(path)) for path in (Path(_TMP), *mounts.hidden)),
        *((path, ["--ro-bind", str(path), str(path)]) for path in mounts.readable),
        *((path, ["--bind", str(path), str(path)]) for path in (*mounts.writable, home)),
    ]
    for _, mount in sorted(ordered, key=lambda one: len(one[0].parts)):  # what lies deeper decides
        command += mount
    return [*command, "--chdir", str(home)]


def _hide(path: Path) -> list[str]:
    """Return the mount that lies over a folder, or over a file."""
    return ["--ro-bind", os.devnull, str(path)] if path.is_file() else ["--tmpfs", str(path)]


def user_of_sandboxes(isolation: str, user_id: int) -> int | None:
    """Return the user that sandboxes run as, or None if it is the backend's own."""
    if isolation != NONE:
        return None
    if is_root() and user_id != 0:
        return user_id
    log.warning(
        "sandboxes run without isolation and as this user: agents can read the backend's keys and data; "
        "run it with bubblewrap, or as root with another `user_id`, to prevent that"
    )
    return None


def as_user(user_id: int) -> list[str]:
    """Return what is put before a command so that it runs as another user. uvloop cannot change it."""
    return ["setpriv", f"--reuid={user_id}", f"--regid={user_id}", "--clear-groups"]


def close_to_others(root: Path, mounts: Mounts, user_id: int) -> None:
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
                f"sandboxes run as user {user_id}, who may not pass {parent}: keep the data elsewhere, or "
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


def give_away(home: Path, user_id: int) -> None:
    """Make a home the user's, whole."""
    if home.stat().st_uid == user_id:
        for path in _furniture(home):
            os.chown(path, user_id, user_id, follow_symlinks=False)
        return
    for folder, folders, files in os.walk(home):
        for name in (*folders, *files):
            os.chown(Path(folder, name), user_id, user_id, follow_symlinks=False)
    os.chown(home, user_id, user_id)
    home.chmod(0o700)


def _furniture(home: Path) -> list[Path]:
    launchers = home / ".local/share/sandbox-agent/bin/agent_processes"
    return [home / ".gitconfig", *launchers.iterdir()]
