"""The gRPC surface that the task coordinator uses of its sandboxes."""

import stat
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import grpc
from branchline.resource.v1 import session_pb2
from branchline.sandbox.v1 import sandbox_pb2, sandbox_pb2_grpc

from services.runtime.errors import FailedPrecondition, InvalidArgument, NotFound
from services.runtime.principal import current_principal
from services.runtime.service import Chassis
from services.sandbox.agent_server import AgentError
from services.sandbox.agents import open_agent
from services.sandbox.commands import run
from services.sandbox.machines import WORKSPACE, Machines
from services.sandbox.status_sync import StatusSync
from services.sandbox.store import WORKING, SandboxStore, SessionRecord

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class SandboxServicer(sandbox_pb2_grpc.SandboxServiceServicer):
    """Machines, commands in them, and the agents' sessions."""

    chassis: Chassis
    store: SandboxStore
    machines: Machines
    sync: StatusSync

    async def CreateSandbox(
        self, request: sandbox_pb2.CreateSandboxRequest, context: Context
    ) -> sandbox_pb2.CreateSandboxResponse:
        """Create a sandbox and wait until it runs."""
        organization_id = current_principal().organization_id
        await self.machines.create(request.sandbox_id, request.task_id, organization_id, request.provider)
        server = await self.machines.server(request.sandbox_id)
        workspace = f"{server.machine.home}/{WORKSPACE}"
        async with self.chassis.database.transaction() as tx:
            sandbox = await self.store.sandbox(tx, request.sandbox_id)
            if sandbox.workspace != workspace:
                sandbox.workspace = workspace
                await self.store.save_sandbox(tx, sandbox)
        return sandbox_pb2.CreateSandboxResponse(workspace=workspace)

    async def DestroySandbox(
        self, request: sandbox_pb2.DestroySandboxRequest, context: Context
    ) -> sandbox_pb2.DestroySandboxResponse:
        """Destroy a sandbox with its agents. One that was never made is never made after this."""
        async with self.chassis.database.transaction() as tx:
            never_made = await self.store.bury(tx, request.sandbox_id)
        if not never_made:
            await self.machines.destroy(request.sandbox_id)
        return sandbox_pb2.DestroySandboxResponse()

    async def Execute(self, request: sandbox_pb2.ExecuteRequest, context: Context) -> sandbox_pb2.ExecuteResponse:
        """Run a command."""
        server = await self.machines.server(request.sandbox_id)
        directory = str(PurePosixPath(server.machine.home) / request.directory)
        result = await run(server, request.command, directory, request.environment, request.timeout_seconds)
        return sandbox_pb2.ExecuteResponse(
            exit_code=result.end.exit_code, stdout=result.stdout, stderr=result.stderr, timed_out=result.end.timed_out
        )

    async def PutFile(self, request: sandbox_pb2.PutFileRequest, context: Context) -> sandbox_pb2.PutFileResponse:
        """Write a file with a mode. It is made empty and closed to others before the content goes in."""
        server = await self.machines.server(request.sandbox_id)
        path = str(PurePosixPath(server.machine.home) / request.path)
        mode = f"{stat.S_IMODE(request.mode):o}"
        made = await run(server, ["install", "-m", mode, "/dev/null", path], server.machine.home, {}, 10)
        if made.end.exit_code:
            raise FailedPrecondition("FILE_NOT_WRITTEN", made.stderr)
        await server.write_file(path, request.content)
        return sandbox_pb2.PutFileResponse()

    async def OpenSession(
        self, request: sandbox_pb2.OpenSessionRequest, context: Context
    ) -> sandbox_pb2.OpenSessionResponse:
        """Start an agent and open a session with it, once."""
        record = await self._known(request.session_id)
        same = (request.sandbox_id, request.agent, request.model)
        if record is not None and record.acp_session_id and (record.sandbox_id, record.agent, record.model) == same:
            return sandbox_pb2.OpenSessionResponse()
        server = await self.machines.server(request.sandbox_id)
        async with self.chassis.database.transaction() as tx:
            sandbox = await self.store.sandbox(tx, request.sandbox_id)
            record = _opened(request, sandbox.task_id, record)
            await self.store.add_session(tx, record)
        try:
            record.acp_session_id = await open_agent(server, record, f"{server.machine.home}/{WORKSPACE}")
        except AgentError as error:
            raise FailedPrecondition("AGENT_NOT_STARTED", f"{request.agent} did not start: {error}") from error
        async with self.chassis.database.transaction() as tx:
            await self.store.report_session(tx, record, session_pb2.SESSION_STATUS_IDLE)
        return sandbox_pb2.OpenSessionResponse()

    async def _known(self, session_id: str) -> SessionRecord | None:
        async with self.chassis.database.read() as connection:
            try:
                return await self.store.session(connection, session_id)
            except NotFound:
                return None

    async def StartTurn(self, request: sandbox_pb2.StartTurnRequest, context: Context) -> sandbox_pb2.StartTurnResponse:
        """Record the prompt, once per turn, and start the status sync."""
        async with self.chassis.database.transaction() as tx:
            record = await self.store.session(tx, request.session_id)
            if request.turn > record.turn:
                record.turn = request.turn
                record.prompt = request
                record.prompt_rpc_id = 0
                await self.store.want_cancel(tx, request.session_id, wanted=False)
                await self.store.report_session(tx, record, session_pb2.SESSION_STATUS_RUNNING)
        self.sync.wake(request.session_id)
        return sandbox_pb2.StartTurnResponse()

    async def CancelTurn(
        self, request: sandbox_pb2.CancelTurnRequest, context: Context
    ) -> sandbox_pb2.CancelTurnResponse:
        """Record the wish to cancel; the status sync tells the agent."""
        async with self.chassis.database.transaction() as tx:
            record = await self.store.session(tx, request.session_id)
            if record.status in WORKING:
                await self.store.want_cancel(tx, request.session_id, wanted=True)
        self.sync.wake(request.session_id)
        return sandbox_pb2.CancelTurnResponse()

    async def AnswerPermission(
        self, request: sandbox_pb2.AnswerPermissionRequest, context: Context
    ) -> sandbox_pb2.AnswerPermissionResponse:
        """Record the first answer; the status sync tells the agent and closes the entry."""
        async with self.chassis.database.transaction() as tx:
            entry = await self.store.entry(tx, request.entry_id)
            if entry.session_id != request.session_id:
                raise NotFound("transcript_entry", request.entry_id)
            if request.option_id not in [option.id for option in entry.options]:
                known = ", ".join(option.id for option in entry.options) or "none"
                raise InvalidArgument("option_id", f"is not one of the request's options: {known}")
            user_id = current_principal().user_id
            if not await self.store.answer_permission(tx, request.entry_id, request.option_id, user_id):
                raise FailedPrecondition("ALREADY_ANSWERED", "the request was answered before, or its turn is over")
        self.sync.wake(request.session_id)
        return sandbox_pb2.AnswerPermissionResponse()

    async def CloseSession(
        self, request: sandbox_pb2.CloseSessionRequest, context: Context
    ) -> sandbox_pb2.CloseSessionResponse:
        """Stop the agent of a session."""
        record = await self._known(request.session_id)
        if record is None or not record.acp_session_id:
            return sandbox_pb2.CloseSessionResponse()
        if await self.machines.is_running(record.sandbox_id):
            server = await self.machines.server(record.sandbox_id)
            await server.disconnect(record.connection)
        async with self.chassis.database.transaction() as tx:
            record.acp_session_id = ""
            await self.store.report_session(tx, record, session_pb2.SESSION_STATUS_CLOSED)
        return sandbox_pb2.CloseSessionResponse()


def _opened(request: sandbox_pb2.OpenSessionRequest, task_id: str, before: SessionRecord | None) -> SessionRecord:
    """Return the record of a session that is being opened. Turn, entries and revision go on from before."""
    return SessionRecord(
        session_id=request.session_id,
        sandbox_id=request.sandbox_id,
        task_id=task_id,
        agent=request.agent,
        model=request.model,
        generation=before.generation + 1 if before else 1,
        acp_session_id="",
        last_event_id=0,
        turn=before.turn if before else 0,
        prompt=None,
        prompt_rpc_id=0,
        prompt_event_id=0,
        cancel_wanted=False,
        entry_count=before.entry_count if before else 0,
        status=session_pb2.SESSION_STATUS_PENDING,
        revision=before.revision if before else 0,
    )
