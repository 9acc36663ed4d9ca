"""The files of a sandbox as they stand, links too: the host's side of `tree_program.py`."""

import errno
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec
from branchline.v1.common_pb2 import ENTITY_KIND_FILE
from branchline.v1.errors_pb2 import ERROR_REASON_FILE_EXISTS
from branchline.v1.files_pb2 import FILE_KIND_DIRECTORY, FILE_KIND_FILE, FILE_KIND_LINK, FILE_KIND_OTHER, File, FileKind

from services.runtime.errors import AlreadyExists, DomainError, InvalidArgument, NotFound
from services.sandbox import tree_program
from services.sandbox.agent_server import AgentServer, Garbled, refusal
from services.sandbox.commands import python, run_bytes

_SECONDS = 30
_PROGRAM = Path(tree_program.__file__).read_text()
_KINDS: Mapping[int, FileKind.ValueType] = {
    stat.S_IFREG: FILE_KIND_FILE,
    stat.S_IFDIR: FILE_KIND_DIRECTORY,
    stat.S_IFLNK: FILE_KIND_LINK,
}
_IN_THE_WAY: Mapping[int, str] = {
    errno.EEXIST: "there is something at",
    errno.EISDIR: "there is a directory, which no file replaces, at",
    errno.ENOTDIR: "there is a file, which no directory replaces, at or above",
    errno.ENOTEMPTY: "there is a directory that is not empty at",
}


class Told(msgspec.Struct):
    """What the program says."""

    entries: list[
        tuple[str, Annotated[int, msgspec.Meta(ge=0, lt=2**32)], Annotated[int, msgspec.Meta(ge=0, lt=2**62)], int]
    ] = []
    """Name, mode, size, and when it changed in nanoseconds."""
    error: int | None = None
    field: str = "path"


async def listed(server: AgentServer, directory: str, last: str, most: int) -> list[File]:
    """Return what a directory holds after a name, by name alone. Raise NotFound, or InvalidArgument."""
    told = await _told(server, "list", directory, last, str(most))
    if told.error is not None:
        raise _refused(told, directory)
    return [_file(*entry) for entry in told.entries]


async def look(server: AgentServer, path: str) -> File | None:
    """Return what a path leads to, or the link that leads nowhere; None if there is nothing."""
    told = await _told(server, "look", path)
    if told.error in (errno.ENOENT, errno.ENOTDIR):
        return None
    if told.error is not None or not told.entries:
        raise _refused(told, path)
    return _file(*told.entries[0])


async def move(server: AgentServer, root: str, path: str, new_path: str, shown: str, *, overwrite: bool) -> None:
    """Move something by one rename. Raise NotFound, InvalidArgument, or AlreadyExists with the new path as shown."""
    told = await _told(server, "move", root, path, new_path, *(["overwrite"] if overwrite else []))
    words = _IN_THE_WAY.get(told.error or 0)
    if words and told.field == "new_path":
        raise in_the_way(shown, f"{words} {shown}")
    if told.error is not None:
        raise _refused(told, path)


async def delete(server: AgentServer, root: str, path: str) -> None:
    """Delete a file, a link or an empty directory. Raise NotFound, or InvalidArgument."""
    told = await _told(server, "delete", root, path)
    if told.error is not None:
        raise _refused(told, path)


def in_the_way(path: str, words: str) -> AlreadyExists:
    """Return the error that there is something at a path."""
    return AlreadyExists(ENTITY_KIND_FILE, path, words, ERROR_REASON_FILE_EXISTS, path=path)


async def _told(server: AgentServer, *given: str) -> Told:
    _, output = await run_bytes(server, python(server, _PROGRAM, *given), server.machine.home, _SECONDS)
    try:
        return msgspec.json.decode(output, type=Told)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise Garbled(error) from error


def _refused(told: Told, path: str) -> DomainError:
    if told.error == errno.ENOENT:
        return NotFound(ENTITY_KIND_FILE, path)
    return InvalidArgument("new_path" if told.field == "new_path" else "path", refusal(told.error))


def _file(name: str, mode: int, size_bytes: int, changed_ns: int) -> File:
    known = File(path=name, kind=_KINDS.get(stat.S_IFMT(mode), FILE_KIND_OTHER), size_bytes=size_bytes)
    try:
        known.modify_time.FromMicroseconds(changed_ns // 1000)
    except ValueError:  # a year that is none here
        known.modify_time.FromMicroseconds(0)
    return known
