"""The public commands that task owns, as the gateway forwards them."""

from dataclasses import dataclass

from branchline.v1 import sessions_pb2, sessions_pb2_grpc, tasks_pb2, tasks_pb2_grpc

from services.runtime.database import Tx
from services.runtime.principal import current_principal
from services.runtime.serving import Context
from services.runtime.spine.commands import Commands
from services.task.lifecycle import Lifecycle
from services.task.sessions import Sessions
from services.task.store import TaskStore


@dataclass(frozen=True, slots=True)
class PublicTaskServicer(tasks_pb2_grpc.TaskServiceServicer):
    """Retry and the two ends of a task."""

    commands: Commands
    store: TaskStore
    lifecycle: Lifecycle

    async def RetryTask(self, request: tasks_pb2.RetryTaskRequest, context: Context) -> tasks_pb2.RetryTaskResponse:
        """Provision a task in error again, in its sandbox if that lives, else in a new one."""
        return await self.commands.run(request, tasks_pb2.RetryTaskResponse, self._retry, request)

    def _retry(self, tx: Tx, request: tasks_pb2.RetryTaskRequest) -> tasks_pb2.RetryTaskResponse:
        with self.store.open_for(tx, request.task_id, current_principal()) as task:
            self.lifecycle.retry(tx, task, request.agent, request.model)
        return tasks_pb2.RetryTaskResponse(task=task.task, consistency_token=task.token())

    async def ArchiveTask(
        self, request: tasks_pb2.ArchiveTaskRequest, context: Context
    ) -> tasks_pb2.ArchiveTaskResponse:
        """Release the sandbox and put the task away."""
        return await self.commands.run(request, tasks_pb2.ArchiveTaskResponse, self._archive, request)

    def _archive(self, tx: Tx, request: tasks_pb2.ArchiveTaskRequest) -> tasks_pb2.ArchiveTaskResponse:
        with self.store.open_for(tx, request.task_id, current_principal()) as task:
            self.lifecycle.end(tx, task, tasks_pb2.TASK_STATUS_ARCHIVING)
        return tasks_pb2.ArchiveTaskResponse(task=task.task, consistency_token=task.token())

    async def KillTask(self, request: tasks_pb2.KillTaskRequest, context: Context) -> tasks_pb2.KillTaskResponse:
        """Destroy the sandbox and end the task."""
        return await self.commands.run(request, tasks_pb2.KillTaskResponse, self._kill, request)

    def _kill(self, tx: Tx, request: tasks_pb2.KillTaskRequest) -> tasks_pb2.KillTaskResponse:
        with self.store.open_for(tx, request.task_id, current_principal()) as task:
            self.lifecycle.end(tx, task, tasks_pb2.TASK_STATUS_KILLING)
        return tasks_pb2.KillTaskResponse(task=task.task, consistency_token=task.token())


@dataclass(frozen=True, slots=True)
class PublicSessionServicer(sessions_pb2_grpc.SessionServiceServicer):
    """Sessions and messages."""

    commands: Commands
    sessions: Sessions

    async def CreateSession(
        self, request: sessions_pb2.CreateSessionRequest, context: Context
    ) -> sessions_pb2.CreateSessionResponse:
        """Start the agent, then store the session."""
        return await self.commands.once(
            request,
            sessions_pb2.CreateSessionResponse,
            lambda: self.sessions.open_agent(request),
            lambda tx, session: self.sessions.create(tx, request, session),
        )

    async def RenameSession(
        self, request: sessions_pb2.RenameSessionRequest, context: Context
    ) -> sessions_pb2.RenameSessionResponse:
        """Rename a session."""
        return await self.commands.run(request, sessions_pb2.RenameSessionResponse, self.sessions.rename, request)

    async def CloseSession(
        self, request: sessions_pb2.CloseSessionRequest, context: Context
    ) -> sessions_pb2.CloseSessionResponse:
        """Close a session and have its agent stopped."""
        return await self.commands.run(request, sessions_pb2.CloseSessionResponse, self.sessions.close, request)

    async def ReopenSession(
        self, request: sessions_pb2.ReopenSessionRequest, context: Context
    ) -> sessions_pb2.ReopenSessionResponse:
        """Open a closed session again."""
        return await self.commands.run(request, sessions_pb2.ReopenSessionResponse, self.sessions.reopen, request)

    async def SendMessage(
        self, request: sessions_pb2.SendMessageRequest, context: Context
    ) -> sessions_pb2.SendMessageResponse:
        """Send a message, or queue it."""
        return await self.commands.run(request, sessions_pb2.SendMessageResponse, self.sessions.send, request)

    async def CancelTurn(
        self, request: sessions_pb2.CancelTurnRequest, context: Context
    ) -> sessions_pb2.CancelTurnResponse:
        """Have the agent asked to stop."""
        return await self.commands.run(request, sessions_pb2.CancelTurnResponse, self.sessions.cancel, request)

    async def AnswerPermission(
        self, request: sessions_pb2.AnswerPermissionRequest, context: Context
    ) -> sessions_pb2.AnswerPermissionResponse:
        """Have the agent given an answer; the first one wins."""
        return await self.commands.run(request, sessions_pb2.AnswerPermissionResponse, self.sessions.answer, request)
