"""The public commands that task owns, as the gateway forwards them."""

from dataclasses import dataclass

from branchline.v1 import sessions_pb2, sessions_pb2_grpc, tasks_pb2, tasks_pb2_grpc

from services.runtime.database import Tx
from services.runtime.errors import InvalidArgument
from services.runtime.principal import current_principal
from services.runtime.prompts import blob_ids, check_prompt
from services.runtime.serving import Context
from services.runtime.spine.commands import Commands
from services.runtime.updates import TASK_SETTABLE, check_etag, etag_of, update
from services.task.lifecycle import Lifecycle
from services.task.machine import Machine
from services.task.sessions import Sessions
from services.task.standing import ARCHIVING, KILLING
from services.task.store import TaskStore


@dataclass(frozen=True, slots=True)
class PublicTaskServicer(tasks_pb2_grpc.TaskServiceServicer):
    """A task's title, its provisioning again, and its two ends."""

    commands: Commands
    store: TaskStore
    lifecycle: Lifecycle

    async def UpdateTask(self, request: tasks_pb2.UpdateTaskRequest, context: Context) -> tasks_pb2.UpdateTaskResponse:
        """Change a task's title."""
        return await self.commands.run(request, tasks_pb2.UpdateTaskResponse, self._update, request)

    def _update(self, tx: Tx, request: tasks_pb2.UpdateTaskRequest) -> tasks_pb2.UpdateTaskResponse:
        given = request.task
        with self.store.open_for(tx, given.id, current_principal()) as task:
            held = task.task
            check_etag(held, given)
            if update(held, given, request.update_mask, TASK_SETTABLE, "task"):
                if not held.title.strip():
                    raise InvalidArgument("task.title", "must hold more than white space")
                held.etag = etag_of(held, TASK_SETTABLE)
                task.change()
        return tasks_pb2.UpdateTaskResponse(task=task.task, consistency_token=task.token())

    async def RetryProvisioning(
        self, request: tasks_pb2.RetryProvisioningRequest, context: Context
    ) -> tasks_pb2.RetryProvisioningResponse:
        """Provision a task that failed again, in its sandbox if that lives, else in a new one."""
        return await self.commands.run(request, tasks_pb2.RetryProvisioningResponse, self._retry, request)

    def _retry(self, tx: Tx, request: tasks_pb2.RetryProvisioningRequest) -> tasks_pb2.RetryProvisioningResponse:
        with self.store.open_for(tx, request.task_id, current_principal()) as task:
            self.lifecycle.retry(tx, task, request.session)
        return tasks_pb2.RetryProvisioningResponse(task=task.task, consistency_token=task.token())

    async def ArchiveTask(
        self, request: tasks_pb2.ArchiveTaskRequest, context: Context
    ) -> tasks_pb2.ArchiveTaskResponse:
        """Release the sandbox and put the task away."""
        return await self.commands.run(request, tasks_pb2.ArchiveTaskResponse, self._archive, request)

    def _archive(self, tx: Tx, request: tasks_pb2.ArchiveTaskRequest) -> tasks_pb2.ArchiveTaskResponse:
        with self.store.open_for(tx, request.task_id, current_principal()) as task:
            self.lifecycle.end(tx, task, ARCHIVING)
        return tasks_pb2.ArchiveTaskResponse(task=task.task, consistency_token=task.token())

    async def KillTask(self, request: tasks_pb2.KillTaskRequest, context: Context) -> tasks_pb2.KillTaskResponse:
        """Destroy the sandbox and end the task."""
        return await self.commands.run(request, tasks_pb2.KillTaskResponse, self._kill, request)

    def _kill(self, tx: Tx, request: tasks_pb2.KillTaskRequest) -> tasks_pb2.KillTaskResponse:
        with self.store.open_for(tx, request.task_id, current_principal()) as task:
            self.lifecycle.end(tx, task, KILLING)
        return tasks_pb2.KillTaskResponse(task=task.task, consistency_token=task.token())


@dataclass(frozen=True, slots=True)
class PublicSessionServicer(sessions_pb2_grpc.SessionServiceServicer):
    """Sessions, what is said to them, and what their agents are answered."""

    commands: Commands
    sessions: Sessions
    machine: Machine

    async def CreateSession(
        self, request: sessions_pb2.CreateSessionRequest, context: Context
    ) -> sessions_pb2.CreateSessionResponse:
        """Record a session; its agent starts behind it."""
        return await self.commands.run(request, sessions_pb2.CreateSessionResponse, self.sessions.create, request)

    async def UpdateSession(
        self, request: sessions_pb2.UpdateSessionRequest, context: Context
    ) -> sessions_pb2.UpdateSessionResponse:
        """Rename a session."""
        return await self.commands.run(request, sessions_pb2.UpdateSessionResponse, self.sessions.update, request)

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
        """Send a message, or let it wait."""
        check_prompt(request.prompt, "prompt")
        answer, ids = sessions_pb2.SendMessageResponse, blob_ids(request.prompt)
        if not ids:
            return await self.commands.run(request, answer, self.sessions.send, request)
        return await self.commands.once(
            request,
            answer,
            lambda: self.machine.claim(request.task_id, ids),
            lambda tx, blobs: self.sessions.send(tx, request, blobs),
        )

    async def RetryTurn(
        self, request: sessions_pb2.RetryTurnRequest, context: Context
    ) -> sessions_pb2.RetryTurnResponse:
        """Give the agent the prompt of its last turn again."""
        return await self.commands.run(request, sessions_pb2.RetryTurnResponse, self.sessions.retry, request)

    async def CancelTurn(
        self, request: sessions_pb2.CancelTurnRequest, context: Context
    ) -> sessions_pb2.CancelTurnResponse:
        """Have the agent asked to stop."""
        return await self.commands.run(request, sessions_pb2.CancelTurnResponse, self.sessions.cancel, request)

    async def UpdateQueuedMessage(
        self, request: sessions_pb2.UpdateQueuedMessageRequest, context: Context
    ) -> sessions_pb2.UpdateQueuedMessageResponse:
        """Change a message that waits."""
        given, answer = request.queued_message, sessions_pb2.UpdateQueuedMessageResponse
        ids = blob_ids(given.prompt)
        if not ids:
            return await self.commands.run(request, answer, self.sessions.change_queued, request)
        return await self.commands.once(
            request,
            answer,
            lambda: self.machine.claim(given.task_id, ids),
            lambda tx, blobs: self.sessions.change_queued(tx, request, blobs),
        )

    async def DeleteQueuedMessage(
        self, request: sessions_pb2.DeleteQueuedMessageRequest, context: Context
    ) -> sessions_pb2.DeleteQueuedMessageResponse:
        """Take back a message that waits."""
        work = self.sessions.delete_queued
        return await self.commands.run(request, sessions_pb2.DeleteQueuedMessageResponse, work, request)

    async def AnswerInputRequest(
        self, request: sessions_pb2.AnswerInputRequestRequest, context: Context
    ) -> sessions_pb2.AnswerInputRequestResponse:
        """Have the agent given an answer; the first one wins."""
        return await self.commands.run(request, sessions_pb2.AnswerInputRequestResponse, self.sessions.answer, request)
