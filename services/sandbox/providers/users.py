"""Users of sandboxes: where the backend runs as root, each sandbox is given one of its own, from a range.

Whose a sandbox is stands nowhere but in its home's owner: a user is taken while there is a folder, or a process, of it.
"""

import os
import random
import subprocess
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from services.sandbox.providers.base import ProviderError

ACCOUNTS = ("passwd", "group")
"""Files beside a home that say in the sandbox who its user is."""


@dataclass(frozen=True, slots=True)
class User:
    """Who a sandbox runs as. The group is that of all sandboxes, so that they can share folders."""

    user_id: int
    group_id: int

    def accounts(self, home: Path) -> tuple[str, str]:
        """Return what the files of `ACCOUNTS` say."""
        users = f"root:x:0:0::/:/bin/sh\nsandbox:x:{self.user_id}:{self.group_id}:Sandbox:{home}:/bin/sh\n"
        return users, f"root:x:0:\nsandboxes:x:{self.group_id}:\n"


@dataclass(frozen=True, slots=True)
class Users:
    """The users of the sandboxes whose homes are below one folder."""

    root: Path
    first: int
    last: int
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def sample(self) -> User:
        """Return a user of the range, whether or not it is taken."""
        return User(self.last, self.first)

    def settle(self, home: Path) -> User:
        """Return the user of a home, made if need be; one that had none gets one. Raise ProviderError if all are taken.

        Nothing may run in the sandbox: its files are given to the user.
        """
        with self._lock:
            home.mkdir(mode=0o700, exist_ok=True)
            user_id = home.stat().st_uid
            if user_id not in self._range():
                user_id = self._free()
                _give_away(home, user_id, self.first)
            home.chmod(0o700)
            return User(user_id, self.first)

    def has(self, sandbox_id: str, user_id: int) -> bool:
        """Say whether a sandbox runs as this user."""
        try:
            return (self.root / sandbox_id / "home").stat().st_uid == user_id
        except FileNotFoundError:
            return False

    def end_all(self, sandbox_id: str) -> None:
        """End all processes of a sandbox's user at one moment: what forks and ends for ever escapes a list."""
        with suppress(FileNotFoundError):
            user_id = (self.root / sandbox_id / "home").stat().st_uid
            if user_id in self._range():
                all_of_it = ["/bin/sh", "-c", "kill -s KILL -- -1"]
                subprocess.run(all_of_it, user=user_id, group=self.first, extra_groups=[], check=False)

    def owners(self) -> dict[int, str]:
        """Return the sandboxes by the ids of their users."""
        found: dict[int, str] = {}
        for home in self.root.glob("*/home"):
            try:
                user_id = home.stat().st_uid
            except FileNotFoundError:
                continue
            if user_id in self._range():
                found[user_id] = home.parent.name
        return found

    def _range(self) -> range:
        return range(self.first, self.last + 1)

    def _free(self) -> int:
        free = set(self._range()) - self.owners().keys() - _running()
        if not free:
            raise ProviderError(f"every user from {self.first} to {self.last} has a sandbox: widen `user_ids`")
        return random.choice(sorted(free))  # what one left elsewhere is hardly ever another's soon


def _give_away(home: Path, user_id: int, group_id: int) -> None:
    for folder, folders, files in os.walk(home):
        for name in (*folders, *files):
            os.chown(Path(folder, name), user_id, group_id, follow_symlinks=False)
    os.chown(home, user_id, group_id)


def _running() -> set[int]:
    """Return the users of all processes. What has ended and is not yet noticed by its parent counts no more."""
    given = [process.info for process in psutil.process_iter(["uids", "status"])]
    return {info["uids"].real for info in given if info["uids"] and info["status"] != psutil.STATUS_ZOMBIE}
