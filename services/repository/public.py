"""The public commands and reads that repository owns, as the gateway forwards them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import grpc
from branchline.v1 import (
    processes_pb2,
    processes_pb2_grpc,
    repositories_pb2,
    repositories_pb2_grpc,
    sessions_pb2,
    sessions_pb2_grpc,
    tasks_pb2,
    tasks_pb2_grpc,
)
from branchline.v1.common_pb2 import Consistency
from branchline.v1.repositories_pb2 import Branch
from branchline.v1.tasks_pb2 import SandboxOptions
from branchline_internal.organization.v1.organization_pb2 import CheckOptionsRequest, ClaimBlobsRequest
from branchline_internal.organization.v1.organization_pb2_grpc import OrganizationServiceStub
from google.protobuf.message import Message

from services.repository.creation import Creation, New
from services.repository.downward import TO_TASK
from services.repository.overview import overview, place
from services.repository.store import RepositoryStore
from services.repository.workbench import LAST, TRANSCRIPT_ORDERS, Workbench
from services.runtime.branches import check_branch
from services.runtime.database import Database, Reader
from services.runtime.errors import reason_of
from services.runtime.logging import get_logger
from services.runtime.principal import current_principal
from services.runtime.prompts import blob_ids
from services.runtime.serving import Context
from services.runtime.spine.chunks import parts
from services.runtime.spine.commands import Commands
from services.runtime.spine.index import Index
from services.runtime.spine.outbox import Outbox
from services.runtime.spine.pages import Page, order, page_size
from services.runtime.spine.tokens import page_token, parse_consistency, parse_page_token

log = get_logger(__name__)

CHILD_SECONDS = 2.0
"""Time that a creation waits for its child, so that the next command finds it. The child is made in any case."""

CHECK_SECONDS = 5.0
"""How long the organization may take to say whether agent and provider are known. What it cannot say shows later."""

CLAIM_SECONDS = 5.0
"""How long the organization may take to name blobs, without which no task is made."""

_LAST_POSITION = 2**31

R = TypeVar("R", bound=Message)


@dataclass(frozen=True, slots=True)
class Reads:
    """What is read, once it is new enough."""

    database: Database
    index: Index
    store: RepositoryStore
    workbench: Workbench

    async def caught_up(self, consistency: Consistency, context: Context) -> None:
        """Wait until the index is as new as is asked."""
        if consistency.at_least_as_fresh:
            principal, fresh = current_principal(), parse_consistency(consistency)
            remaining = context.time_remaining()
            of = principal.organization_id, principal.user_id
            await self.index.await_point(fresh.point, *of, remaining, fresh.wait_seconds)

    async def of_task(self, request: "_OfTask", context: Context, read: Callable[[Reader], R]) -> R:
        """Read something of a task that the caller may see."""

        def checked(tx: Reader) -> R:
            self.workbench.task(tx, request.task_id, current_principal())
            return read(tx)

        await self.caught_up(request.consistency, context)
        return await self.database.read(checked)

    def branches(
        self, tx: Reader, request: repositories_pb2.ListBranchesRequest, after: tuple[int, int, str]
    ) -> repositories_pb2.ListBranchesResponse:
        """Return a page of a repository's branches with their tasks and pull requests."""
        repository = self.store.visible(tx, request.repository_id, current_principal())
        lines = overview(
            repository,
            self.store.branches(tx, repository.id),
            self.store.pull_requests(tx, repository.id).values(),
            self.store.branch_holders(tx, repository.id),
        )
        most = page_size(request.page_size)
        rest = [branch for branch in lines if place(branch) > after]
        found = next(parts(rest, Branch.ByteSize, most), list[Branch]())
        more = page_token(request, place(found[-1])) if len(found) < len(rest) else ""
        return repositories_pb2.ListBranchesResponse(branches=found, next_page_token=more)


class _OfTask(Protocol):
    """A read of a task."""

    @property
    def task_id(self) -> str:
        """The task."""
        ...

    @property
    def consistency(self) -> Consistency:
        """How fresh the answer must be."""
        ...


@dataclass(frozen=True, slots=True)
class PublicTaskServicer(tasks_pb2_grpc.TaskServiceServicer):
    """Creation of tasks, and the workbench of one."""

    reads: Reads
    commands: Commands
    outbox: Outbox
    creation: Creation
    organization: OrganizationServiceStub

    async def CreateTask(self, request: tasks_pb2.CreateTaskRequest, context: Context) -> tasks_pb2.CreateTaskResponse:
        """Reserve the branch, show the task at once, and have the child created."""
        for field in ("new_branch", "existing_branch"):
            if request.branch.HasField(field):
                check_branch(getattr(request.branch, field), f"branch.{field}")
        if request.branch.base:
            check_branch(request.branch.base, "branch.base")
        new = self.creation.prepare(request)

        async def outside() -> New:
            await self._check_options(new)
            return await self._claimed(request, new)

        if request.validate_only:
            return await self.reads.database.read(self.creation.check, request, await outside())
        answer = await self.commands.once(
            request, tasks_pb2.CreateTaskResponse, outside, lambda tx, made: self.creation.create(tx, request, made)
        )
        if answer.task.id == new.task_id:  # else it is the first answer to a request that was repeated
            await self.outbox.await_delivery(TO_TASK, new.task_id, CHILD_SECONDS)
        return answer

    async def _check_options(self, new: New) -> None:
        """Raise as the organization does where it knows that agent, model, mode or provider are none."""
        asked = CheckOptionsRequest(
            organization_id=current_principal().organization_id,
            session=new.session,
            sandbox=SandboxOptions(provider=new.provider),
        )
        try:
            await self.organization.CheckOptions(asked, timeout=CHECK_SECONDS)
        except grpc.aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.INVALID_ARGUMENT:
                raise
            log.info("options of a task not checked", reason=reason_of(error))

    async def _claimed(self, request: tasks_pb2.CreateTaskRequest, new: New) -> New:
        """Name the blobs of the prompt on the task's behalf, so that they are kept, unless it is only a question."""
        ids = blob_ids(request.prompt)
        if not ids:
            return new
        claim = ClaimBlobsRequest(
            organization_id=current_principal().organization_id,
            task_id=new.task_id,
            blob_ids=ids,
            validate_only=request.validate_only,
        )
        answer = await self.organization.ClaimBlobs(claim, timeout=CLAIM_SECONDS)
        return New(new.task_id, new.session, new.provider, tuple(answer.blobs))

    async def GetTask(self, request: tasks_pb2.GetTaskRequest, context: Context) -> tasks_pb2.GetTaskResponse:
        """Read one task."""
        await self.reads.caught_up(request.consistency, context)
        principal = current_principal()
        task = await self.reads.database.read(self.reads.workbench.task, request.task_id, principal)
        return tasks_pb2.GetTaskResponse(task=task)

    async def ListSandboxes(
        self, request: tasks_pb2.ListSandboxesRequest, context: Context
    ) -> tasks_pb2.ListSandboxesResponse:
        """List a task's sandboxes."""
        (after,) = parse_page_token(request, request.page_token, str) or [""]
        most = page_size(request.page_size)

        def read(tx: Reader) -> tasks_pb2.ListSandboxesResponse:
            page = self.reads.workbench.sandboxes(tx, request.task_id, str(after), most)
            return tasks_pb2.ListSandboxesResponse(sandboxes=page.found, next_page_token=page.next_token(request))

        return await self.reads.of_task(request, context, read)


@dataclass(frozen=True, slots=True)
class PublicSessionReader(sessions_pb2_grpc.SessionServiceServicer):
    """Sessions, their transcripts, and what waits for them."""

    reads: Reads

    async def ListSessions(
        self, request: sessions_pb2.ListSessionsRequest, context: Context
    ) -> sessions_pb2.ListSessionsResponse:
        """List a task's sessions."""
        (after,) = parse_page_token(request, request.page_token, str) or [""]
        most = page_size(request.page_size)

        def read(tx: Reader) -> sessions_pb2.ListSessionsResponse:
            page = self.reads.workbench.sessions(tx, request.task_id, str(after), most)
            return sessions_pb2.ListSessionsResponse(sessions=page.found, next_page_token=page.next_token(request))

        return await self.reads.of_task(request, context, read)

    async def ListQueuedMessages(
        self, request: sessions_pb2.ListQueuedMessagesRequest, context: Context
    ) -> sessions_pb2.ListQueuedMessagesResponse:
        """List the messages of a task that wait."""
        place, after = parse_page_token(request, request.page_token, int, str) or [0, ""]
        most = page_size(request.page_size)

        def read(tx: Reader) -> sessions_pb2.ListQueuedMessagesResponse:
            page = self.reads.workbench.queued_messages(tx, request.task_id, (int(place), str(after)), most)
            return sessions_pb2.ListQueuedMessagesResponse(
                queued_messages=page.found, next_page_token=page.next_token(request)
            )

        return await self.reads.of_task(request, context, read)

    async def ListTranscriptEntries(
        self, request: sessions_pb2.ListTranscriptEntriesRequest, context: Context
    ) -> sessions_pb2.ListTranscriptEntriesResponse:
        """Read a page of a transcript."""
        statement = order(request.order_by, TRANSCRIPT_ORDERS, "position")
        newest_first = statement is TRANSCRIPT_ORDERS["position desc"]
        (after,) = parse_page_token(request, request.page_token, int) or [_LAST_POSITION if newest_first else 0]
        most = page_size(request.page_size)

        def read(tx: Reader) -> sessions_pb2.ListTranscriptEntriesResponse:
            of = request.task_id, request.session_id
            page: Page[Any] = self.reads.workbench.transcript(tx, *of, statement, int(after), most)
            return sessions_pb2.ListTranscriptEntriesResponse(
                entries=page.found, next_page_token=page.next_token(request)
            )

        return await self.reads.of_task(request, context, read)


@dataclass(frozen=True, slots=True)
class PublicProcessReader(processes_pb2_grpc.ProcessServiceServicer):
    """What is known of processes."""

    reads: Reads

    async def GetProcess(
        self, request: processes_pb2.GetProcessRequest, context: Context
    ) -> processes_pb2.GetProcessResponse:
        """Read one process."""

        def read(tx: Reader) -> processes_pb2.GetProcessResponse:
            process = self.reads.workbench.process(tx, request.task_id, request.process_id)
            return processes_pb2.GetProcessResponse(process=process)

        return await self.reads.of_task(request, context, read)

    async def ListProcesses(
        self, request: processes_pb2.ListProcessesRequest, context: Context
    ) -> processes_pb2.ListProcessesResponse:
        """List a task's processes."""
        (before,) = parse_page_token(request, request.page_token, str) or [LAST]
        most = page_size(request.page_size)

        def read(tx: Reader) -> processes_pb2.ListProcessesResponse:
            page = self.reads.workbench.processes(tx, request.task_id, str(before), most)
            return processes_pb2.ListProcessesResponse(processes=page.found, next_page_token=page.next_token(request))

        return await self.reads.of_task(request, context, read)


@dataclass(frozen=True, slots=True)
class PublicRepositoryReader(repositories_pb2_grpc.RepositoryServiceServicer):
    """The branches."""

    reads: Reads

    async def ListBranches(
        self, request: repositories_pb2.ListBranchesRequest, context: Context
    ) -> repositories_pb2.ListBranchesResponse:
        """List branches with their tasks and pull requests."""
        default, task, name = parse_page_token(request, request.page_token, int, int, str) or [-1, 0, ""]
        await self.reads.caught_up(request.consistency, context)
        return await self.reads.database.read(self.reads.branches, request, (int(default), int(task), str(name)))
