"""Folders that sandboxes may change are opened to their group by POSIX access control lists (see acl(5)).

What lies in such a folder is opened once; what is made in it later, by whomever, is opened by the folder's default.
Owners and modes stay as they are.
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
_READ_WRITE, _EXECUTE = 6, 1
_HEADER, _ENTRY = struct.Struct("<I"), struct.Struct("<HHI")


def share(folders: tuple[Path, ...], group_id: int) -> None:
    """Open folders to the sandboxes' group. One that is open already, or not there, is left alone.

    Where the file system knows no such lists, what the operator must do is logged.
    """
    for folder in folders:
        try:
            if folder.is_dir() and not _is_shared(folder, group_id):
                for path in _within(folder):
                    _open(path, group_id)
                _open(folder, group_id)  # last: it says that all is done
        except OSError as error:
            how = f"chgrp -R {group_id} {folder} && chmod -R g+rwX {folder}"
            log.warning(
                "sandboxes may not be able to write to a folder that they may change",
                folder=str(folder),
                error=str(error),
                how=how,
            )


def _within(folder: Path) -> Iterator[Path]:
    for path, folders, files in os.walk(folder):
        yield from (Path(path, name) for name in (*folders, *files))


def _open(path: Path, group_id: int) -> None:
    """Give the group what the owner may do with a file or folder; links and the like are left alone."""
    mode = path.lstat().st_mode
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        return
    user, others = mode >> 6 & 7, mode & 7
    wanted = _READ_WRITE | _EXECUTE if stat.S_ISDIR(mode) else user
    access = _list(user, mode >> 3 & 7, group_id, wanted, others)
    os.setxattr(path, _NOW, access, follow_symlinks=False)
    if stat.S_ISDIR(mode):
        whole = _READ_WRITE | _EXECUTE
        os.setxattr(path, _LATER, _list(whole, others, group_id, whole, others), follow_symlinks=False)


def _is_shared(folder: Path, group_id: int) -> bool:
    try:
        held = os.getxattr(folder, _LATER)
    except OSError:
        return False
    return any(entry[0] == _GROUP and entry[2] == group_id for entry in _ENTRY.iter_unpack(held[_HEADER.size :]))


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
