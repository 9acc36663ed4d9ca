"""Lists, looks at, moves and deletes files inside a sandbox. A program of its own, run by `python -c`.

    list DIRECTORY LAST MOST               what a directory holds, by name, after one name
    look PATH                              what a path leads to; a link that leads nowhere is looked at itself
    move ROOT PATH NEW_PATH [overwrite]    one rename: what is not to be replaced, the operating system refuses
    delete ROOT PATH                       a link is deleted itself

It prints what `tree.Told` says: entries, or the number of an error and the field that it is about.
"""

import errno
import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

Entry = tuple[str, int, int, int]


class Refused(Exception):
    """What is asked for is not done."""


def _refuse(number: int, field: str = "path") -> Refused:
    return Refused(number, field)


def _entry(name: str, found: os.stat_result) -> Entry:
    return name, found.st_mode, found.st_size, found.st_mtime_ns


def _place(path: str) -> Path:
    """Return where something stands; if it is a link, that is not where it leads."""
    given = Path(path)
    return _real(given.parent) / given.name


def _real(path: "str | Path") -> Path:
    return Path(os.path.realpath(path))


def _holds(directory: Path, path: Path) -> bool:
    return path == directory or directory in path.parents


def _look(path: str) -> list[Entry]:
    try:
        return [_entry("", Path(path).stat())]
    except OSError:
        return [_entry("", os.lstat(path))]


def _list(directory: str, last: str, most: str) -> list[Entry]:
    names = (path.name for path in Path(directory).iterdir())
    named = {os.fsencode(name).decode(errors="replace"): name for name in names}
    found: list[Entry] = []
    for shown in sorted(name for name in named if name > last):
        if len(found) == int(most):
            break
        try:
            found.append(_entry(shown, os.lstat(f"{directory}/{named[shown]}")))
        except FileNotFoundError:
            continue
        except OSError:
            found.append((shown, 0, 0, 0))
    return found


def _move(root: str, path: str, new_path: str, overwrite: str = "") -> list[Entry]:
    old, new, tree = _place(path), _place(new_path), _real(root)
    here, there = old.lstat(), None
    try:
        there = new.lstat()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _refuse(error.errno or 0, "new_path") from error
    if _holds(old, tree):
        raise _refuse(errno.EBUSY)
    if _holds(new, tree):
        raise _refuse(errno.EBUSY, "new_path")
    same = there is not None and os.path.samestat(here, there)
    if _holds(old, new) or _holds(new, old) or same or _real(path) == new:
        raise _refuse(errno.EINVAL, "new_path")
    if there is not None:
        if not overwrite:
            raise _refuse(errno.EEXIST, "new_path")
        if stat.S_ISDIR(here.st_mode) != stat.S_ISDIR(there.st_mode):
            raise _refuse(errno.EISDIR if stat.S_ISDIR(there.st_mode) else errno.ENOTDIR, "new_path")
    try:
        new.parent.mkdir(parents=True, exist_ok=True)
        old.rename(new)
    except FileExistsError as error:  # a file in the place of one of its directories
        raise _refuse(errno.ENOTDIR, "new_path") from error
    except OSError as error:
        raise _refuse(error.errno or 0, "new_path") from error
    return []


def _delete(root: str, path: str) -> list[Entry]:
    place = _place(path)
    if _holds(place, _real(root)):
        raise _refuse(errno.EBUSY)
    if stat.S_ISDIR(place.lstat().st_mode):
        place.rmdir()
    else:
        place.unlink()
    return []


def _told(what: str, *given: str) -> dict[str, Any]:
    call = {"list": _list, "look": _look, "move": _move, "delete": _delete}[what]
    try:
        return {"entries": call(*given)}
    except Refused as error:
        number, field = error.args
        return {"error": number, "field": field}
    except OSError as error:
        return {"error": error.errno or 0, "field": "path"}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_told(*sys.argv[1:])))
