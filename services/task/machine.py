"""What the task asks of its sandbox and of its coordinator, with patience for services that restart."""

import asyncio
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import grpc
from branchline.v1.common_pb2 import BlobReference
from branchline.v1.sessions_pb2 import Session
from branchline.v1.tasks_pb2 import Task
from branchline_internal.repository.v1 import repository_pb2
from branchline_internal.repository.v1.repository_pb2 import GetGitCredentialRequest, GetGitCredentialResponse
from branchline_internal.repository.v1.repository_pb2_grpc import RepositoryServiceStub
from branchline_internal.sandbox.v1 import sandbox_pb2
from branchline_internal.sandbox.v1.sandbox_pb2_grpc import SandboxServiceStub

from services.runtime.config import Config
from services.runtime.retry import Backoff
from services.task.git import CREDENTIALS_FILE, CREDENTIALS_MODE

_GRACE_SECONDS = 30.0
_TRANSIENT = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED})

T = TypeVar("T")


class Deadlines(Config, frozen=True):
    """How long each thing may take."""

    create_seconds: float = 120.0
    """Making or destroying a machine."""

    clone_seconds: int = 600
    """Cloning the repository and checking the branch out."""

    session_seconds: float = 300.0
    """Starting an agent."""

    patience_seconds: float = 60.0
    """How long another service may be out of reach before a step fails."""

    upward_seconds: float = 10.0
    """Asking the coordinator about blobs."""

    turn_hours: float = 4.0
    """A turn of which nothing was heard for longer, and a margin, has been lost."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The sandbox side of a task, and the way upward for credentials."""

    sandbox: SandboxServiceStub
    repository: RepositoryServiceStub
    deadlines: Deadlines

    async def create(self, task: Task, remote_url: str) -> None:
        """Create the task's active sandbox, or find it created."""
        request = sandbox_pb2.CreateSandboxRequest(
            sandbox_id=task.active_sandbox_id,
            task_id=task.id,
            provider=task.sandbox_provider,
            remote_url=remote_url,
        )
        await self._patiently(lambda: self.sandbox.CreateSandbox(request, timeout=self.deadlines.create_seconds))

    async def destroy(self, sandbox_id: str) -> None:
        """Destroy a sandbox, or find it destroyed or never made."""
        request = sandbox_pb2.DestroySandboxRequest(sandbox_id=sandbox_id)
        with suppress_not_found():
            await self._patiently(lambda: self.sandbox.DestroySandbox(request, timeout=self.deadlines.create_seconds))

    async def close_session(self, session_id: str) -> None:
        """Have the agent of a session stopped, if there is one."""
        request = sandbox_pb2.CloseSessionRequest(session_id=session_id)
        with suppress_not_found():
            await self._patiently(lambda: self.sandbox.CloseSession(request))

    async def credential(self, task_id: str) -> GetGitCredentialResponse:
        """Ask upward for the git credential of the task's owner."""
        return await self._patiently(lambda: self.repository.GetGitCredential(GetGitCredentialRequest(task_id=task_id)))

    async def put_credentials(self, sandbox_id: str, content: bytes) -> None:
        """Replace the git credentials in the sandbox."""
        request = sandbox_pb2.PutFileRequest(
            sandbox_id=sandbox_id, path=CREDENTIALS_FILE, content=content, mode=CREDENTIALS_MODE
        )
        await self._patiently(lambda: self.sandbox.PutFile(request))

    async def run(
        self,
        sandbox_id: str,
        command: Sequence[str],
        directory: str,
        environment: Mapping[str, str],
        timeout_seconds: int,
    ) -> sandbox_pb2.ExecuteResponse:
        """Run a repeatable command."""
        request = sandbox_pb2.ExecuteRequest(
            sandbox_id=sandbox_id,
            command=command,
            directory=directory,
            environment=environment,
            timeout_seconds=timeout_seconds,
        )
        return await self._patiently(lambda: self.sandbox.Execute(request, timeout=timeout_seconds + _GRACE_SECONDS))

    async def open_session(self, sandbox_id: str, session: Session) -> None:
        """Start the agent of a session."""
        request = opening(sandbox_id, session)
        await self._patiently(lambda: self.sandbox.OpenSession(request, timeout=self.deadlines.session_seconds))

    async def claim(self, task_id: str, blob_ids: Sequence[str]) -> Sequence[BlobReference]:
        """Ask upward: name blobs on the task's behalf, so that they are kept; return what they are."""
        request = repository_pb2.ClaimBlobsRequest(task_id=task_id, blob_ids=blob_ids)
        answer = await self.repository.ClaimBlobs(request, timeout=self.deadlines.upward_seconds)
        return answer.blobs

    async def _patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        """Make an idempotent call; while the other service cannot be reached, try again for a while."""
        backoff = Backoff(first_seconds=0.1, most_seconds=3.0)
        deadline = asyncio.get_running_loop().time() + self.deadlines.patience_seconds
        while True:
            try:
                return await call()
            except grpc.aio.AioRpcError as error:
                if error.code() not in _TRANSIENT or asyncio.get_running_loop().time() > deadline:
                    raise
            await asyncio.sleep(backoff.next_seconds())


def opening(sandbox_id: str, session: Session) -> sandbox_pb2.OpenSessionRequest:
    """Return the request that starts the agent of a session."""
    return sandbox_pb2.OpenSessionRequest(
        sandbox_id=sandbox_id, session_id=session.id, agent=session.agent, model=session.model, mode=session.mode
    )


@contextmanager
def suppress_not_found() -> Generator[None]:
    """Take for done what concerns something that is not there."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        if error.code() != grpc.StatusCode.NOT_FOUND:
            raise
