"""An open task: what a transaction holds of one task and its sessions, and changes.

Nothing is written until it is closed: then each changed row is written once, with one new revision, and everything
that must leave the service goes into the outbox at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from branchline.v1.common_pb2 import (
    ENTITY_KIND_INPUT_REQUEST,
    ENTITY_KIND_QUEUED_MESSAGE,
    ENTITY_KIND_SESSION,
    ENTITY_KIND_TASK,
    ENTITY_KIND_TRANSCRIPT_ENTRY,
    Failure,
)
from branchline.v1.history_pb2 import (
    EVENT_KIND_BRANCH_MOVED,
    EVENT_KIND_TASK_STATE_CHANGED,
    EventKind,
    HistoryEvent,
)
from branchline.v1.repositories_pb2 import Repository
from branchline.v1.sessions_pb2 import SESSION_STATE_CLOSED, QueuedMessage, Session, SessionSummary
from branchline.v1.tasks_pb2 import PROVISIONING_STAGE_UNSPECIFIED, Task
from branchline.v1.transcripts_pb2 import InputRequest, TranscriptEntry
from branchline_internal.task.v1.task_pb2 import StartWorkflow
from google.protobuf.message import Message

from services.runtime.actors import agent_actor, current_actor
from services.runtime.clock import Clock
from services.runtime.errors import NotFound
from services.runtime.logging import get_logger
from services.runtime.spine.outbox import Mark
from services.runtime.spine.tokens import consistency_token
from services.task.destinations import TO_WORKFLOW
from services.task.standing import (
    SESSION_WORKING,
    TRANSITIONS,
    SessionStanding,
    Standing,
    check_transition,
    standing_of,
)

log = get_logger(__name__)

Named = Session | TranscriptEntry | QueuedMessage | InputRequest
_KINDS = {
    Session: ENTITY_KIND_SESSION,
    TranscriptEntry: ENTITY_KIND_TRANSCRIPT_ENTRY,
    QueuedMessage: ENTITY_KIND_QUEUED_MESSAGE,
    InputRequest: ENTITY_KIND_INPUT_REQUEST,
}
_SUMMARY_BYTES = 1000


@dataclass(slots=True)
class TaskRow:
    """A task as its row holds it: its public state and what only this service needs."""

    task: Task
    repository: Repository
    git_name: str
    git_email: str
    hold_prompt: bool
    branch_choice: str
    """How the branch was chosen: "derived", "new" or "existing"; "own" once it was checked out."""
    branch_base: str
    """Where a branch that is made starts; empty means the default branch."""
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
    cancelled_turn: int = 0
    """The last turn of which somebody wished that it end."""
    touched: bool = False
    changed: bool = False

    @property
    def working_since(self) -> float | None:
        """When the agent began what it does; None if it does nothing."""
        working = self.session.state in SESSION_WORKING
        return self.session.state_time.ToNanoseconds() / 1e9 if working else None


@dataclass(slots=True)
class OpenTask:
    """One task within a transaction."""

    row: TaskRow
    rows: dict[str, SessionRow]
    """Its sessions by id, oldest first."""
    clock: Clock
    entries: list[TranscriptEntry] = field(default_factory=list[TranscriptEntry])
    queue: list[QueuedMessage] | None = None
    """Messages that wait, in their order; None where they were not read."""
    edited: set[str] = field(default_factory=set[str])
    """Those of them that were changed otherwise than by their place."""
    queued: list[QueuedMessage] = field(default_factory=list[QueuedMessage])
    """Those of them that must be written; known once the task is sealed."""
    unqueued: list[QueuedMessage] = field(default_factory=list[QueuedMessage])
    """Messages that wait no more."""
    inputs: dict[str, InputRequest] = field(default_factory=dict[str, InputRequest])
    """What agents wait for, or waited for, that was changed."""
    rested: set[str] = field(default_factory=set[str])
    """Sessions whose turn ended."""
    sent: list[Mark] = field(default_factory=list[Mark])

    @property
    def task(self) -> Task:
        """The task as others see it."""
        return self.row.task

    @property
    def standing(self) -> Standing:
        """Where it stands."""
        return standing_of(self.row.task)

    @property
    def sessions(self) -> list[Session]:
        """Its sessions, oldest first."""
        return [row.session for row in self.rows.values()]

    @property
    def first_session(self) -> Session | None:
        """The oldest session that is not closed."""
        return next((one for one in self.sessions if one.state != SESSION_STATE_CLOSED), None)

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

    def move(self, standing: Standing, failure: Failure | None = None, session_id: str = "") -> None:
        """Bring the task to another standing, with a history event. Raise FailedPrecondition if that is not allowed.

        A failure stays until the task stands elsewhere.
        """
        task, old = self.task, self.standing
        if old == standing:
            if failure is not None and task.failure != failure:
                task.failure.CopyFrom(failure)
                self.change()
            return
        check_transition(old, standing)
        task.state, task.activity = standing
        task.ClearField("failure")
        if failure is not None:
            task.failure.CopyFrom(failure)
        task.state_time.CopyFrom(self.clock.timestamp())
        task.stage = PROVISIONING_STAGE_UNSPECIFIED
        self.change()
        details = {"from": old.name, "to": standing.name}
        summary = f"{old.name} → {standing.name}" + (f": {failure.message}" if failure is not None else "")
        self.tell(EVENT_KIND_TASK_STATE_CHANGED, summary, session_id, details)

    def follow(self, standing: Standing, failure: Failure | None = None, session_id: str = "") -> bool:
        """Bring the task to the standing that something outside brought about; where that does not fit, ignore it."""
        if standing != self.standing and standing not in TRANSITIONS[self.standing]:
            held, reported = self.standing.name, standing.name
            log.warning("report ignored", task=self.task.id, session=session_id, held=held, reported=reported)
            return False
        self.move(standing, failure, session_id)
        return True

    def stand(self, session: Session, state: SessionStanding, failure: Failure | None = None) -> None:
        """Bring a session to a state."""
        if session.state in SESSION_WORKING and state not in SESSION_WORKING:
            self.rested.add(session.id)
        session.state = state
        session.ClearField("failure")
        if failure is not None:
            session.failure.CopyFrom(failure)
        session.state_time.CopyFrom(self.clock.timestamp())
        self.change_session(session)

    def count_inputs(self, more: int) -> None:
        """Count how many more input requests wait for an answer."""
        if more:
            self.task.pending_input_count += more
            self.change()

    def move_head(self, commit: str, session_id: str) -> None:
        """Note where a session's agent left the branch; an empty commit means that it is not known."""
        if not commit or commit == self.task.head_commit:
            return
        self.task.head_commit = commit
        self.change()
        self.tell(EVENT_KIND_BRANCH_MOVED, f"{self.task.branch} is at {commit[:12]}", session_id, by_agent=True)

    def tell(
        self,
        kind: EventKind.ValueType,
        summary: str,
        session_id: str = "",
        details: Mapping[str, str] | None = None,
        *,
        by_agent: bool = False,
    ) -> None:
        """Record an event for history; its actor is the session's agent, or whoever makes the call."""
        event = HistoryEvent(
            id=self.clock.new_id("evt"),
            organization_id=self.task.organization_id,
            event_time=self.clock.timestamp(),
            actor=agent_actor(session_id, self.task.owner_user_id) if by_agent else current_actor(),
            kind=kind,
            repository_id=self.task.repository_id,
            task_id=self.task.id,
            branch=self.task.branch,
            session_id=session_id,
            summary=summary.encode()[:_SUMMARY_BYTES].decode(errors="ignore"),
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

    def token(self, *named: Named) -> str:
        """Return the consistency token of the closed task, what is named, and the sessions that were changed."""
        points = [(ENTITY_KIND_TASK, self.task.id, self.task.revision)]
        points += [(_KINDS[type(one)], one.id, one.revision) for one in named]
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
        self._number_queue()
        for one in (*self.unqueued, *self.inputs.values()):
            one.revision += 1
        marks = [Mark(one.id, one.revision, one) for one in (*self.entries, *self.queued, *self.inputs.values())]
        marks += [Mark(one.id, one.revision, one, deleted=True) for one in self.unqueued]
        marks += [Mark(one.id, one.revision, one) for one in sessions]
        if self.row.changed:
            self.task.revision += 1
            self.task.update_time.CopyFrom(self.clock.timestamp())
            marks.append(Mark(self.task.id, self.task.revision, self.task))
        return [*marks, *self.sent]

    def _number_queue(self) -> None:
        """Give the messages that wait their places, and those that changed a new revision."""
        for place, message in enumerate(self.queue or (), 1):
            if message.place != place or message.id in self.edited:
                message.place = place
                message.revision += 1
                self.queued.append(message)

    def _summarize(self) -> None:
        brief = [
            SessionSummary(id=one.id, display_name=one.display_name, state=one.state, agent=one.agent)
            for one in self.sessions
        ]
        if brief != list(self.task.sessions):
            del self.task.sessions[:]
            self.task.sessions.extend(brief)
            self.change()
