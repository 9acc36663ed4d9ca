"""What is known of an agent session and of the turn that it works on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from branchline.v1 import sessions_pb2
from branchline.v1.agents_pb2 import Agent
from branchline_internal.sandbox.v1.sandbox_pb2 import StartTurnRequest

from services.sandbox.offers import Offer
from services.sandbox.questions import Asked
from services.sandbox.transcript import Draft

State = sessions_pb2.SessionState.ValueType

WORKING = (sessions_pb2.SESSION_STATE_RUNNING, sessions_pb2.SESSION_STATE_WAITING)


class Overtaken(Exception):
    """Another turn or another agent has taken the place of the one that was followed."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a session is, and which agent it is to have."""

    session_id: str
    sandbox_id: str
    task_id: str
    organization_id: str
    agent: str
    model: str = ""
    mode: str = ""


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """An agent session as its row holds it."""

    session_id: str
    sandbox_id: str
    task_id: str
    organization_id: str
    agent: str
    model: str
    """The model that is wanted; empty leaves it to the agent."""
    mode: str
    """The mode that is wanted; empty leaves it to the agent."""
    generation: int
    """Counts the agents that the session has had."""
    acp_session_id: str
    """The agent's own id of the session; empty if there is no agent to give a prompt to."""
    process: str
    """The provider's name of the agent's process; empty if it is not known."""
    ending: bool
    """Whether this agent must be confirmed gone before anything else starts."""
    closing: bool
    """Whether the session shall be closed."""
    last_event: int
    """Number of the last event that is read of this agent."""
    entry_count: int
    turn: int
    turn_time: float
    posts: int
    """How often the turn's prompt was posted."""
    prompt_rpc_id: int
    """Id of the newest of these requests; 0 if there was none to this agent."""
    mark: int
    """Number of an event behind all that was said before the prompt was posted."""
    accepted: bool
    """Whether the agent is known to have the prompt."""
    cancel_turn: int
    """The turn that shall be cancelled."""
    state: State
    revision: int

    @property
    def place(self) -> "Place":
        """What its next agent is to be."""
        return Place(
            self.session_id, self.sandbox_id, self.task_id, self.organization_id, self.agent, self.model, self.mode
        )

    @property
    def connection(self) -> str:
        """Id of the agent's connection at the sandbox-agent server."""
        return f"{self.session_id}-{self.generation}"

    @property
    def works(self) -> bool:
        """Whether there is a turn to be done."""
        return self.state in WORKING


@dataclass(frozen=True, slots=True)
class Progress:
    """What has become of a turn since it was last stored."""

    last_event: int
    entry_count: int
    accepted: bool
    drafts: Sequence[Draft]
    asked: Sequence[Asked]
    """What the agent waits for, or waited for, that is new or has changed."""
    state: State
    """Where the session stands now."""
    offer: Offer | None = None
    """What the agent offers, if that has changed."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A session with all that a follower begins with."""

    record: SessionRecord
    prompt: StartTurnRequest | None = None
    offer: Offer = field(default_factory=lambda: Offer(Agent()))
    drafts: Mapping[str, Draft] = field(default_factory=dict[str, Draft])
    asked: Sequence[Asked] = ()
