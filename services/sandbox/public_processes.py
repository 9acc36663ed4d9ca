"""The processes of a task's sandbox, as the gateway forwards what concerns them. What reads them is the index's."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import PurePosixPath

from branchline.v1 import processes_pb2, processes_pb2_grpc
from branchline.v1.common_pb2 import ENTITY_KIND_PROCESS
from branchline.v1.errors_pb2 import (
    ERROR_REASON_NO_SANDBOX,
    ERROR_REASON_NOT_ANSWERED,
    ERROR_REASON_OFFSET_GAP,
    ERROR_REASON_PROCESS_ENDED,
    ERROR_REASON_STATE_FORBIDS,
)
from branchline.v1.processes_pb2 import PROCESS_STATE_ENDED, Process, ProcessSpec

from services.runtime.actors import current_actor
from services.runtime.database import Database, Tx
from services.runtime.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, OutOfRange, error_reason
from services.runtime.principal import current_principal
from services.runtime.serving import Context
from services.runtime.spine.commands import Commands
from services.runtime.spine.tokens import consistency_token
from services.runtime.spine.watch import heartbeat_seconds
from services.sandbox.process_files import input_request
from services.sandbox.process_store import ProcessStore
from services.sandbox.processes import Processes
from services.sandbox.store import SandboxStore


@dataclass(frozen=True, slots=True)
class ProcessServicer(processes_pb2_grpc.ProcessServiceServicer):
    """Commands and terminals."""

    database: Database
    commands: Commands
    sandboxes: SandboxStore
    store: ProcessStore
    processes: Processes

    async def StartProcess(
        self, request: processes_pb2.StartProcessRequest, context: Context
    ) -> processes_pb2.StartProcessResponse:
        """Record a process, once; it is started at once."""
        _check(request.spec)
        answer = await self.commands.run(request, processes_pb2.StartProcessResponse, self._start, request)
        self.processes.follow(answer.process.id)
        return answer

    def _start(self, tx: Tx, request: processes_pb2.StartProcessRequest) -> processes_pb2.StartProcessResponse:
        organization_id = current_principal().organization_id
        sandbox = self.sandboxes.active(tx, request.task_id, organization_id)
        if sandbox is None:
            words = f"the task {request.task_id} has no sandbox now"
            raise FailedPrecondition(ERROR_REASON_NO_SANDBOX, words)
        if request.sandbox_id not in ("", sandbox.id):
            words = f"the task's sandbox is {sandbox.id} now"
            raise FailedPrecondition(ERROR_REASON_NO_SANDBOX, words, sandbox_id=sandbox.id)
        given = (request.task_id, sandbox.id, organization_id, request.spec, current_actor())
        process = self.store.start(tx, *given)
        named = consistency_token([(ENTITY_KIND_PROCESS, process.id, process.revision)])
        return processes_pb2.StartProcessResponse(process=process, consistency_token=named)

    async def WatchProcess(
        self, request: processes_pb2.WatchProcessRequest, context: Context
    ) -> AsyncGenerator[processes_pb2.WatchProcessResponse, None]:
        """Pass the output on while it comes."""
        process = await self._mine(request.task_id, request.process_id)
        heartbeat = heartbeat_seconds(request.heartbeat_interval)
        async with aclosing(self.processes.watch(process, request.offset, heartbeat)) as responses:
            async for response in responses:
                yield response

    async def WriteProcessInput(
        self, request: processes_pb2.WriteProcessInputRequest, context: Context
    ) -> processes_pb2.WriteProcessInputResponse:
        """Give the process input that it does not have yet."""
        process = await self._mine(request.task_id, request.process_id)
        wanted = input_request(request.offset, request.data, close=request.close)
        try:
            answer = await self.processes.ask(process, wanted)
        except FailedPrecondition as error:
            if error_reason(error) != ERROR_REASON_PROCESS_ENDED:
                raise
            given = await self.processes.input_bytes(process)
            if not 0 < request.offset + len(request.data) <= given:
                raise
            return processes_pb2.WriteProcessInputResponse(offset=given)  # the answer was lost, not the input
        if answer.gap is not None:
            words = f"{answer.gap} bytes were written so far; go on from there"
            raise OutOfRange(ERROR_REASON_OFFSET_GAP, words, offset=str(answer.gap))
        if answer.closed is not None:
            words = "the process's input is closed"
            raise FailedPrecondition(ERROR_REASON_STATE_FORBIDS, words, state="closed", allowed_states="open")
        if answer.offset is None:
            words = "the process's supervisor does not say what it did; it may have done what was asked"
            raise DeadlineExceeded(ERROR_REASON_NOT_ANSWERED, words)
        return processes_pb2.WriteProcessInputResponse(offset=answer.offset)

    async def ResizeTerminal(
        self, request: processes_pb2.ResizeTerminalRequest, context: Context
    ) -> processes_pb2.ResizeTerminalResponse:
        """Give a terminal another size."""
        process = await self._mine(request.task_id, request.process_id)
        if not process.spec.HasField("terminal"):
            words = "the process has no terminal"
            raise FailedPrecondition(ERROR_REASON_STATE_FORBIDS, words, state="no_terminal", allowed_states="terminal")
        await self.processes.ask(process, {"what": "resize", "size": [request.size.rows, request.size.columns]})
        return processes_pb2.ResizeTerminalResponse()

    async def SignalProcess(
        self, request: processes_pb2.SignalProcessRequest, context: Context
    ) -> processes_pb2.SignalProcessResponse:
        """Send a signal to the process and all it has started, once."""

        async def send() -> Process:
            process = await self._mine(request.task_id, request.process_id)
            if process.state != PROCESS_STATE_ENDED:
                try:
                    await self.processes.ask(process, {"what": "signal", "signal": request.signal})
                except FailedPrecondition as error:
                    if error_reason(error) != ERROR_REASON_PROCESS_ENDED:
                        raise
            return await self._mine(request.task_id, request.process_id)

        def answer(_: Tx, process: Process) -> processes_pb2.SignalProcessResponse:
            return processes_pb2.SignalProcessResponse(process=process)

        return await self.commands.once(request, processes_pb2.SignalProcessResponse, send, answer)

    async def _mine(self, task_id: str, process_id: str) -> Process:
        organization_id = current_principal().organization_id
        return await self.database.read(self.store.mine, process_id, task_id, organization_id)


def _check(spec: ProcessSpec) -> None:
    """Raise InvalidArgument for what no process can be started with."""
    if not spec.command or not spec.command[0]:
        raise InvalidArgument("spec.command", "must begin with a program")
    if spec.directory.startswith("/") or ".." in PurePosixPath(spec.directory).parts:
        raise InvalidArgument("spec.directory", "must stay within the working tree")
    for field, words in (
        ("spec.command", spec.command),
        ("spec.directory", [spec.directory]),
        ("spec.environment", spec.environment.values()),
    ):
        if any("\0" in word for word in words):
            raise InvalidArgument(field, "must not contain the character U+0000")
