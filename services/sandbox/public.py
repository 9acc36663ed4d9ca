"""The public commands on a task's machine, as the gateway forwards them."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import grpc
from branchline.gateway.v1 import sandboxes_pb2, sandboxes_pb2_grpc

from services.runtime.errors import FailedPrecondition, InvalidArgument
from services.runtime.principal import current_principal
from services.runtime.service import Chassis
from services.sandbox.agent_server import AgentServer, FileEntry
from services.sandbox.commands import CommandEnd, follow, run
from services.sandbox.machines import WORKSPACE, Machines
from services.sandbox.store import SandboxStore

Context = grpc.aio.ServicerContext[Any, Any]

_DEFAULT_SECONDS = 60
_FILE_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class PublicSandboxServicer(sandboxes_pb2_grpc.SandboxServiceServicer):
    """Commands and files."""

    chassis: Chassis
    store: SandboxStore
    machines: Machines

    async def RunCommand(
        self, request: sandboxes_pb2.RunCommandRequest, context: Context
    ) -> sandboxes_pb2.RunCommandResponse:
        """Run one command."""
        server = await self._server(request.task_id)
        directory = _inside(server, request.directory, "directory")
        result = await run(server, request.command, directory, {}, request.timeout_seconds or _DEFAULT_SECONDS)
        return sandboxes_pb2.RunCommandResponse(
            exit_code=result.end.exit_code,
            stdout=result.stdout,
            stderr=result.stderr,
            timed_out=result.end.timed_out,
            duration_ms=result.end.duration_ms,
        )

    async def StreamCommand(
        self, request: sandboxes_pb2.StreamCommandRequest, context: Context
    ) -> AsyncIterator[sandboxes_pb2.StreamCommandResponse]:
        """Run one command and pass its output on while it comes."""
        server = await self._server(request.task_id)
        directory = _inside(server, request.directory, "directory")
        seconds = request.timeout_seconds or _DEFAULT_SECONDS
        async with aclosing(follow(server, request.command, directory, {}, seconds)) as pieces:
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
        server = await self._server(request.task_id)
        return sandboxes_pb2.ListAgentsResponse(
            agents=[
                sandboxes_pb2.AgentInfo(name=agent.name, installed=agent.installed, capabilities=agent.capabilities)
                for agent in await server.agents()
            ]
        )

    async def ListFiles(
        self, request: sandboxes_pb2.ListFilesRequest, context: Context
    ) -> sandboxes_pb2.ListFilesResponse:
        """List one directory."""
        server = await self._server(request.task_id)
        answer = sandboxes_pb2.ListFilesResponse()
        for entry in await server.list_files(_inside(server, request.path, "path")):
            answer.files.append(_file_info(entry))
        return answer

    async def StatFile(
        self, request: sandboxes_pb2.StatFileRequest, context: Context
    ) -> sandboxes_pb2.StatFileResponse:
        """Look at one file."""
        server = await self._server(request.task_id)
        entry = await server.stat_file(_inside(server, request.path, "path"))
        return sandboxes_pb2.StatFileResponse(file=_file_info(entry))

    async def MoveFile(
        self, request: sandboxes_pb2.MoveFileRequest, context: Context
    ) -> sandboxes_pb2.MoveFileResponse:
        """Move one file."""
        server = await self._server(request.task_id)
        path, new_path = _inside(server, request.path, "path"), _inside(server, request.new_path, "new_path")
        await server.move_file(path, new_path, overwrite=request.overwrite)
        return sandboxes_pb2.MoveFileResponse()

    async def ReadFile(
        self, request: sandboxes_pb2.ReadFileRequest, context: Context
    ) -> sandboxes_pb2.ReadFileResponse:
        """Read one file."""
        server = await self._server(request.task_id)
        content = await server.read_file(_inside(server, request.path, "path"))
        if len(content) > _FILE_BYTES:
            raise FailedPrecondition("FILE_TOO_LARGE", f"{request.path} has {len(content)} bytes, more than 4 MiB")
        return sandboxes_pb2.ReadFileResponse(content=content)

    async def WriteFile(
        self, request: sandboxes_pb2.WriteFileRequest, context: Context
    ) -> sandboxes_pb2.WriteFileResponse:
        """Write one file."""
        server = await self._server(request.task_id)
        await server.write_file(_inside(server, request.path, "path"), request.content)
        return sandboxes_pb2.WriteFileResponse()

    async def DeleteFile(
        self, request: sandboxes_pb2.DeleteFileRequest, context: Context
    ) -> sandboxes_pb2.DeleteFileResponse:
        """Delete one file."""
        server = await self._server(request.task_id)
        await server.delete_file(_inside(server, request.path, "path"))
        return sandboxes_pb2.DeleteFileResponse()

    async def _server(self, task_id: str) -> AgentServer:
        async with self.chassis.database.read() as connection:
            organization_id = current_principal().organization_id
            sandbox = await self.store.active_sandbox(connection, task_id, organization_id)
        if sandbox is None:
            raise FailedPrecondition("NO_SANDBOX", f"the task {task_id} has no sandbox now")
        return await self.machines.server(sandbox.id)


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
