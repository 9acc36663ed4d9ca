"""One turn of an agent, as its events tell it. Pure: no clock, no database, no network.

That the prompt arrived is known only from what it caused: the answer to its own request, something said or asked
behind the mark that was set before it was posted, or the end of the agent. Answers to other requests and what trails
from an earlier turn say nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from branchline.v1 import sessions_pb2

from services.sandbox.agent_server import AgentEvent, rpc_error
from services.sandbox.members import member
from services.sandbox.sessions import Asked, Permission, Progress, SessionRecord, Status, rpc_text
from services.sandbox.transcript import TranscriptBuilder

MARKS = 2**48
"""Ids of requests that set marks begin here."""

PROMPT_POSTS = 3
"""How often a prompt is posted of which the agent is not known to have it."""

AGENT_EXITED = "_branchline/agent_exited"

_POSTS_PER_TURN = 1000
_READ_AGAIN = 64
"""Most events that are read again after a restart because nothing of them was worth storing."""

_WORK = frozenset({"agent_message_chunk", "agent_thought_chunk", "tool_call", "tool_call_update", "plan"})
"""Updates that only a prompt causes; agents send others, such as their commands, whenever they like."""


class TurnFailed(Exception):
    """The turn is over and did not end well; the message says why."""


@dataclass(frozen=True, slots=True)
class End:
    """How a turn ended."""

    status: Status
    reason: str = ""
    end_agent: bool = False
    """Whether its agent must be gone before anything else starts."""
    end_first: bool = False
    """Whether its agent must be ended before the turn is said to be over."""
    abandoned: str = "interrupted"
    """State of tool calls and questions that were open."""


@dataclass(slots=True)
class Turn:
    """Where a turn stands."""

    record: SessionRecord
    builder: TranscriptBuilder
    open_questions: dict[str, str]
    """Requests for permission that wait: the transcript entry and the request's id."""
    answers: dict[str, Permission] = field(default_factory=dict[str, Permission])
    """Answers that people gave, by the transcript entry, whether the agent is known to have been told or not."""

    end: End | None = None
    lost: str = ""
    """Why there is no agent to give the prompt to any more, though nothing was done yet; another one may be started."""
    overtaken: bool = False
    cancelled: bool = False
    """Whether it shall be cancelled."""
    withdrawing: bool = False
    """Whether the answer to the prompt only means that it was dropped, to be posted again."""
    withdrawn: bool = False
    marks: dict[int, int] = field(default_factory=dict[int, int])
    """Marks that came, with the numbers of their events."""
    not_understood: list[str] = field(default_factory=list[str])
    """Requests of the agent that nobody here answers."""

    last_event: int = field(init=False)
    rpc_id: int = field(init=False)
    mark: int = field(init=False)
    posts: int = field(init=False)
    accepted: bool = field(init=False)
    _stored: tuple[int, int, bool, Status] = field(init=False)
    _asked: list[Asked] = field(default_factory=list[Asked])
    _settled: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        self.posts, self.accepted = self.record.posts, self.record.accepted
        self._stored = (self.record.last_event, self.record.entry_count, self.accepted, self.record.status)
        self.follow(self.record)
        self.builder.seal_others("interrupted")

    def follow(self, record: SessionRecord) -> None:
        """Follow the agent of this record from now on."""
        self.record = record
        self.last_event, self.rpc_id, self.mark = record.last_event, record.prompt_rpc_id, record.mark

    @property
    def over(self) -> bool:
        """Whether there is nothing more to follow."""
        return self.end is not None or bool(self.lost) or self.overtaken

    @property
    def busy(self) -> bool:
        """Whether silence is explained: a tool runs, or a person is asked."""
        return self.builder.calls_open or bool(self.open_questions)

    @property
    def status(self) -> Status:
        """Where the session stands while the turn runs."""
        return sessions_pb2.SESSION_STATUS_WAITING if self.open_questions else sessions_pb2.SESSION_STATUS_RUNNING

    def next_post(self, mark: int) -> None:
        """Prepare the next request with the prompt, behind a mark."""
        self.posts += 1
        self.mark = mark
        self.rpc_id = self.record.turn * _POSTS_PER_TURN + self.posts
        self.withdrawing = self.withdrawn = False

    def apply(self, event: AgentEvent) -> None:
        """Take the next event. One that was taken before changes nothing."""
        if event.number <= self.last_event or self.over:
            return
        self.last_event = event.number
        message = event.message
        method = message.get("method")
        params: Mapping[str, Any] = message.get("params") or {}
        if method is None:
            self._take_answer(message, event.number)
        elif method == "session/request_permission":
            self._caused(event.number)
            self._take_question(message.get("id"), dict(params))
        elif "id" in message:
            self.not_understood.append(rpc_text(message["id"]))
        elif method == "session/update":
            update: dict[str, Any] = params.get("update") or {}
            if update.get("sessionUpdate") in _WORK:
                self._caused(event.number)
            self.builder.update(update)
        elif method == AGENT_EXITED:
            self._caused(event.number)
            self.agent_gone(f"the agent ended with exit code {params.get('code')} in mid-turn")

    def lose(self, count: int) -> None:
        """Say that messages of the agent are missing."""
        if self.rpc_id:  # what is missing from before the turn is nobody's loss
            words = f"{count} messages of the agent were lost"
            self.builder.note(sessions_pb2.TRANSCRIPT_ENTRY_KIND_STATUS, words, "messages_lost")

    def answered(self, message: Mapping[str, Any]) -> None:
        """Take the answer that came on the prompt's request itself."""
        if message.get("id") == self.rpc_id:
            self._finish(message)

    def settle(self, entry_id: str, state: str, user_id: str = "") -> None:
        """Close a question."""
        if self.open_questions.pop(entry_id, None) is not None:
            self.builder.answer(entry_id, state, user_id)
            self._settled.append(entry_id)

    def settle_answered(self, answer: Permission) -> None:
        """Close a question with its answer."""
        self.settle(answer.entry_id, f"answered: {answer.option_id}", answer.user_id)

    def fail(self, reason: str, *, end_first: bool = False) -> None:
        """End the turn in error, and its agent with it."""
        if not self.over:
            self.end = End(sessions_pb2.SESSION_STATUS_ERROR, reason, end_agent=True, end_first=end_first)

    def agent_gone(self, reason: str) -> None:
        """End the turn in error, or, if its prompt never arrived, give it to another agent."""
        if self.over:
            return
        if self.accepted or self.posts >= PROMPT_POSTS:
            self.fail(reason)
        else:
            self.lost = reason

    def give_up(self) -> None:
        """End a turn that was cancelled before its agent had it, or whose agent does not obey."""
        if not self.over:
            had_it = self.rpc_id > 0
            self.end = End(sessions_pb2.SESSION_STATUS_IDLE, end_agent=had_it, end_first=had_it, abandoned="cancelled")
            words = "The turn ended: cancelled; the agent did not stop and was ended" if had_it else _CANCELLED
            self.builder.note(sessions_pb2.TRANSCRIPT_ENTRY_KIND_STATUS, words, "cancelled")

    def close(self) -> None:
        """Close what the end leaves open, and say why it ended."""
        assert self.end is not None
        for entry_id in list(self.open_questions):
            answer = self.answers.get(entry_id)
            if answer is None or self.cancelled:
                self.settle(entry_id, self.end.abandoned)
            else:
                self.settle_answered(answer)
        self.builder.seal_all(self.end.abandoned)
        if self.end.reason:
            self.builder.note(sessions_pb2.TRANSCRIPT_ENTRY_KIND_ERROR, self.end.reason)

    def restarted(self) -> None:
        """Say that the agent does not remember earlier turns."""
        words = "The agent was started afresh; it does not remember what was said before"
        self.builder.note(sessions_pb2.TRANSCRIPT_ENTRY_KIND_STATUS, words, "agent_restarted")

    @property
    def worth_storing(self) -> bool:
        """Whether there is more to store than how far the events were read; what said nothing may be read again."""
        last_event, *told = self._stored
        return told != [self.builder.count, self.accepted, self.status] or (
            bool(self.builder.changed or self._asked or self._settled) or self.last_event - last_event >= _READ_AGAIN
        )

    def take(self) -> Progress:
        """Return what changed since the last call."""
        progress = Progress(
            last_event=self.last_event,
            entry_count=self.builder.count,
            accepted=self.accepted,
            drafts=self.builder.take_changed(),
            asked=tuple(self._asked),
            settled=tuple(self._settled),
            status=self.status if self.end is None else self.end.status,
        )
        self._asked.clear()
        self._settled.clear()
        self._stored = (progress.last_event, progress.entry_count, progress.accepted, progress.status)
        return progress

    def _caused(self, number: int) -> None:
        if self.rpc_id and number > self.mark:
            self.accepted = True

    def _take_answer(self, message: Mapping[str, Any], number: int) -> None:
        rpc_id = message.get("id")
        if isinstance(rpc_id, int) and rpc_id >= MARKS:
            self.marks[rpc_id] = number
        elif self.rpc_id and rpc_id == self.rpc_id:
            if self.withdrawing:
                self.withdrawn = True
                return
            self.accepted = True
            self._finish(message)

    def _take_question(self, rpc_id: object, params: dict[str, Any]) -> None:
        entry = self.builder.permission(params)
        self.open_questions[entry.id] = rpc_text(rpc_id)
        self._asked.append(Asked(entry.id, rpc_text(rpc_id)))

    def _finish(self, message: Mapping[str, Any]) -> None:
        if self.over:
            return
        if "error" in message and not self.cancelled:
            self.fail(f"the agent failed: {rpc_error(member(message, 'error'))}")
            return
        result = member(message, "result")
        reason = "cancelled" if "error" in message else str(result.get("stopReason", "end_turn"))
        if reason != "end_turn":
            words = f"The turn ended: {reason[:100]}"
            self.builder.note(sessions_pb2.TRANSCRIPT_ENTRY_KIND_STATUS, words, reason)
        abandoned = "cancelled" if self.cancelled else "interrupted"
        self.end = End(sessions_pb2.SESSION_STATUS_IDLE, abandoned=abandoned)


_CANCELLED = "The turn ended: cancelled"
