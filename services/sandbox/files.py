"""The files of a task's sandbox, as the gateway forwards what concerns them."""

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TypeVar

from branchline.v1 import files_pb2, files_pb2_grpc
from branchline.v1.common_pb2 import ENTITY_KIND_FILE
from branchline.v1.errors_pb2 import (
    ERROR_REASON_ETAG_MISMATCH,
    ERROR_REASON_NO_SANDBOX,
)
from branchline.v1.files_pb2 import FILE_KIND_DIRECTORY, FILE_KIND_FILE, File

from services.runtime.database import Database
from services.runtime.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound
from services.runtime.lanes import Lanes
from services.runtime.principal import current_principal
from services.runtime.serving import Context
from services.runtime.spine.chunks import parts
from services.runtime.spine.pages import MOST_ITEMS, page_size
from services.runtime.spine.tokens import page_token, parse_page_token
from services.sandbox import tree
from services.sandbox.agent_server import FILE_BYTES, AgentServer, FileEntry
from services.sandbox.commands import run_bytes
from services.sandbox.machines import WORKSPACE, Machines
from services.sandbox.store import SandboxStore

_ETAG_DIGITS = 32
_READ_SECONDS = 30

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FileServicer(files_pb2_grpc.FileServiceServicer):
    """Files and directories. What changes those of a task takes turns with what else comes this way, not with agents.

    They have one lane and not one each: by links, one file has many paths, and a move concerns all below a directory.
    """

    database: Database
    store: SandboxStore
    machines: Machines
    lanes: Lanes

    async def ListFiles(self, request: files_pb2.ListFilesRequest, context: Context) -> files_pb2.ListFilesResponse:
        """List one directory, page by page."""
        begin = parse_page_token(request, request.page_token, str)
        last, most = str(begin[0]) if begin is not None else "", page_size(request.page_size, MOST_ITEMS)

        async def look(server: AgentServer) -> list[File]:
            return await tree.listed(server, _inside(server, request.path, "path"), last, most + 1)

        found = await self._use(request.task_id, request.path, look)
        names = [file.path for file in found]
        for file in found:
            file.path = str(PurePosixPath(request.path) / file.path)
        page = next(parts(found, File.ByteSize, most), list[File]())
        answer = files_pb2.ListFilesResponse(files=page)
        if len(page) < len(found):
            answer.next_page_token = page_token(request, [names[len(page) - 1]])
        return answer

    async def GetFile(self, request: files_pb2.GetFileRequest, context: Context) -> files_pb2.GetFileResponse:
        """Look at one file."""
        found = await self._use(request.task_id, request.path, lambda server: _look(server, request.path))
        return files_pb2.GetFileResponse(file=found)

    async def ReadFile(self, request: files_pb2.ReadFileRequest, context: Context) -> files_pb2.ReadFileResponse:
        """Read part of one file."""
        length = min(request.length or FILE_BYTES, FILE_BYTES)

        async def read(server: AgentServer) -> files_pb2.ReadFileResponse:
            path = _inside(server, request.path, "path")
            known = await _followed(server, request.path)
            if known is None:
                raise NotFound(ENTITY_KIND_FILE, path)
            _as_file(known)
            if known.size_bytes <= FILE_BYTES:
                whole = await server.read_file(path)
                known.etag, known.size_bytes = _hash(whole), len(whole)
                part = whole[request.offset : request.offset + length]
                return files_pb2.ReadFileResponse(content=part, file=known)
            script = 'tail -c "+$1" -- "$0" | head -c "$2"'
            # The first part is named before it is read, the others after: where all have one name, nothing changed
            # between the first and the last.
            before = None if request.offset else await _look(server, request.path)
            part = await _output(server, ["sh", "-c", script, path, str(request.offset + 1), str(length)])
            return files_pb2.ReadFileResponse(content=part, file=before or await _look(server, request.path))

        return await self._use(request.task_id, request.path, read)

    async def WriteFile(self, request: files_pb2.WriteFileRequest, context: Context) -> files_pb2.WriteFileResponse:
        """Write one file, if it is what the caller knows."""

        async def write(server: AgentServer) -> File:
            path = _inside(server, request.path, "path")
            done = await _check(server, request)
            if done is not None:
                return done
            there = await _followed(server, request.path)
            if there is not None:
                _as_file(there)
            await server.write_file(path, request.content)
            known = _file(request.path, await server.stat_file(path))
            known.etag = _hash(request.content)
            return known

        async with self.lanes.hold(request.task_id):
            written = await self._use(request.task_id, request.path, write)
        return files_pb2.WriteFileResponse(file=written)

    async def MoveFile(self, request: files_pb2.MoveFileRequest, context: Context) -> files_pb2.MoveFileResponse:
        """Move one file or directory."""

        async def move(server: AgentServer) -> File:
            path, new_path = _inside(server, request.path, "path"), _inside(server, request.new_path, "new_path")
            root = _inside(server, "", "path")
            await tree.move(server, root, path, new_path, request.new_path, overwrite=request.overwrite)
            return await _look(server, request.new_path)

        async with self.lanes.hold(request.task_id):
            moved = await self._use(request.task_id, request.path, move)
        return files_pb2.MoveFileResponse(file=moved)

    async def DeleteFile(self, request: files_pb2.DeleteFileRequest, context: Context) -> files_pb2.DeleteFileResponse:
        """Delete one file or empty directory."""

        async def delete(server: AgentServer) -> None:
            await tree.delete(server, _inside(server, "", "path"), _inside(server, request.path, "path"))

        async with self.lanes.hold(request.task_id):
            await self._use(request.task_id, request.path, delete)
        return files_pb2.DeleteFileResponse()

    async def _use(self, task_id: str, path: str, call: Callable[[AgentServer], Awaitable[T]]) -> T:
        """Do something with the files of a task. What is not found is told by the path that the caller named."""
        organization_id = current_principal().organization_id
        sandbox = await self.database.read(self.store.active, task_id, organization_id)
        if sandbox is None:
            raise FailedPrecondition(ERROR_REASON_NO_SANDBOX, f"the task {task_id} has no sandbox now")
        try:
            return await self.machines.use(sandbox.id, call)
        except NotFound as error:
            if error.kind != "file":
                raise
            raise NotFound(ENTITY_KIND_FILE, path, path=path) from error


async def _check(server: AgentServer, request: files_pb2.WriteFileRequest) -> File | None:
    """Raise AlreadyExists or Aborted where a file is not what the caller knows, unless it is what is to be written.

    That is returned: a write whose answer was lost comes again, and finds what it did itself.
    """
    if request.WhichOneof("condition") is None:
        return None
    try:
        there = await _look(server, request.path)
    except NotFound:
        there = None
    if there is not None and there.etag == _hash(request.content):
        return there
    if request.if_absent and there is not None:
        raise tree.in_the_way(request.path, f"there is something at {request.path}")
    etag = "" if there is None else there.etag
    if request.if_etag and etag != request.if_etag:
        words = f"{request.path} is another one by now; read it again"
        raise Aborted(ERROR_REASON_ETAG_MISMATCH, words, path=request.path, etag=etag)
    return None


async def _look(server: AgentServer, path: str) -> File:
    """Return what is known of a file or directory. Raise NotFound.

    A file that is read in one part is named by its content. A larger one is named by what its file system says of it,
    or each of its parts would cost a reading of the whole: by inode, size, and the times at which its content and its
    inode last changed. Nothing sets the last of them, so a change with the old time and size put back is seen; what
    is not is a second change within one tick of the file system's clock, some milliseconds, that leaves the size.
    """
    absolute = _inside(server, path, "path")
    known = await _known(server, path)
    if known.kind != FILE_KIND_FILE:
        return known
    if known.size_bytes <= FILE_BYTES:
        known.etag = _hash(await server.read_file(absolute))
    else:
        stated = await _output(server, ["stat", "--format=%i %s %.9Y %.9Z", "--", absolute])
        known.etag = f"s{_hash(stated)}"
    return known


async def _known(server: AgentServer, path: str) -> File:
    """Return what a path leads to, or the link that leads nowhere. Raise NotFound."""
    known = await _followed(server, path) or await tree.look(server, _inside(server, path, "path"))
    if known is None:
        raise NotFound(ENTITY_KIND_FILE, path)
    known.path = str(PurePosixPath(path))
    return known


async def _followed(server: AgentServer, path: str) -> File | None:
    """Return what a path leads to, if it leads to something.

    To open a pipe may take for ever, and its server does nothing else meanwhile. It says of none what it is, but that
    it is empty, as all devices are, and it does not open one to read it.
    """
    absolute = _inside(server, path, "path")
    try:
        entry = await server.stat_file(absolute)
        if not entry.directory and not entry.size_bytes:
            await server.read_file(absolute)
    except NotFound:
        return None
    except InvalidArgument:
        known = await tree.look(server, absolute)
        if known is not None:
            known.path = str(PurePosixPath(path))
        return known
    return _file(path, entry)


async def _output(server: AgentServer, command: Sequence[str]) -> bytes:
    end, output = await run_bytes(server, command, server.machine.home, _READ_SECONDS)
    if end.exit_code:
        raise NotFound(ENTITY_KIND_FILE, command[-1])
    return output


def _as_file(known: File) -> None:
    """Raise InvalidArgument for what is no file."""
    if known.kind != FILE_KIND_FILE:
        words = "is a directory" if known.kind == FILE_KIND_DIRECTORY else "is neither a file nor a directory"
        raise InvalidArgument("path", words, path=known.path)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_ETAG_DIGITS]


def _file(path: str, entry: FileEntry) -> File:
    kind = FILE_KIND_DIRECTORY if entry.directory else FILE_KIND_FILE
    known = File(path=str(PurePosixPath(path)), kind=kind, size_bytes=entry.size_bytes)
    known.modify_time.FromDatetime(entry.modify_time)
    return known


def _inside(server: AgentServer, path: str, field: str) -> str:
    """Return the absolute path of one within the working tree; raise InvalidArgument if it leaves it."""
    given = PurePosixPath(path).parts
    if path.startswith("/") or ".." in given:
        raise InvalidArgument(field, "must stay within the working tree")
    return str(PurePosixPath(server.machine.home, WORKSPACE, *given))
