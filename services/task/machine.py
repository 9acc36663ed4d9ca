"""What the task asks of its sandbox and of its coordinator, with patience for services that restart."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import grpc
from branchline.repository.v1.repository_pb2 import GetGitCredentialRequest, GetGitCredentialResponse
from branchline.repository.v1.repository_pb2_grpc import RepositoryServiceStub
from branchline.resource.v1.session_pb2 import Session
from branchline.resource.v1.task_pb2 import Task
from branchline.sandbox.v1 import sandbox_pb2
from branchline.sandbox.v1.sandbox_pb2_grpc import SandboxServiceStub

from services.runtime.errors import FailedPrecondition
from services.runtime.retry import Backoff
from services.task.git import CREDENTIALS_FILE, CREDENTIALS_MODE, tail

_PATIENCE_SECONDS = 60.0
_CREATE_SECONDS = 120.0
_SESSION_SECONDS = 300.0
_GRACE_SECONDS = 30.0
_TRANSIENT = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED})

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Machine:
    """The sandbox side of a task, and the way upward for credentials."""

    sandbox: SandboxServiceStub
    repository: RepositoryServiceStub

    async def create(self, task: Task) -> None:
        """Create the task's active sandbox, or find it created."""
        request = sandbox_pb2.CreateSandboxRequest(
            sandbox_id=task.active_sandbox_id, task_id=task.id, provider=task.sandbox_provider
        )
        await patiently(lambda: self.sandbox.CreateSandbox(request, timeout=_CREATE_SECONDS))

    async def destroy(self, sandbox_id: str) -> None:
        """Destroy a sandbox, or find it destroyed."""
        request = sandbox_pb2.DestroySandboxRequest(sandbox_id=sandbox_id)
        await patiently(lambda: self.sandbox.DestroySandbox(request, timeout=_CREATE_SECONDS))

    async def credential(self, task_id: str) -> GetGitCredentialResponse:
        """Ask upward for the git credential of the task's owner."""
        return await patiently(lambda: self.repository.GetGitCredential(GetGitCredentialRequest(task_id=task_id)))

    async def put_credentials(self, sandbox_id: str, content: bytes) -> None:
        """Replace the git credentials in the sandbox."""
        request = sandbox_pb2.PutFileRequest(
            sandbox_id=sandbox_id, path=CREDENTIALS_FILE, content=content, mode=CREDENTIALS_MODE
        )
        await patiently(lambda: self.sandbox.PutFile(request))

    async def run(
        self,
        sandbox_id: str,
        command: Sequence[str],
        directory: str,
        environment: Mapping[str, str],
        timeout_seconds: int,
    ) -> str:
        """Run a repeatable command and return its output. Raise FailedPrecondition with its words if it fails."""
        request = sandbox_pb2.ExecuteRequest(
            sandbox_id=sandbox_id,
            command=command,
            directory=directory,
            environment=environment,
            timeout_seconds=timeout_seconds,
        )
        result = await patiently(lambda: self.sandbox.Execute(request, timeout=timeout_seconds + _GRACE_SECONDS))
        if result.timed_out:
            raise FailedPrecondition("COMMAND_TIMED_OUT", f"{command[0]} took longer than {timeout_seconds} s")
        if result.exit_code:
            raise FailedPrecondition("COMMAND_FAILED", tail(result.stderr or result.stdout))
        return result.stdout

    async def open_session(self, sandbox_id: str, session: Session) -> None:
        """Start the agent of a session."""
        request = sandbox_pb2.OpenSessionRequest(
            sandbox_id=sandbox_id, session_id=session.id, agent=session.agent, model=session.model
        )
        await patiently(lambda: self.sandbox.OpenSession(request, timeout=_SESSION_SECONDS))


async def patiently(call: Callable[[], Awaitable[T]]) -> T:
    """Make an idempotent call; while the other service cannot be reached, try again for a minute."""
    backoff = Backoff(first_seconds=0.1, most_seconds=3.0)
    deadline = asyncio.get_running_loop().time() + _PATIENCE_SECONDS
    while True:
        try:
            return await call()
        except grpc.aio.AioRpcError as error:
            if error.code() not in _TRANSIENT or asyncio.get_running_loop().time() > deadline:
                raise
        await asyncio.sleep(backoff.next_seconds())
