"""The public commands and reads that repository owns, as the gateway forwards them."""

from dataclasses import dataclass
from typing import Any

import grpc
from branchline.gateway.v1 import (
    repositories_pb2,
    repositories_pb2_grpc,
    sessions_pb2,
    sessions_pb2_grpc,
    tasks_pb2,
    tasks_pb2_grpc,
)
from branchline.resource.v1 import session_pb2, task_pb2
from branchline.resource.v1.history_pb2 import ACTOR_KIND_USER, HistoryEvent
from branchline.resource.v1.repository_pb2 import Repository
from branchline.resource.v1.session_pb2 import Session, SessionSummary
from branchline.resource.v1.task_pb2 import Task
from branchline.task.v1.task_pb2 import CreateTaskRequest, GitIdentity

from services.repository.naming import check_branch, derive_branch, derive_title, unique_branch
from services.repository.overview import overview
from services.repository.push import TO_TASK
from services.repository.store import RepositoryStore
from services.runtime.database import Transaction
from services.runtime.errors import AlreadyExists, InvalidArgument, NotFound
from services.runtime.principal import Principal, current_principal
from services.runtime.service import Chassis
from services.runtime.spine.outbox import Mark
from services.runtime.spine.tokens import consistency_token, page_token, parse_consistency_token, parse_page_token

Context = grpc.aio.ServicerContext[Any, Any]

CHILD_SECONDS = 2.0
"""Time that a creation waits for its child, so that the next command finds it. The child is made in any case."""


@dataclass(frozen=True, slots=True)
class _Public:
    chassis: Chassis
    store: RepositoryStore

    async def caught_up(self, token: str, context: Context) -> None:
        """Wait until the index is as new as the token."""
        if token:
            await self.store.index.await_point(parse_consistency_token(token), context.time_remaining())


class PublicTaskServicer(_Public, tasks_pb2_grpc.TaskServiceServicer):
    """Creation of tasks, and the workbench of one."""

    async def CreateTask(self, request: tasks_pb2.CreateTaskRequest, context: Context) -> tasks_pb2.CreateTaskResponse:
        """Reserve the branch, show the task at once, and have the child created."""
        if request.branch:
            check_branch(request.branch)
        principal = current_principal()
        async with self.chassis.database.transaction() as tx:
            answer = await self.chassis.requests.recall(tx, request, tasks_pb2.CreateTaskResponse)
            if answer is not None:
                return answer
            repository = await self.store.repository(tx, request.repository_id, principal)
            title = request.title or derive_title(request.text)
            branch = await self._branch(tx, request, title, repository)
            task, session = self._newborn(request, principal, repository, title, branch)
            pull_request = (await self.store.pull_requests(tx, repository.id)).get(branch)
            if pull_request is not None:
                task.pull_request.CopyFrom(pull_request)
            await self._create(tx, task, session, repository, request.hold_prompt, principal)
            token = consistency_token([("task", task.id, task.revision)])
            answer = tasks_pb2.CreateTaskResponse(task=task, consistency_token=token)
            await self.chassis.requests.remember(tx, request, answer)
        await self.chassis.outbox.await_delivery(TO_TASK, task.id, CHILD_SECONDS)
        return answer

    async def _branch(
        self, tx: Transaction, request: tasks_pb2.CreateTaskRequest, title: str, repository: Repository
    ) -> str:
        holders = await self.store.branch_holders(tx, repository.id)
        if not request.branch:
            taken = holders.keys() | await self.store.known_branches(tx, repository.id)
            return unique_branch(derive_branch(title), taken)
        holder = holders.get(request.branch)
        if holder is not None:
            words = f'the branch "{request.branch}" belongs to task {holder}'
            raise AlreadyExists("task", holder, words, "BRANCH_TAKEN", task_id=holder, branch=request.branch)
        return request.branch

    def _newborn(
        self,
        request: tasks_pb2.CreateTaskRequest,
        principal: Principal,
        repository: Repository,
        title: str,
        branch: str,
    ) -> tuple[Task, Session]:
        agent = request.agent or principal.default_agent
        if not agent:
            raise InvalidArgument("agent", "is needed: neither the user nor the organization has a default")
        clock = self.chassis.clock
        now = clock.timestamp()
        task_id = clock.new_id("task")
        session = Session(
            id=clock.new_id("ses"),
            task_id=task_id,
            name="Session 1",
            agent=agent,
            model=request.model or principal.default_model,
            status=session_pb2.SESSION_STATUS_PENDING,
            status_time=now,
            create_time=now,
            revision=1,
        )
        brief = SessionSummary(id=session.id, name=session.name, status=session.status, agent=agent)
        task = Task(
            id=task_id,
            organization_id=repository.organization_id,
            repository_id=repository.id,
            title=title,
            text=request.text,
            branch=branch,
            status=task_pb2.TASK_STATUS_PENDING,
            status_time=now,
            owner_user_id=principal.user_id,
            sessions=[brief],
            sandbox_provider=request.sandbox_provider or principal.default_sandbox_provider or "local",
            create_time=now,
            update_time=now,
            revision=1,
        )
        return task, session

    async def _create(
        self,
        tx: Transaction,
        task: Task,
        session: Session,
        repository: Repository,
        hold_prompt: bool,
        principal: Principal,
    ) -> None:
        await self.store.put_tasks(tx, [task])
        await self.store.put_session(tx, session)
        event = HistoryEvent(
            id=self.chassis.clock.new_id("evt"),
            organization_id=task.organization_id,
            event_time=task.create_time,
            actor_kind=ACTOR_KIND_USER,
            actor_user_id=principal.user_id,
            kind="task.created",
            repository_id=task.repository_id,
            task_id=task.id,
            branch=task.branch,
            session_id=session.id,
            summary=task.title,
        )
        create = CreateTaskRequest(
            task=task,
            session=session,
            repository=repository,
            identity=GitIdentity(name=principal.display_name, email=principal.email),
            hold_prompt=hold_prompt,
        )
        marks = [Mark(task.id, task.revision, task), Mark(event.id, 1, event), Mark(task.id, 1, create, TO_TASK)]
        await self.chassis.outbox.mark(tx, marks)
        await self.store.touch(tx, repository.id)

    async def GetTask(self, request: tasks_pb2.GetTaskRequest, context: Context) -> tasks_pb2.GetTaskResponse:
        """Read one task's workbench."""
        await self.caught_up(request.consistency_token, context)
        async with self.chassis.database.read() as connection:
            task = await self.store.task(connection, request.task_id, current_principal())
            return tasks_pb2.GetTaskResponse(
                task=task,
                sessions=await self.store.sessions(connection, task.id),
                sandboxes=await self.store.sandboxes(connection, task.id),
            )


class PublicSessionReader(_Public, sessions_pb2_grpc.SessionServiceServicer):
    """Transcripts."""

    async def ListTranscript(
        self, request: sessions_pb2.ListTranscriptRequest, context: Context
    ) -> sessions_pb2.ListTranscriptResponse:
        """Read a page of a transcript."""
        await self.caught_up(request.consistency_token, context)
        page_size = request.page_size or 100
        cursor = parse_page_token(request.page_token) or "0"
        if not cursor.isdecimal():
            raise InvalidArgument("page_token", "is not one of ours", "PAGE_TOKEN_INVALID")
        async with self.chassis.database.read() as connection:
            task = await self.store.task(connection, request.task_id, current_principal())
            sessions = await self.store.sessions(connection, task.id)
            if all(session.id != request.session_id for session in sessions):
                raise NotFound("session", request.session_id)
            found = await self.store.transcript(connection, request.session_id, int(cursor), page_size + 1)
        following = page_token(str(found[page_size - 1].position)) if len(found) > page_size else ""
        return sessions_pb2.ListTranscriptResponse(entries=found[:page_size], next_page_token=following)


class PublicRepositoryReader(_Public, repositories_pb2_grpc.RepositoryServiceServicer):
    """The overview of branches."""

    async def GetRepositoryOverview(
        self, request: repositories_pb2.GetRepositoryOverviewRequest, context: Context
    ) -> repositories_pb2.GetRepositoryOverviewResponse:
        """List branches with their tasks and pull requests."""
        await self.caught_up(request.consistency_token, context)
        async with self.chassis.database.read() as connection:
            repository = await self.store.repository(connection, request.repository_id, current_principal())
            branches, pulls = await self.store.cached(connection, repository.id)
            holders = await self.store.branch_holders(connection, repository.id)
        return repositories_pb2.GetRepositoryOverviewResponse(branches=overview(repository, branches, pulls, holders))
