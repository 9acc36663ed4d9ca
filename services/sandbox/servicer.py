"""The gRPC surface that the task coordinator uses of its sandboxes.

What concerns a turn is only recorded here, quickly and however often it is asked; the status sync does it.
"""

import asyncio
import stat
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath

from branchline.v1.errors_pb2 import ERROR_REASON_FILE_NOT_WRITTEN, ERROR_REASON_SESSION_WORKING
from branchline_internal.sandbox.v1 import sandbox_pb2, sandbox_pb2_grpc

from services.runtime import faults
from services.runtime.database import Reader
from services.runtime.errors import DomainError, FailedPrecondition, reason_of
from services.runtime.logging import get_logger
from services.runtime.principal import current_principal
from services.runtime.serving import Context
from services.sandbox import retention
from services.sandbox.agent_server import AgentError, AgentServer
from services.sandbox.commands import CommandResult, Running, result, run, start
from services.sandbox.follower import Ground
from services.sandbox.records import Place
from services.sandbox.reports import Reports
from services.sandbox.status_sync import StatusSync
from services.sandbox.store import SandboxStore

log = get_logger(__name__)

_INSTALL_SECONDS = 10
_REPORT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class SandboxServicer(sandbox_pb2_grpc.SandboxServiceServicer):
    """Machines, commands in them, and the agents' sessions."""

    store: SandboxStore
    ground: Ground
    sync: StatusSync
    reports: Reports

    async def CreateSandbox(
        self, request: sandbox_pb2.CreateSandboxRequest, context: Context
    ) -> sandbox_pb2.CreateSandboxResponse:
        """Create a sandbox and wait until it runs."""
        organization_id = current_principal().organization_id
        sandbox = await self.ground.machines.create(
            request.sandbox_id, request.task_id, organization_id, request.provider, request.remote_url
        )
        await self._report(sandbox.id, sandbox.task_id)
        return sandbox_pb2.CreateSandboxResponse()

    async def _report(self, sandbox_id: str, task_id: str) -> None:
        """Tell which agents a sandbox knows. It is of use without."""
        try:
            async with asyncio.timeout(_REPORT_SECONDS):
                await self.ground.machines.use(sandbox_id, partial(self.reports.tell, sandbox_id, task_id))
        except (DomainError, AgentError, TimeoutError) as error:
            log.warning("agents not reported", sandbox=sandbox_id, reason=reason_of(error))

    async def DestroySandbox(
        self, request: sandbox_pb2.DestroySandboxRequest, context: Context
    ) -> sandbox_pb2.DestroySandboxResponse:
        """Destroy a sandbox with its agents. One that was never made is never made after this."""
        if not await self.ground.database.write(self.store.bury, request.sandbox_id):
            await self.ground.machines.destroy(request.sandbox_id)
        return sandbox_pb2.DestroySandboxResponse()

    async def Execute(self, request: sandbox_pb2.ExecuteRequest, context: Context) -> sandbox_pb2.ExecuteResponse:
        """Run a command."""

        async def begin(server: AgentServer) -> Running:
            directory = str(PurePosixPath(server.machine.home) / request.directory)
            return await start(server, request.command, directory, request.environment, request.timeout_seconds)

        ran = await result(await self.ground.machines.use(request.sandbox_id, begin))
        return sandbox_pb2.ExecuteResponse(
            exit_code=ran.end.exit_code, stdout=ran.stdout, stderr=ran.stderr, timed_out=ran.end.timed_out
        )

    async def PutFile(self, request: sandbox_pb2.PutFileRequest, context: Context) -> sandbox_pb2.PutFileResponse:
        """Write a file with a mode. It is made empty and closed to others before the content goes in."""
        mode = f"{stat.S_IMODE(request.mode):o}"

        async def put(server: AgentServer) -> CommandResult:
            path = str(PurePosixPath(server.machine.home) / request.path)
            command = ["install", "-m", mode, "/dev/null", path]
            made = await run(server, command, server.machine.home, {}, _INSTALL_SECONDS)
            if not made.end.exit_code:
                await server.write_file(path, request.content)
            return made

        made = await self.ground.machines.use(request.sandbox_id, put)
        if made.end.exit_code:
            raise FailedPrecondition(ERROR_REASON_FILE_NOT_WRITTEN, made.stderr, path=request.path)
        return sandbox_pb2.PutFileResponse()

    async def OpenSession(
        self, request: sandbox_pb2.OpenSessionRequest, context: Context
    ) -> sandbox_pb2.OpenSessionResponse:
        """Start an agent and open a session with it, once."""
        ground = self.ground
        place = await ground.database.read(self._place, request)
        async with ground.lanes.hold(request.session_id):
            record = await ground.database.read(ground.sessions.find, request.session_id)
            if record is not None:
                if record.acp_session_id and not record.closing and record.place == place:
                    return sandbox_pb2.OpenSessionResponse()
                if record.works:
                    words = "the agent works"
                    raise FailedPrecondition(ERROR_REASON_SESSION_WORKING, words, session_id=record.session_id)
                if record.process or record.acp_session_id or record.ending:
                    await ground.agents.end(record)
            begun = await ground.database.write(ground.sessions.reopen, place)
            faults.reached("session begun")
            try:
                await ground.agents.start(begun)
            except BaseException:
                self.sync.wake(request.session_id)  # which sees to it that nothing of the agent stays
                raise
            faults.reached("agent noted")
            await ground.database.write(ground.sessions.stand_idle, request.session_id)
            faults.reached("session idle")
        return sandbox_pb2.OpenSessionResponse()

    def _place(self, tx: Reader, request: sandbox_pb2.OpenSessionRequest) -> Place:
        sandbox = self.store.present(tx, request.sandbox_id)
        organization_id = self.store.organization(tx, sandbox.id)
        named = (request.agent, request.model, request.mode)
        return Place(request.session_id, sandbox.id, sandbox.task_id, organization_id, *named)

    async def StartTurn(self, request: sandbox_pb2.StartTurnRequest, context: Context) -> sandbox_pb2.StartTurnResponse:
        """Record the prompt, once per turn."""
        ground = self.ground
        await ground.database.write(ground.sessions.start_turn, request, ground.clock.seconds())
        self.sync.wake(request.session_id)
        return sandbox_pb2.StartTurnResponse()

    async def CancelTurn(
        self, request: sandbox_pb2.CancelTurnRequest, context: Context
    ) -> sandbox_pb2.CancelTurnResponse:
        """Record the wish to cancel."""
        await self.ground.database.write(self.ground.sessions.want_cancel, request.session_id, request.turn)
        self.sync.wake(request.session_id)
        return sandbox_pb2.CancelTurnResponse()

    async def AnswerInput(
        self, request: sandbox_pb2.AnswerInputRequest, context: Context
    ) -> sandbox_pb2.AnswerInputResponse:
        """Record the first answer. One that nobody waits for any more is dropped."""
        given = (request.session_id, request.input_request_id, request.answer, request.answered_by)
        if await self.ground.database.write(self.ground.sessions.questions.answer, *given):
            self.sync.wake(request.session_id)
        else:
            log.info("answer dropped", session=request.session_id, request=request.input_request_id)
        return sandbox_pb2.AnswerInputResponse()

    async def CloseSession(
        self, request: sandbox_pb2.CloseSessionRequest, context: Context
    ) -> sandbox_pb2.CloseSessionResponse:
        """Record the wish to close."""
        await self.ground.database.write(self.ground.sessions.want_close, request.session_id)
        self.sync.wake(request.session_id)
        return sandbox_pb2.CloseSessionResponse()

    async def ForgetTask(
        self, request: sandbox_pb2.ForgetTaskRequest, context: Context
    ) -> sandbox_pb2.ForgetTaskResponse:
        """Drop the rows of a task that is deleted, once its machines are gone."""
        for sandbox_id in await self.ground.database.read(retention.left, request.task_id):
            await self.ground.machines.destroy(sandbox_id)
        await self.ground.database.write(retention.forget, request.task_id)
        return sandbox_pb2.ForgetTaskResponse()

    async def ListOrphans(
        self, request: sandbox_pb2.ListOrphansRequest, context: Context
    ) -> sandbox_pb2.ListOrphansResponse:
        """List what providers have and the database does not know, to the operator alone."""
        current_principal().require_operator()
        found = sorted((await self.ground.machines.orphans()).items())
        orphans = [sandbox_pb2.Orphan(sandbox_id=sandbox_id, provider=provider) for sandbox_id, provider in found]
        return sandbox_pb2.ListOrphansResponse(orphans=orphans)
