"""The creation of a task: its branch is reserved, it is shown at once, and its owner is told to make it."""

from dataclasses import dataclass

from branchline.v1 import common_pb2, errors_pb2, history_pb2, sessions_pb2, tasks_pb2
from branchline.v1.common_pb2 import BlobReference, Prompt
from branchline.v1.history_pb2 import HistoryEvent
from branchline.v1.repositories_pb2 import Repository
from branchline.v1.sessions_pb2 import Session, SessionOptions, SessionSummary
from branchline.v1.tasks_pb2 import BranchChoice, Task
from branchline_internal.task.v1.task_pb2 import CreateTaskRequest, GitIdentity

from services.repository.downward import TO_TASK
from services.repository.naming import derive_branch, derive_title, unique_branch
from services.repository.store import RepositoryStore
from services.repository.summary import summary_of
from services.repository.workbench import Workbench
from services.runtime.actors import current_actor
from services.runtime.clock import Clock
from services.runtime.database import Reader, Tx
from services.runtime.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from services.runtime.principal import Principal, current_principal
from services.runtime.prompts import check_prompt, with_blobs
from services.runtime.spine.outbox import Mark, Outbox
from services.runtime.spine.tokens import consistency_token
from services.runtime.updates import SESSION_SETTABLE, TASK_SETTABLE, etag_of


@dataclass(frozen=True, slots=True)
class New:
    """What a new task is made of, beside its request."""

    task_id: str
    session: SessionOptions
    """Options, with the caller's and the organization's defaults."""

    provider: str
    blobs: tuple[BlobReference, ...] = ()
    """What the prompt's blobs are, as the organization knows them."""


@dataclass(frozen=True, slots=True)
class Creation:
    """Creates tasks."""

    outbox: Outbox
    clock: Clock
    store: RepositoryStore
    workbench: Workbench
    sandbox_provider: str
    """Provider of tasks for which neither they nor their organization name one."""

    def prepare(self, request: tasks_pb2.CreateTaskRequest) -> New:
        """Fill in what the request leaves to defaults; raise InvalidArgument for what no task could have."""
        check_prompt(request.prompt, "prompt")
        principal = current_principal()
        wanted = request.session
        agent = wanted.agent or principal.default_agent
        if not agent:
            raise InvalidArgument("session.agent", "is needed: neither the user nor the organization has a default")
        follows = not wanted.agent or wanted.agent == principal.default_agent
        model = wanted.model or (principal.default_model if follows else "")
        provider = request.sandbox.provider or principal.default_sandbox_provider or self.sandbox_provider
        session = SessionOptions(agent=agent, model=model, mode=wanted.mode)
        return New("" if request.validate_only else self.clock.new_id("task"), session, provider)

    def check(self, tx: Reader, request: tasks_pb2.CreateTaskRequest, new: New) -> tasks_pb2.CreateTaskResponse:
        """Return the task as it would be, without its id; raise what creating it would."""
        task, session, _ = self._made(tx, request, new)
        session.id = ""
        task.sessions[0].id = ""
        return tasks_pb2.CreateTaskResponse(task=task)

    def create(self, tx: Tx, request: tasks_pb2.CreateTaskRequest, new: New) -> tasks_pb2.CreateTaskResponse:
        """Create a task."""
        principal = current_principal()
        self.store.lock(tx, [request.repository_id])
        task, session, repository = self._made(tx, request, new)
        self.workbench.add(tx, task, session)
        self.store.touch(tx, [repository.id])
        event = self._event(task, session)
        create = CreateTaskRequest(
            task=task,
            session=session,
            repository=repository,
            identity=GitIdentity(name=principal.display_name, email=principal.email),
            hold_prompt=request.hold_prompt,
            branch=request.branch,
        )
        summary = Mark(task.id, task.revision, summary_of(task))
        self.outbox.mark(tx, [summary, Mark(event.id, 1, event), Mark(task.id, 1, create, TO_TASK)])
        token = consistency_token([(common_pb2.ENTITY_KIND_TASK, task.id, task.revision)])
        return tasks_pb2.CreateTaskResponse(task=task, consistency_token=token)

    def _made(self, tx: Reader, request: tasks_pb2.CreateTaskRequest, new: New) -> tuple[Task, Session, Repository]:
        """Return a new task with its first session and its repository; nothing is stored."""
        principal = current_principal()
        repository = self.store.visible(tx, request.repository_id, principal)
        if repository.HasField("delete_time"):
            sentence = f"the repository {repository.display_name} is being deleted"
            raise FailedPrecondition(errors_pb2.ERROR_REASON_BEING_DELETED, sentence)
        title = request.title or derive_title(request.prompt.text)
        branch = self._branch(tx, request.branch, title, repository)
        session = self._session(new)
        prompt = with_blobs(request.prompt, new.blobs)
        task = self._task(principal, repository, title, branch, prompt, session, new.provider)
        pull_request = self.store.pull_requests(tx, repository.id).get(branch)
        if pull_request is not None:
            task.pull_request.CopyFrom(pull_request)
        return task, session, repository

    def _branch(self, tx: Reader, choice: BranchChoice, title: str, repository: Repository) -> str:
        """Return the branch that is chosen; raise AlreadyExists or NotFound where it is known that it cannot be."""
        holders, known = self.store.branch_holders(tx, repository.id), self.store.known_branches(tx, repository.id)
        chosen = choice.WhichOneof("branch")
        if chosen in (None, "derived"):
            return unique_branch(derive_branch(title), holders.keys() | known)
        if chosen == "pull_request_number":
            branch = self._head_of(tx, repository, choice.pull_request_number)
        else:
            branch = choice.new_branch or choice.existing_branch
        holder = holders.get(branch)
        if holder is not None:
            raise AlreadyExists(
                common_pb2.ENTITY_KIND_TASK,
                holder,
                f'the branch "{branch}" belongs to task {holder}',
                errors_pb2.ERROR_REASON_BRANCH_TAKEN,
                task_id=holder,
                branch=branch,
            )
        if chosen == "new_branch" and branch in known:
            sentence = f'the repository has a branch "{branch}"'
            reason = errors_pb2.ERROR_REASON_BRANCH_TAKEN
            raise AlreadyExists(common_pb2.ENTITY_KIND_BRANCH, branch, sentence, reason, branch=branch)
        if chosen == "existing_branch" and known and branch not in known:
            raise _no_branch(branch)
        return branch

    def _head_of(self, tx: Reader, repository: Repository, number: int) -> str:
        for branch, pull in self.store.pull_requests(tx, repository.id).items():
            if pull.number == number:
                return branch
        raise _no_branch(f"pull request {number}")

    def _session(self, new: New) -> Session:
        now = self.clock.timestamp()
        session = Session(
            id=self.clock.new_id("ses"),
            task_id=new.task_id,
            display_name="Session 1",
            agent=new.session.agent,
            model=new.session.model,
            mode=new.session.mode,
            state=sessions_pb2.SESSION_STATE_PENDING,
            state_time=now,
            create_time=now,
            revision=1,
        )
        session.etag = etag_of(session, SESSION_SETTABLE)
        return session

    def _task(
        self,
        principal: Principal,
        repository: Repository,
        title: str,
        branch: str,
        prompt: Prompt,
        session: Session,
        provider: str,
    ) -> Task:
        now = session.create_time
        brief = SessionSummary(
            id=session.id, display_name=session.display_name, state=session.state, agent=session.agent
        )
        task = Task(
            id=session.task_id,
            organization_id=repository.organization_id,
            repository_id=repository.id,
            title=title,
            prompt=prompt,
            branch=branch,
            state=tasks_pb2.TASK_STATE_QUEUED,
            state_time=now,
            owner_user_id=principal.user_id,
            creator=current_actor(),
            sessions=[brief],
            sandbox_provider=provider,
            create_time=now,
            update_time=now,
            revision=1,
        )
        task.etag = etag_of(task, TASK_SETTABLE)
        return task

    def _event(self, task: Task, session: Session) -> HistoryEvent:
        return HistoryEvent(
            id=self.clock.new_id("evt"),
            organization_id=task.organization_id,
            event_time=task.create_time,
            actor=task.creator,
            kind=history_pb2.EVENT_KIND_TASK_CREATED,
            repository_id=task.repository_id,
            task_id=task.id,
            branch=task.branch,
            session_id=session.id,
            summary=task.title,
        )


def _no_branch(name: str) -> NotFound:
    return NotFound(common_pb2.ENTITY_KIND_BRANCH, name, errors_pb2.ERROR_REASON_BRANCH_NOT_FOUND, branch=name)
