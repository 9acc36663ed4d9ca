"""The creation of a task: its branch is reserved, it is shown at once, and its owner is told to make it."""

from dataclasses import dataclass

from branchline.v1 import sessions_pb2, tasks_pb2
from branchline.v1 import vocabulary_pb2 as words
from branchline.v1.history_pb2 import ACTOR_KIND_USER, HistoryEvent
from branchline.v1.repositories_pb2 import Repository
from branchline.v1.sessions_pb2 import Session, SessionSummary
from branchline.v1.tasks_pb2 import Task
from branchline_internal.task.v1.task_pb2 import CreateTaskRequest, GitIdentity

from services.repository.downward import TO_TASK
from services.repository.naming import derive_branch, derive_title, unique_branch
from services.repository.store import RepositoryStore
from services.repository.summary import summary_of
from services.repository.workbench import Workbench
from services.runtime.clock import Clock
from services.runtime.database import Reader, Tx
from services.runtime.errors import AlreadyExists, FailedPrecondition, InvalidArgument
from services.runtime.principal import Principal, current_principal
from services.runtime.spine.outbox import Mark, Outbox
from services.runtime.spine.tokens import consistency_token


@dataclass(frozen=True, slots=True)
class Creation:
    """Creates tasks."""

    outbox: Outbox
    clock: Clock
    store: RepositoryStore
    workbench: Workbench

    def create(self, tx: Tx, request: tasks_pb2.CreateTaskRequest, task_id: str) -> tasks_pb2.CreateTaskResponse:
        """Create a task under the given id."""
        principal = current_principal()
        self.store.lock(tx, [request.repository_id])
        repository = self.store.visible(tx, request.repository_id, principal)
        if repository.HasField("delete_time"):
            sentence = f"the repository {repository.full_name} is being deleted"
            raise FailedPrecondition(words.ERROR_REASON_BEING_DELETED, sentence)
        title = request.title or derive_title(request.text)
        branch = self._branch(tx, request, title, repository)
        session = self._session(request, principal, task_id)
        task = self._task(request, principal, repository, title, branch, session)
        pull_request = self.store.pull_requests(tx, repository.id).get(branch)
        if pull_request is not None:
            task.pull_request.CopyFrom(pull_request)
        self.workbench.add(tx, task, session)
        self.store.touch(tx, [repository.id])
        event = self._event(task, session)
        create = CreateTaskRequest(
            task=task,
            session=session,
            repository=repository,
            identity=GitIdentity(name=principal.display_name, email=principal.email),
            hold_prompt=request.hold_prompt,
            derived_branch=not request.branch,
        )
        summary = Mark(task.id, task.revision, summary_of(task))
        self.outbox.mark(tx, [summary, Mark(event.id, 1, event), Mark(task.id, 1, create, TO_TASK)])
        token = consistency_token([(words.ENTITY_KIND_TASK, task.id, task.revision)])
        return tasks_pb2.CreateTaskResponse(task=task, consistency_token=token)

    def _branch(self, tx: Reader, request: tasks_pb2.CreateTaskRequest, title: str, repository: Repository) -> str:
        holders = self.store.branch_holders(tx, repository.id)
        if not request.branch:
            return unique_branch(derive_branch(title), holders.keys() | self.store.known_branches(tx, repository.id))
        holder = holders.get(request.branch)
        if holder is not None:
            raise AlreadyExists(
                words.ENTITY_KIND_TASK,
                holder,
                f'the branch "{request.branch}" belongs to task {holder}',
                words.ERROR_REASON_BRANCH_TAKEN,
                task_id=holder,
                branch=request.branch,
            )
        return request.branch

    def _session(self, request: tasks_pb2.CreateTaskRequest, principal: Principal, task_id: str) -> Session:
        agent = request.agent or principal.default_agent
        if not agent:
            raise InvalidArgument("agent", "is needed: neither the user nor the organization has a default")
        now = self.clock.timestamp()
        return Session(
            id=self.clock.new_id("ses"),
            task_id=task_id,
            name="Session 1",
            agent=agent,
            model=request.model or principal.default_model,
            status=sessions_pb2.SESSION_STATUS_PENDING,
            status_time=now,
            create_time=now,
            revision=1,
        )

    def _task(
        self,
        request: tasks_pb2.CreateTaskRequest,
        principal: Principal,
        repository: Repository,
        title: str,
        branch: str,
        session: Session,
    ) -> Task:
        now = session.create_time
        return Task(
            id=session.task_id,
            organization_id=repository.organization_id,
            repository_id=repository.id,
            title=title,
            text=request.text,
            branch=branch,
            status=tasks_pb2.TASK_STATUS_PENDING,
            status_time=now,
            owner_user_id=principal.user_id,
            sessions=[SessionSummary(id=session.id, name=session.name, status=session.status, agent=session.agent)],
            sandbox_provider=request.sandbox_provider or principal.default_sandbox_provider or "local",
            create_time=now,
            update_time=now,
            revision=1,
        )

    def _event(self, task: Task, session: Session) -> HistoryEvent:
        return HistoryEvent(
            id=self.clock.new_id("evt"),
            organization_id=task.organization_id,
            event_time=task.create_time,
            actor_kind=ACTOR_KIND_USER,
            actor_user_id=task.owner_user_id,
            kind=words.EVENT_KIND_TASK_CREATED,
            repository_id=task.repository_id,
            task_id=task.id,
            branch=task.branch,
            session_id=session.id,
            summary=task.title,
        )
