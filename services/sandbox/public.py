"""The public commands on a task's machine, as the gateway forwards them."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TypeVar

from branchline.v1 import sandboxes_pb2, sandboxes_pb2_grpc
from branchline.v1.vocabulary_pb2 import ERROR_REASON_FILE_TOO_LARGE, ERROR_REASON_NO_SANDBOX

from services.runtime.database import Database
from services.runtime.errors import FailedPrecondition, InvalidArgument
from services.runtime.principal import current_principal
from services.runtime.serving import Context
from services.sandbox.agent_server import FILE_BYTES, AgentServer, FileEntry
from services.sandbox.commands import CommandEnd, Running, follow, result, start
from services.sandbox.machines import WORKSPACE, Machines
from services.sandbox.store import SandboxStore

_DEFAULT_SECONDS = 60

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PublicSandboxServicer(sandboxes_pb2_grpc.SandboxServiceServicer):
    """Commands and files."""

    database: Database
    store: SandboxStore
    machines: Machines

    async def RunCommand(
        self, request: sandboxes_pb2.RunCommandRequest, context: Context
    ) -> sandboxes_pb2.RunCommandResponse:
        """Run one command."""
        ran = await result(await self._start(request))
        return sandboxes_pb2.RunCommandResponse(
            exit_code=ran.end.exit_code,
            stdout=ran.stdout,
            stderr=ran.stderr,
            timed_out=ran.end.timed_out,
            duration_ms=ran.end.duration_ms,
        )

    async def StreamCommand(
        self, request: sandboxes_pb2.StreamCommandRequest, context: Context
    ) -> AsyncIterator[sandboxes_pb2.StreamCommandResponse]:
        """Run one command and pass its output on while it comes."""
        async with aclosing(follow(await self._start(request))) as pieces:
            async for piece in pieces:
                if isinstance(piece, CommandEnd):
                    end = sandboxes_pb2.CommandEnd(
                        exit_code=piece.exit_code, timed_out=piece.timed_out, duration_ms=piece.duration_ms
                    )
                    yield sandboxes_pb2.StreamCommandResponse(end=end)
                elif piece.error:
                    yield sandboxes_pb2.StreamCommandResponse(stderr=piece.data)
                else:
                    yield sandboxes_pb2.StreamCommandResponse(stdout=piece.data)

    async def ListAgents(
        self, request: sandboxes_pb2.ListAgentsRequest, context: Context
    ) -> sandboxes_pb2.ListAgentsResponse:
        """List the agents that the sandbox knows."""
        agents = await self._use(request.task_id, lambda server: server.agents())
        return sandboxes_pb2.ListAgentsResponse(
            agents=[
                sandboxes_pb2.AgentInfo(name=agent.name, installed=agent.installed, capabilities=agent.capabilities)
                for agent in agents
            ]
        )

    async def ListFiles(
        self, request: sandboxes_pb2.ListFilesRequest, context: Context
    ) -> sandboxes_pb2.ListFilesResponse:
        """List one directory."""
        found = await self._use(
            request.task_id, lambda server: server.list_files(_inside(server, request.path, "path"))
        )
        answer = sandboxes_pb2.ListFilesResponse(files=[_file_info(entry) for entry in found])
        if answer.ByteSize() > FILE_BYTES:
            words = f"the directory holds {len(found)} entries, more than fit an answer"
            raise FailedPrecondition(ERROR_REASON_FILE_TOO_LARGE, words)
        return answer

    async def StatFile(
        self, request: sandboxes_pb2.StatFileRequest, context: Context
    ) -> sandboxes_pb2.StatFileResponse:
        """Look at one file."""
        found = await self._use(request.task_id, lambda server: server.stat_file(_inside(server, request.path, "path")))
        return sandboxes_pb2.StatFileResponse(file=_file_info(found))

    async def MoveFile(
        self, request: sandboxes_pb2.MoveFileRequest, context: Context
    ) -> sandboxes_pb2.MoveFileResponse:
        """Move one file."""

        async def move(server: AgentServer) -> None:
            path, new_path = _inside(server, request.path, "path"), _inside(server, request.new_path, "new_path")
            await server.move_file(path, new_path, overwrite=request.overwrite)

        await self._use(request.task_id, move)
        return sandboxes_pb2.MoveFileResponse()

    async def ReadFile(
        self, request: sandboxes_pb2.ReadFileRequest, context: Context
    ) -> sandboxes_pb2.ReadFileResponse:
        """Read one file."""
        content = await self._use(
            request.task_id, lambda server: server.read_file(_inside(server, request.path, "path"))
        )
        return sandboxes_pb2.ReadFileResponse(content=content)

    async def WriteFile(
        self, request: sandboxes_pb2.WriteFileRequest, context: Context
    ) -> sandboxes_pb2.WriteFileResponse:
        """Write one file."""
        await self._use(
            request.task_id,
            lambda server: server.write_file(_inside(server, request.path, "path"), request.content),
        )
        return sandboxes_pb2.WriteFileResponse()

    async def DeleteFile(
        self, request: sandboxes_pb2.DeleteFileRequest, context: Context
    ) -> sandboxes_pb2.DeleteFileResponse:
        """Delete one file."""
        await self._use(request.task_id, lambda server: server.delete_file(_inside(server, request.path, "path")))
        return sandboxes_pb2.DeleteFileResponse()

    async def _start(self, request: sandboxes_pb2.RunCommandRequest | sandboxes_pb2.StreamCommandRequest) -> Running:
        seconds = request.timeout_seconds or _DEFAULT_SECONDS

        async def begin(server: AgentServer) -> Running:
            return await start(server, request.command, _inside(server, request.directory, "directory"), {}, seconds)

        return await self._use(request.task_id, begin)

    async def _use(self, task_id: str, call: Callable[[AgentServer], Awaitable[T]]) -> T:
        organization_id = current_principal().organization_id
        sandbox = await self.database.read(self.store.active, task_id, organization_id)
        if sandbox is None:
            raise FailedPrecondition(ERROR_REASON_NO_SANDBOX, f"the task {task_id} has no sandbox now")
        return await self.machines.use(sandbox.id, call)


def _file_info(entry: FileEntry) -> sandboxes_pb2.FileInfo:
    info = sandboxes_pb2.FileInfo(name=entry.name, directory=entry.directory, size_bytes=entry.size_bytes)
    info.modify_time.FromDatetime(entry.modify_time)
    return info


def _inside(server: AgentServer, path: str, field: str) -> str:
    """Return the absolute path of one within the working tree; raise InvalidArgument if it leaves it."""
    parts = PurePosixPath(path).parts
    if path.startswith("/") or ".." in parts:
        raise InvalidArgument(field, "must stay within the working tree")
    return str(PurePosixPath(server.machine.home, WORKSPACE, *parts))
