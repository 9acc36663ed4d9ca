"""Folders that sandboxes may change are opened to their group by POSIX access control lists (see acl(5)).

What lies in such a folder is opened once; what is made in it later, by whomever, is opened by the folder's default.
Owners and modes stay as they are.

Of a git repository only what a push changes is opened: its hooks and configuration say what git runs for everybody who
uses it. (A branch that is packed is thus deleted by the repository's owner alone.)
"""

import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

from services.runtime.logging import get_logger

log = get_logger(__name__)

_NOW, _LATER = "system.posix_acl_access", "system.posix_acl_default"
_VERSION = 2
_USER_OBJ, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 0x01, 0x04, 0x08, 0x10, 0x20
_NOBODY = 0xFFFFFFFF
_READ, _WRITE, _EXECUTE = 4, 2, 1
_WHOLE = _READ | _WRITE | _EXECUTE
_PUSHED = ("objects", "refs", "logs")
_HEADER, _ENTRY = struct.Struct("<I"), struct.Struct("<HHI")


def share(folders: tuple[Path, ...], group_id: int) -> None:
    """Open folders to the sandboxes' group. One that is open already, or not there, is left alone.

    Where the file system knows no such lists, what the operator must do is logged.
    """
    for folder in folders:
        try:
            if folder.is_dir():
                _share(folder, group_id)
        except OSError as error:
            how = f"chgrp -R {group_id} {folder} && chmod -R g+rwX {folder}"
            log.warning(
                "sandboxes may not be able to write to a folder that they may change",
                folder=str(folder),
                error=str(error),
                how=how,
            )


def _share(folder: Path, group_id: int) -> None:
    if _rights(folder, _LATER, group_id) is None:
        _open_all(folder, group_id)
    for repository, _ in repositories(folder):
        if (_rights(repository, _NOW, group_id) or 0) & _WRITE:  # it was made later
            _open_all(repository, group_id)
        if repository != folder:  # nobody but its owner moves it away and puts another in its place
            repository.parent.chmod(repository.parent.stat().st_mode | stat.S_ISVTX)


def _open_all(folder: Path, group_id: int) -> None:
    for path, closed in reversed(list(_within(folder))):  # the folder itself last: it says that all is done
        _open(path, group_id, closed=closed)


def repositories(folder: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Find the git repositories in a folder, each with what a push changes of it."""
    for path, folders, files in os.walk(folder):
        if _is_repository(folders, files):
            yield Path(path), [Path(path, name) for name in _PUSHED if name in folders]
            folders.clear()


def _is_repository(folders: list[str], files: list[str]) -> bool:
    return "HEAD" in files and {"objects", "refs"} <= {*folders}


def _within(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Yield a folder and all that is in it, and of each whether it is closed to changes."""
    sealed: set[Path] = set()
    for name, folders, files in os.walk(folder):
        path = Path(name)
        repository = _is_repository(folders, files)
        if path in sealed or repository:
            sealed |= {path, *(path / one for one in folders if not (repository and one in _PUSHED))}
        yield path, path in sealed
        yield from ((path / one, path in sealed) for one in files)


def _open(path: Path, group_id: int, *, closed: bool) -> None:
    """Give the group what the owner may do with a file or folder, or only to read it.

    Links and the like are left alone.
    """
    mode = path.lstat().st_mode
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        return
    user, others = mode >> 6 & 7, mode & 7
    most = _READ | _EXECUTE if closed else _WHOLE
    wanted = most if stat.S_ISDIR(mode) else user & most
    access = _list(user, mode >> 3 & 7, group_id, wanted, others)
    os.setxattr(path, _NOW, access, follow_symlinks=False)
    if stat.S_ISDIR(mode):
        later = _list(_WHOLE, others, group_id, most, others)
        os.setxattr(path, _LATER, later, follow_symlinks=False)


def _rights(path: Path, which: str, group_id: int) -> int | None:
    """Return what a list lets the group do; None if there is no list, or it does not name the group."""
    try:
        held = os.getxattr(path, which)
    except OSError:
        return None
    entries = _ENTRY.iter_unpack(held[_HEADER.size :])
    return next((rights for tag, rights, who in entries if (tag, who) == (_GROUP, group_id)), None)


def _list(user: int, group: int, group_id: int, wanted: int, others: int) -> bytes:
    """Return a list in which one more group has rights."""
    entries = (
        (_USER_OBJ, user, _NOBODY),
        (_GROUP_OBJ, group, _NOBODY),
        (_GROUP, wanted, group_id),
        (_MASK, group | wanted, _NOBODY),
        (_OTHER, others, _NOBODY),
    )
    return _HEADER.pack(_VERSION) + b"".join(_ENTRY.pack(*entry) for entry in entries)
