"""The sandbox service alone, in a process of its own, with the test as its coordinator."""

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import grpc
import psutil
import scripted_agent
from branchline.v1 import files_pb2_grpc, sessions_pb2
from branchline.v1 import transcripts_pb2 as transcripts
from branchline.v1.common_pb2 import Actor, BlobReference, Prompt
from branchline.v1.processes_pb2 import Process
from branchline.v1.sandboxes_pb2 import Sandbox
from branchline.v1.transcripts_pb2 import InputAnswer, InputRequest, TranscriptEntry
from branchline_internal.sandbox.v1 import sandbox_pb2, sandbox_pb2_grpc
from branchline_internal.sandbox.v1.sandbox_pb2 import AgentReport, AgentSession
from branchline_internal.spine.v1 import push_pb2, push_pb2_grpc
from branchline_internal.task.v1 import task_pb2, task_pb2_grpc

from cli.installation import python_paths
from services.runtime.client import open_channel
from services.runtime.config import Secret, read_config
from services.runtime.principal import Principal, Signer, bind_principal
from services.sandbox.limits import Limits
from services.sandbox.providers.local import LocalProviderConfig
from services.sandbox.service import SandboxConfig, build
from tests.support.databases import migrated

KEY = "a key for tests, long enough for HS256"
SANDBOX, SESSION, TASK = "sbx_1", "ses_1", "task_1"
AGENT_SERVER = Path("node_modules/@sandbox-agent/cli-linux-x64/bin/sandbox-agent").absolute()
DEADLINE_SECONDS = 60.0

T = TypeVar("T")


async def eventually(look: Callable[[], T | None], what: Callable[[], Any] = lambda: "", seconds: float = 60.0) -> T:
    """Look until there is something to see."""
    try:
        async with asyncio.timeout(seconds):
            while True:
                seen = look()
                if seen:
                    return seen
                await asyncio.sleep(0.02)
    except TimeoutError as error:
        raise AssertionError(f"it did not come: {what()}") from error


@dataclass
class BlobKeeper(task_pb2_grpc.TaskServiceServicer):
    """Keeps blobs, as the task would have the organization do."""

    blobs: dict[str, tuple[BlobReference, bytes]] = field(default_factory=dict[str, tuple[BlobReference, bytes]])
    uploads: dict[str, bytes] = field(default_factory=dict[str, bytes])
    refusing: bool = False

    def add(self, data: bytes, display_name: str, media_type: str) -> BlobReference:
        """Keep bytes."""
        blob_id = f"blob_{len(self.blobs) + 1}"
        blob = BlobReference(blob_id=blob_id, display_name=display_name, media_type=media_type, size_bytes=len(data))
        self.blobs[blob_id] = blob, data
        return blob

    async def FetchBlob(self, request: task_pb2.FetchBlobRequest, context: Any) -> task_pb2.FetchBlobResponse:
        data = self.blobs[request.blob_id][1][request.offset :]
        return task_pb2.FetchBlobResponse(data=data[: 1024 * 1024])

    async def StoreBlob(self, request: task_pb2.StoreBlobRequest, context: Any) -> task_pb2.StoreBlobResponse:
        if self.refusing:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the quota is used up")
        upload_id = request.upload_id or f"upload_{len(self.uploads)}"
        data = self.uploads[upload_id] = self.uploads.get(upload_id, b"") + request.data
        if len(data) < request.size_bytes:
            return task_pb2.StoreBlobResponse(upload_id=upload_id, received_bytes=len(data))
        assert hashlib.sha256(data).hexdigest() == request.sha256
        return task_pb2.StoreBlobResponse(blob=self.add(data, request.display_name, request.media_type))


@dataclass
class Coordinator(push_pb2_grpc.PushServiceServicer):
    """Takes what the service pushes, as the task would: the newest state of each, and how the sessions went."""

    keeper: BlobKeeper = field(default_factory=BlobKeeper)
    requests: dict[str, InputRequest] = field(default_factory=dict[str, InputRequest])
    processes: dict[str, Process] = field(default_factory=dict[str, Process])
    reports: list[AgentReport] = field(default_factory=list[AgentReport])

    entries: dict[str, TranscriptEntry] = field(default_factory=dict[str, TranscriptEntry])
    sessions: list[AgentSession] = field(default_factory=list[AgentSession])
    sandboxes: list[Sandbox] = field(default_factory=list[Sandbox])
    revisions: dict[str, int] = field(default_factory=dict[str, int])
    largest: int = 0

    async def Push(self, request_iterator: Any, context: Any) -> AsyncGenerator[push_pb2.PushResponse, None]:
        async for request in request_iterator:
            for entry in request.entries:
                self._take(entry)
            yield push_pb2.PushResponse(batch=request.batch)

    def _take(self, entry: push_pb2.PushEntry) -> None:
        key = f"{entry.state.type_url}/{entry.id}"
        self.largest = max(self.largest, len(entry.state.value))
        if self.revisions.get(key, 0) >= entry.revision:
            return
        self.revisions[key] = entry.revision
        if entry.state.Is(TranscriptEntry.DESCRIPTOR):
            self.entries[entry.id] = TranscriptEntry.FromString(entry.state.value)
        elif entry.state.Is(AgentSession.DESCRIPTOR):
            self.sessions.append(AgentSession.FromString(entry.state.value))
        elif entry.state.Is(InputRequest.DESCRIPTOR):
            self.requests[entry.id] = InputRequest.FromString(entry.state.value)
        elif entry.state.Is(AgentReport.DESCRIPTOR):
            self.reports.append(AgentReport.FromString(entry.state.value))
        elif entry.state.Is(Process.DESCRIPTOR):
            self.processes[entry.id] = Process.FromString(entry.state.value)
        else:
            self.sandboxes.append(Sandbox.FromString(entry.state.value))

    def ended(self, turn: int, session: str = SESSION) -> AgentSession | None:
        """Return how a turn ended, if it did."""
        over = (sessions_pb2.SESSION_STATE_IDLE, sessions_pb2.SESSION_STATE_FAILED, sessions_pb2.SESSION_STATE_CLOSED)
        found = [state for state in self.sessions if state.session_id == session]
        return next((state for state in found if state.turn == turn and state.state in over), None)

    def said(self, session: str = SESSION) -> str:
        """Return all that the agent said, in order."""
        found = [entry.agent_message.text for entry in self.shown("agent_message") if entry.session_id == session]
        return "".join(found)

    def shown(self, content: str) -> list[TranscriptEntry]:
        """Return the entries with one kind of content, in order."""
        found = [entry for entry in self.entries.values() if entry.WhichOneof("content") == content]
        return sorted(found, key=lambda entry: int(entry.id.rpartition("_")[2]))

    def stop_reasons(self) -> list[int]:
        """Return why turns ended, as the transcript says."""
        return [entry.turn_end.reason for entry in self.shown("turn_end")]


@dataclass
class Room:
    """The service, its coordinator, and a stub."""

    folder: Path
    options: dict[str, Any]
    coordinator: Coordinator
    stub: Any
    files: Any
    process: asyncio.subprocess.Process | None = None

    async def start(self, kill_at: str = "") -> None:
        """Start the service; have it killed at a moment."""
        environment = {**os.environ, "TEST_KILL_AT": kill_at, "GRPC_ENABLE_FORK_SUPPORT": "0"}
        with (self.folder / "service.log").open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tests.support.sandbox", str(self.folder), json.dumps(self.options)),
                env=environment,
                stdout=log,
                stderr=log,
            )
        await self.answering()

    async def answering(self) -> None:
        """Wait until the service answers."""
        probe = sandbox_pb2.CancelTurnRequest(session_id="none", turn=1)
        async with asyncio.timeout(DEADLINE_SECONDS):
            while True:
                try:
                    await self.stub.CancelTurn(probe, wait_for_ready=True, timeout=DEADLINE_SECONDS)
                    return
                except grpc.aio.AioRpcError:  # the connection to the one that was killed
                    await asyncio.sleep(0.05)

    async def killed(self) -> None:
        """Wait until the service was killed at its moment."""
        assert self.process is not None
        code = await asyncio.wait_for(self.process.wait(), DEADLINE_SECONDS)
        assert code == -signal.SIGKILL, self.log()

    async def kill(self) -> None:
        """Kill the service now."""
        assert self.process is not None
        self.process.kill()
        await self.process.wait()

    async def stop(self) -> None:
        """Stop the service politely."""
        assert self.process is not None
        if self.process.returncode is None:
            self.process.terminate()
            await asyncio.wait_for(self.process.wait(), 30)

    def log(self) -> str:
        return (self.folder / "service.log").read_text()[-6000:]

    async def open(self, session: str = SESSION, mode: str = "") -> None:
        """Make the sandbox with a git repository in it, and open a session."""
        await self.stub.CreateSandbox(
            sandbox_pb2.CreateSandboxRequest(sandbox_id=SANDBOX, task_id=TASK, provider="local"), timeout=60
        )
        script = (
            "git init -q workspace && cd workspace && git config user.name T && git config user.email t@localhost "
            "&& git commit -q --allow-empty -m First"
        )
        made = await self.execute(script)
        assert made.exit_code == 0, made.stderr
        await self.stub.OpenSession(
            sandbox_pb2.OpenSessionRequest(
                sandbox_id=SANDBOX, session_id=session, agent="mock", model="swift", mode=mode
            ),
            timeout=60,
        )

    async def execute(self, script: str) -> sandbox_pb2.ExecuteResponse:
        request = sandbox_pb2.ExecuteRequest(sandbox_id=SANDBOX, command=["sh", "-c", script], timeout_seconds=20)
        return await self.stub.Execute(request, timeout=60)

    async def prompt(self, turn: int, text: str, session: str = SESSION) -> None:
        await self.give(turn, Prompt(text=text), session)

    async def give(self, turn: int, prompt: Prompt, session: str = SESSION) -> None:
        """Begin a turn."""
        request = sandbox_pb2.StartTurnRequest(session_id=session, turn=turn, prompt=prompt)
        await self.stub.StartTurn(request, timeout=30)

    async def cancel(self, turn: int) -> None:
        await self.stub.CancelTurn(sandbox_pb2.CancelTurnRequest(session_id=SESSION, turn=turn), timeout=30)

    async def turn(self, turn: int, text: str) -> AgentSession:
        """Do a turn to its end."""
        await self.prompt(turn, text)
        return await self.ended(turn)

    async def ended(self, turn: int, session: str = SESSION, seconds: float = DEADLINE_SECONDS) -> AgentSession:
        return await eventually(lambda: self.coordinator.ended(turn, session), self.log, seconds)

    async def until_said(self, words: str) -> None:
        await eventually(lambda: words in self.coordinator.said(), self.log)

    async def answer(self, request_id: str, option_id: str) -> None:
        await self.answer_with(request_id, InputAnswer(option_id=option_id))

    async def answer_with(self, request_id: str, answer: InputAnswer) -> None:
        request = sandbox_pb2.AnswerInputRequest(
            session_id=SESSION, input_request_id=request_id, answer=answer, answered_by=Actor(user_id="usr_1")
        )
        await self.stub.AnswerInput(request, timeout=30)

    async def question(self, after: str = "") -> InputRequest:
        """Wait for something that the agent waits for, asked after another."""
        requests, pending = self.coordinator.requests, transcripts.INPUT_REQUEST_STATE_PENDING
        return await eventually(
            lambda: next((one for one in requests.values() if one.state == pending and one.id > after), None), self.log
        )

    async def file(self, path: str) -> str:
        return (await self.execute(f"cat workspace/{path}")).stdout

    def processes(self, program: str) -> list[psutil.Process]:
        """Return the sandbox's processes whose command holds a word."""
        root = str(self.folder / "data" / "local")
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("HOME", "").startswith(root) and program in " ".join(process.cmdline()):
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def agents(self) -> list[psutil.Process]:
        """Return the agents that run, their launchers not counted."""
        return [process for process in self.processes("scripted-agent") if "mock-acp" not in process.cmdline()[-1]]

    def server(self) -> psutil.Process:
        """Return the sandbox-agent server."""
        return next(found for found in self.processes("sandbox-agent") if found.cmdline()[1:2] == ["server"])


def config(folder: Path, options: dict[str, Any]) -> SandboxConfig:
    """Return the service's configuration."""
    program = Path(sys.executable).with_name("branchline-scripted-agent")
    source = Path(scripted_agent.__file__).parents[1]
    local = {
        "sandbox_agent": AGENT_SERVER,
        "agents": {"mock": ["env", f"PYTHONPATH={source}", str(program)]},
        "readable_paths": python_paths(),
        **options.get("local", {}),
    }
    return SandboxConfig(
        addresses={"sandbox": f"unix:{folder}/sandbox.sock", "task": f"unix:{folder}/task.sock"},
        data_dir=folder / "data",
        database_url=Secret(options["database_url"]),
        signing_key=Secret(KEY),
        drain_seconds=0.2,
        local=read_config(LocalProviderConfig, local),
        limits=read_config(Limits, options.get("limits", {})),
        stop_machines=options.get("stop_machines", False),
        sweep_seconds=options.get("sweep_seconds", 60.0),
    )


@asynccontextmanager
async def sandbox_room(folder: Path, **options: Any) -> AsyncGenerator[Room, None]:
    """Prepare the service with its coordinator; the test starts it."""
    options["database_url"] = migrated("sandbox", folder / "data", lasts=True)
    coordinator = Coordinator()
    server = grpc.aio.server()
    push_pb2_grpc.add_PushServiceServicer_to_server(coordinator, server)
    task_pb2_grpc.add_TaskServiceServicer_to_server(coordinator.keeper, server)
    server.add_insecure_port(f"unix:{folder}/task.sock")
    await server.start()
    bind_principal(Principal(service="task", organization_id="org_1"))
    channel = open_channel("sandbox", f"unix:{folder}/sandbox.sock", Signer(KEY, "task"))
    speaking: Any = channel
    stubs = (sandbox_pb2_grpc.SandboxServiceStub(speaking), files_pb2_grpc.FileServiceStub(speaking))
    room = Room(folder, options, coordinator, *stubs)
    try:
        yield room
    finally:
        if room.process is not None and room.process.returncode is None:
            room.process.kill()
            await room.process.wait()
        left = room.processes("")
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=5)
        await channel.close()
        await server.stop(0)


async def _serve(folder: Path, options: dict[str, Any]) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with build(config(folder, options)).running():
        await stop.wait()


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1]), json.loads(sys.argv[2])))
