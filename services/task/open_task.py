"""An open task: what a transaction holds of one task and its sessions, and changes.

Nothing is written until it is closed: then each changed row is written once, with one new revision, and everything
that must leave the service goes into the outbox at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from branchline.v1.history_pb2 import ACTOR_KIND_AGENT, ACTOR_KIND_SYSTEM, ACTOR_KIND_USER, HistoryEvent
from branchline.v1.repositories_pb2 import Repository
from branchline.v1.sessions_pb2 import SESSION_STATUS_CLOSED, Session, SessionSummary, TranscriptEntry
from branchline.v1.tasks_pb2 import PROVISIONING_STAGE_UNSPECIFIED, Task
from branchline.v1.vocabulary_pb2 import (
    ENTITY_KIND_SESSION,
    ENTITY_KIND_TASK,
    ENTITY_KIND_TRANSCRIPT_ENTRY,
    EVENT_KIND_BRANCH_MOVED,
    EVENT_KIND_TASK_STATUS_CHANGED,
    EventKind,
)
from branchline_internal.task.v1.task_pb2 import StartWorkflow
from google.protobuf.message import Message

from services.runtime.clock import Clock
from services.runtime.errors import NotFound
from services.runtime.logging import get_logger
from services.runtime.principal import principal_or_none
from services.runtime.spine.outbox import Mark
from services.runtime.spine.tokens import consistency_token
from services.task.destinations import TO_WORKFLOW
from services.task.status import (
    SESSION_WORKING,
    TRANSITIONS,
    SessionStanding,
    Status,
    check_transition,
    status_name,
)

log = get_logger(__name__)

_REASON_CHARACTERS = 4000
_SUMMARY_CHARACTERS = 500


@dataclass(slots=True)
class TaskRow:
    """A task as its row holds it: its public state and what only this service needs."""

    task: Task
    repository: Repository
    git_name: str
    git_email: str
    hold_prompt: bool
    derived_branch: bool
    """Whether the branch's name was derived and not checked out yet: one that the remote has is not ours."""
    provisioned: bool
    """Whether there is a sandbox that takes messages."""
    attempt: int
    """Number of the last workflow."""
    workflow: str
    """The workflow that the task waits for; empty when it waits for none."""
    workflow_time: float
    """When that was last asked for."""
    touched: bool = False
    """Whether the row must be written."""
    changed: bool = False
    """Whether the task as others see it is another."""


@dataclass(slots=True)
class SessionRow:
    """A session as its row holds it."""

    session: Session
    agent_revision: int = 0
    last_position: int = 0
    touched: bool = False
    changed: bool = False

    @property
    def working_since(self) -> float | None:
        """When the agent began what it does; None if it does nothing."""
        working = self.session.status in SESSION_WORKING
        return self.session.status_time.ToNanoseconds() / 1e9 if working else None


@dataclass(slots=True)
class OpenTask:
    """One task within a transaction."""

    row: TaskRow
    rows: dict[str, SessionRow]
    """Its sessions by id, oldest first."""
    clock: Clock
    entries: list[TranscriptEntry] = field(default_factory=list[TranscriptEntry])
    sent: list[Mark] = field(default_factory=list[Mark])

    @property
    def task(self) -> Task:
        """The task as others see it."""
        return self.row.task

    @property
    def sessions(self) -> list[Session]:
        """Its sessions, oldest first."""
        return [row.session for row in self.rows.values()]

    @property
    def first_session(self) -> Session | None:
        """The oldest session that is not closed."""
        return next((one for one in self.sessions if one.status != SESSION_STATUS_CLOSED), None)

    def session(self, session_id: str) -> Session:
        """Return one of its sessions; raise NotFound."""
        if session_id not in self.rows:
            raise NotFound(ENTITY_KIND_SESSION, session_id)
        return self.rows[session_id].session

    def add_session(self, session: Session) -> None:
        """Give the task another session."""
        self.rows[session.id] = SessionRow(session)
        self.change_session(session)

    def change(self) -> None:
        """Note that the task was changed."""
        self.row.touched = self.row.changed = True

    def change_session(self, session: Session) -> None:
        """Note that one of its sessions was changed."""
        row = self.rows[session.id]
        row.touched = row.changed = True

    def move(self, status: Status, reason: str = "", session_id: str = "") -> None:
        """Bring the task to another status, with a history event. Raise FailedPrecondition if that is not allowed."""
        task = self.task
        reason = reason[:_REASON_CHARACTERS]
        if task.status == status:
            if task.status_reason != reason:
                task.status_reason = reason
                self.change()
            return
        check_transition(task.status, status)
        details = {"from": status_name(task.status), "to": status_name(status)}
        task.status = status
        task.status_reason = reason
        task.status_time.CopyFrom(self.clock.timestamp())
        task.stage = PROVISIONING_STAGE_UNSPECIFIED
        self.change()
        summary = f"{details['from']} → {details['to']}" + (f": {reason}" if reason else "")
        self.tell(EVENT_KIND_TASK_STATUS_CHANGED, summary, session_id, details)

    def follow(self, status: Status, reason: str = "", session_id: str = "") -> bool:
        """Bring the task to the status that something outside brought about; where that does not fit, ignore it."""
        if status != self.task.status and status not in TRANSITIONS[self.task.status]:
            held, reported = status_name(self.task.status), status_name(status)
            log.warning("report ignored", task=self.task.id, session=session_id, held=held, reported=reported)
            return False
        self.move(status, reason, session_id)
        return True

    def stand(self, session: Session, status: SessionStanding, reason: str = "") -> None:
        """Bring a session to a status."""
        session.status = status
        session.status_reason = reason[:_REASON_CHARACTERS]
        session.status_time.CopyFrom(self.clock.timestamp())
        self.change_session(session)

    def move_head(self, commit: str) -> None:
        """Note where the branch points now; an empty commit means that it is not known."""
        if not commit or commit == self.task.head_commit:
            return
        self.task.head_commit = commit
        self.change()
        self.tell(EVENT_KIND_BRANCH_MOVED, f"{self.task.branch} is at {commit[:12]}", by_agent=True)

    def tell(
        self,
        kind: EventKind.ValueType,
        summary: str,
        session_id: str = "",
        details: Mapping[str, str] | None = None,
        *,
        by_agent: bool = False,
    ) -> None:
        """Record an event for history; its actor is the caller, else Branchline itself or the agent."""
        principal = principal_or_none()
        user_id = principal.user_id if principal is not None and not by_agent else ""
        actor = ACTOR_KIND_AGENT if by_agent else ACTOR_KIND_USER if user_id else ACTOR_KIND_SYSTEM
        event = HistoryEvent(
            id=self.clock.new_id("evt"),
            organization_id=self.task.organization_id,
            event_time=self.clock.timestamp(),
            actor_kind=actor,
            actor_user_id=user_id,
            kind=kind,
            repository_id=self.task.repository_id,
            task_id=self.task.id,
            branch=self.task.branch,
            session_id=session_id,
            summary=summary[:_SUMMARY_CHARACTERS],
            details=details,
        )
        self.sent.append(Mark(event.id, 1, event))

    def entry(self, entry: TranscriptEntry) -> None:
        """Put an entry into its session's transcript, or a new state of one that is there."""
        if not entry.position:
            row = self.rows[entry.session_id]
            row.last_position += 1
            row.touched = True
            entry.position = row.last_position
        entry.revision += 1
        self.entries.append(entry)

    def send(self, destination: str, entity_id: str, revision: int, message: Message) -> None:
        """Have something done outside once this is committed; `entity_id` is its lane."""
        self.sent.append(Mark(entity_id, revision, message, destination))

    def start(self, workflow: str) -> None:
        """Have a workflow run for the task; it waits for that one and no other from now on."""
        self.row.attempt += 1
        self.row.workflow = workflow
        self.start_again()

    def start_again(self) -> None:
        """Have the workflow that the task waits for run if it does not."""
        row = self.row
        row.workflow_time = self.clock.seconds()
        row.touched = True
        wanted = StartWorkflow(workflow=row.workflow, task_id=self.task.id, attempt=row.attempt)
        self.send(TO_WORKFLOW, self.task.id, row.attempt, wanted)

    def arrive(self) -> None:
        """Note that the task waits for no workflow any more."""
        self.row.workflow = ""
        self.row.touched = True

    def token(self, *named: Session | TranscriptEntry) -> str:
        """Return the consistency token of the closed task, what is named, and the sessions that were changed."""
        points = [(ENTITY_KIND_TASK, self.task.id, self.task.revision)]
        for one in named:
            kind = ENTITY_KIND_SESSION if isinstance(one, Session) else ENTITY_KIND_TRANSCRIPT_ENTRY
            points.append((kind, one.id, one.revision))
        changed = [row.session for row in self.rows.values() if row.changed and row.session not in named]
        points += [(ENTITY_KIND_SESSION, one.id, one.revision) for one in changed]
        return consistency_token(points)

    def seal(self) -> Sequence[Mark]:
        """Give what was changed its new revisions; return all that must leave the service."""
        sessions = [row.session for row in self.rows.values() if row.changed]
        for session in sessions:
            session.revision += 1
        if sessions:
            self._summarize()
        marks = [Mark(one.id, one.revision, one) for one in self.entries]
        marks += [Mark(one.id, one.revision, one) for one in sessions]
        if self.row.changed:
            self.task.revision += 1
            self.task.update_time.CopyFrom(self.clock.timestamp())
            marks.append(Mark(self.task.id, self.task.revision, self.task))
        return [*marks, *self.sent]

    def _summarize(self) -> None:
        brief = [SessionSummary(id=one.id, name=one.name, status=one.status, agent=one.agent) for one in self.sessions]
        if brief != list(self.task.sessions):
            del self.task.sessions[:]
            self.task.sessions.extend(brief)
            self.change()
