"""The public commands and reads that repository owns, as the gateway forwards them."""

from dataclasses import dataclass

from branchline.v1 import (
    repositories_pb2,
    repositories_pb2_grpc,
    sessions_pb2,
    sessions_pb2_grpc,
    tasks_pb2,
    tasks_pb2_grpc,
)

from services.repository.creation import Creation
from services.repository.downward import TO_TASK
from services.repository.overview import overview
from services.repository.store import RepositoryStore
from services.repository.workbench import Workbench
from services.runtime.branches import check_branch
from services.runtime.clock import Clock
from services.runtime.database import Database, Reader
from services.runtime.principal import current_principal
from services.runtime.serving import Context
from services.runtime.spine.commands import Commands
from services.runtime.spine.index import Index
from services.runtime.spine.outbox import Outbox
from services.runtime.spine.tokens import parse_consistency_token, parse_page_token

CHILD_SECONDS = 2.0
"""Time that a creation waits for its child, so that the next command finds it. The child is made in any case."""

_PAGE_ENTRIES = 100


@dataclass(frozen=True, slots=True)
class Reads:
    """What is read, once it is new enough."""

    database: Database
    index: Index
    store: RepositoryStore
    workbench: Workbench

    async def caught_up(self, token: str, context: Context) -> None:
        """Wait until the index is as new as the token."""
        if token:
            principal, point = current_principal(), parse_consistency_token(token)
            remaining = context.time_remaining()
            await self.index.await_point(point, principal.organization_id, principal.user_id, remaining)

    def task(self, tx: Reader, task_id: str) -> tasks_pb2.GetTaskResponse:
        """Return one task's workbench."""
        return tasks_pb2.GetTaskResponse(
            task=self.workbench.task(tx, task_id, current_principal()),
            sessions=self.workbench.sessions(tx, task_id),
            sandboxes=self.workbench.sandboxes(tx, task_id),
        )

    def transcript(
        self, tx: Reader, request: sessions_pb2.ListTranscriptRequest, after_position: int
    ) -> sessions_pb2.ListTranscriptResponse:
        """Return a page of a transcript."""
        self.workbench.task(tx, request.task_id, current_principal())
        most = request.page_size or _PAGE_ENTRIES
        page = self.workbench.transcript(tx, request.task_id, request.session_id, after_position, most)
        return sessions_pb2.ListTranscriptResponse(entries=page.found, next_page_token=page.next_token(request))

    def overview(self, tx: Reader, repository_id: str) -> repositories_pb2.GetRepositoryOverviewResponse:
        """Return a repository's branches with their tasks and pull requests."""
        repository = self.store.visible(tx, repository_id, current_principal())
        lines = overview(
            repository,
            self.store.branches(tx, repository_id),
            self.store.pull_requests(tx, repository_id).values(),
            self.store.branch_holders(tx, repository_id),
        )
        return repositories_pb2.GetRepositoryOverviewResponse(branches=lines)


@dataclass(frozen=True, slots=True)
class PublicTaskServicer(tasks_pb2_grpc.TaskServiceServicer):
    """Creation of tasks, and the workbench of one."""

    reads: Reads
    commands: Commands
    outbox: Outbox
    clock: Clock
    creation: Creation

    async def CreateTask(self, request: tasks_pb2.CreateTaskRequest, context: Context) -> tasks_pb2.CreateTaskResponse:
        """Reserve the branch, show the task at once, and have the child created."""
        if request.branch:
            check_branch(request.branch)
        task_id = self.clock.new_id("task")
        answer = await self.commands.run(request, tasks_pb2.CreateTaskResponse, self.creation.create, request, task_id)
        if answer.task.id == task_id:  # else it is the first answer to a request that was repeated
            await self.outbox.await_delivery(TO_TASK, task_id, CHILD_SECONDS)
        return answer

    async def GetTask(self, request: tasks_pb2.GetTaskRequest, context: Context) -> tasks_pb2.GetTaskResponse:
        """Read one task's workbench."""
        await self.reads.caught_up(request.consistency_token, context)
        return await self.reads.database.read(self.reads.task, request.task_id)


@dataclass(frozen=True, slots=True)
class PublicSessionReader(sessions_pb2_grpc.SessionServiceServicer):
    """Transcripts."""

    reads: Reads

    async def ListTranscript(
        self, request: sessions_pb2.ListTranscriptRequest, context: Context
    ) -> sessions_pb2.ListTranscriptResponse:
        """Read a page of a transcript."""
        (after_position,) = parse_page_token(request, request.page_token, int) or [0]
        await self.reads.caught_up(request.consistency_token, context)
        return await self.reads.database.read(self.reads.transcript, request, int(after_position))


@dataclass(frozen=True, slots=True)
class PublicRepositoryReader(repositories_pb2_grpc.RepositoryServiceServicer):
    """The overview of branches."""

    reads: Reads

    async def GetRepositoryOverview(
        self, request: repositories_pb2.GetRepositoryOverviewRequest, context: Context
    ) -> repositories_pb2.GetRepositoryOverviewResponse:
        """List branches with their tasks and pull requests."""
        await self.reads.caught_up(request.consistency_token, context)
        return await self.reads.database.read(self.reads.overview, request.repository_id)
