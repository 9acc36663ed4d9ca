"""One turn of an agent, as its events tell it. Pure: no clock, no database, no network.

That the prompt arrived is known only from what it caused: the answer to its own request, something said or asked
behind the mark that was set before it was posted, or the end of the agent. Answers to other requests and what trails
from an earlier turn say nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from branchline.v1 import sessions_pb2
from branchline.v1 import transcripts_pb2 as transcripts
from branchline.v1.agents_pb2 import Agent
from branchline.v1.common_pb2 import Failure
from branchline.v1.transcripts_pb2 import (
    InputRequest,
    InputRequestState,
    StopReason,
    TokenUsage,
    ToolCallState,
    TurnEnd,
)

from services.runtime.logging import get_logger
from services.sandbox import questions
from services.sandbox.agent_server import AgentError, AgentEvent
from services.sandbox.members import is_whole, member, text_of
from services.sandbox.offers import Offer, choice, is_usable, name_of, relisted
from services.sandbox.questions import Asked
from services.sandbox.reasons import exited, refused
from services.sandbox.records import Progress, SessionRecord, State
from services.sandbox.sessions import rpc_text
from services.sandbox.transcript import INTERRUPTED, TranscriptBuilder
from services.sandbox.usage import added, usage_of

log = get_logger(__name__)

MARKS = 2**48
"""Ids of requests that set marks begin here."""

PROMPT_POSTS = 3
"""How often a prompt is posted of which the agent is not known to have it."""

AGENT_EXITED = "_branchline/agent_exited"

_NOT_UNDERSTOOD = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What comes of JSON that is read as what it is not. No agent's words fail a turn."""

_POSTS_PER_TURN = 1000
_READ_AGAIN = 64
"""Most events that are read again after a restart because nothing of them was worth storing."""

_WORK = frozenset({"agent_message_chunk", "agent_thought_chunk", "tool_call", "tool_call_update", "plan"})
"""Updates that only a prompt causes; agents send others, such as their commands, whenever they like."""

_STOP_REASONS: Mapping[str, StopReason.ValueType] = {
    "end_turn": transcripts.STOP_REASON_END_TURN,
    "max_tokens": transcripts.STOP_REASON_MAX_TOKENS,
    "max_turn_requests": transcripts.STOP_REASON_MAX_TURN_REQUESTS,
    "refusal": transcripts.STOP_REASON_REFUSAL,
    "cancelled": transcripts.STOP_REASON_CANCELLED,
}
_CANCELLED, _ANSWERED = transcripts.INPUT_REQUEST_STATE_CANCELLED, transcripts.INPUT_REQUEST_STATE_ANSWERED


@dataclass(frozen=True, slots=True)
class End:
    """How a turn ended."""

    state: State
    reason: StopReason.ValueType
    failure: Failure | None = None
    end_agent: bool = False
    """Whether its agent must be gone before anything else starts."""
    end_first: bool = False
    """Whether its agent must be ended before the turn is said to be over."""
    abandoned: ToolCallState.ValueType = INTERRUPTED
    """State of tool calls that were open."""


@dataclass(slots=True)
class Turn:
    """Where a turn stands."""

    record: SessionRecord
    builder: TranscriptBuilder
    open_questions: dict[str, Asked]
    """What the agent waits for, by the request's id."""
    answers: dict[str, InputRequest] = field(default_factory=dict[str, InputRequest])
    """What people have answered, whether the agent is known to have been told or not."""
    offer: Offer = field(default_factory=lambda: Offer(Agent()))
    """What the agent offers, and the model and mode that it works with."""
    usage: TokenUsage = field(default_factory=TokenUsage)
    """What the agent said of the tokens that it used."""

    end: End | None = None
    lost: Failure | None = None
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
    _stored: tuple[int, int, bool, State] = field(init=False)
    _asked: dict[str, Asked] = field(default_factory=dict[str, Asked])
    _offer_changed: bool = False

    def __post_init__(self) -> None:
        self.posts, self.accepted = self.record.posts, self.record.accepted
        self._stored = (self.record.last_event, self.record.entry_count, self.accepted, self.record.state)
        self.follow(self.record)
        self.builder.seal_others()

    def follow(self, record: SessionRecord) -> None:
        """Follow the agent of this record from now on."""
        self.record = record
        self.last_event, self.rpc_id, self.mark = record.last_event, record.prompt_rpc_id, record.mark

    @property
    def over(self) -> bool:
        """Whether there is nothing more to follow."""
        return self.end is not None or self.lost is not None or self.overtaken

    @property
    def busy(self) -> bool:
        """Whether silence is explained: a tool runs, or a person is asked."""
        return self.builder.calls_open or bool(self.open_questions)

    @property
    def state(self) -> State:
        """Where the session stands while the turn runs."""
        return sessions_pb2.SESSION_STATE_WAITING if self.open_questions else sessions_pb2.SESSION_STATE_RUNNING

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
        try:
            self._take(message, event.number)
        except _NOT_UNDERSTOOD as error:
            log.warning("an agent's message is not understood", session=self.record.session_id, exc_info=error)
            self.builder.unknown(text_of(message, "method"), message)
            if "method" not in message:
                self.answered({"id": message.get("id"), "error": {"message": "its answer is not understood"}})
            elif "id" in message:
                self.not_understood.append(rpc_text(message["id"]))

    def _take(self, message: Mapping[str, Any], number: int) -> None:
        method, params = message.get("method"), member(message, "params")
        if method is None:
            self._take_answer(message, number)
        elif method in (questions.PERMISSION, questions.ELICITATION) and "id" in message:
            self._caused(number)
            self._take_question(method, message["id"], params)
        elif "id" in message:
            self.not_understood.append(rpc_text(message["id"]))
        elif method == "session/update":
            self._take_update(member(params, "update") or {"update": params.get("update")}, number)
        elif method == AGENT_EXITED:
            self._caused(number)
            self.agent_gone(exited(f"the agent ended with exit code {params.get('code')} in mid-turn"))

    def _take_update(self, update: Mapping[str, Any], number: int) -> None:
        if text_of(update, "sessionUpdate") in _WORK:
            self._caused(number)
        self._look_at(update)
        self.builder.update(update)

    def lose(self, count: int) -> None:
        """Say that messages of the agent are missing."""
        if self.rpc_id:  # what is missing from before the turn is nobody's loss
            self.builder.notice(transcripts.NOTICE_KIND_EVENTS_LOST, f"{count} messages of the agent were lost")

    def answered(self, message: Mapping[str, Any]) -> None:
        """Take the answer that came on the prompt's request itself."""
        if message.get("id") == self.rpc_id:
            self._finish(message)

    def settle(self, request_id: str, state: InputRequestState.ValueType = _CANCELLED) -> None:
        """Close a question."""
        asked = self.open_questions.pop(request_id, None)
        if asked is None:
            return
        asked.request.state = state
        asked.request.revision += 1
        self._asked[request_id] = asked
        self.builder.settle(asked.request.entry_id)

    def settle_answered(self, answered: InputRequest) -> None:
        """Close a question with its answer."""
        asked = self.open_questions.get(answered.id)
        if asked is not None:
            asked.request.answer.CopyFrom(answered.answer)
            asked.request.answered_by.CopyFrom(answered.answered_by)
            asked.request.answer_time.CopyFrom(answered.answer_time)
            self.settle(answered.id, _ANSWERED)

    def fail(self, failure: Failure, *, end_first: bool = False) -> None:
        """End the turn in failure, and its agent with it."""
        if not self.over:
            state = sessions_pb2.SESSION_STATE_FAILED
            self.end = End(state, transcripts.STOP_REASON_FAILED, failure, end_agent=True, end_first=end_first)

    def agent_gone(self, failure: Failure) -> None:
        """End the turn in failure, or, if its prompt never arrived, give it to another agent."""
        if self.over:
            return
        if self.accepted or self.posts >= PROMPT_POSTS:
            self.fail(failure)
        else:
            self.lost = failure

    def give_up(self) -> None:
        """End a turn that was cancelled before its agent had it, or whose agent does not obey and is ended."""
        if not self.over:
            had_it = self.rpc_id > 0
            self.end = End(
                sessions_pb2.SESSION_STATE_IDLE,
                transcripts.STOP_REASON_CANCELLED,
                end_agent=had_it,
                end_first=had_it,
                abandoned=transcripts.TOOL_CALL_STATE_CANCELLED,
            )

    def close(self) -> None:
        """Close what the end leaves open."""
        assert self.end is not None
        for request_id in list(self.open_questions):
            answer = self.answers.get(request_id)
            if answer is None or self.cancelled:
                self.settle(request_id)
            else:
                self.settle_answered(answer)
        self.builder.seal_all(self.end.abandoned)

    def told_end(self, head_commit: str) -> TurnEnd:
        """Say how the turn ended, once nothing of it is open any more; return what was said."""
        assert self.end is not None
        told = TurnEnd(reason=self.end.reason, head_commit=head_commit)
        if self.end.failure is not None:
            told.failure.CopyFrom(self.end.failure)
        if self.usage.ByteSize():
            told.usage.CopyFrom(self.usage)
        self.builder.end_turn(told)
        return told

    def restarted(self) -> None:
        """Say that the agent does not remember earlier turns."""
        words = "The agent was started afresh; it does not remember what was said before"
        self.builder.notice(transcripts.NOTICE_KIND_AGENT_RESTARTED, words)

    @property
    def worth_storing(self) -> bool:
        """Whether there is more to store than how far the events were read; what said nothing may be read again."""
        last_event, *told = self._stored
        return told != [self.builder.count, self.accepted, self.state] or (
            bool(self.builder.changed or self._asked or self._offer_changed)
            or self.last_event - last_event >= _READ_AGAIN
        )

    def take(self) -> Progress:
        """Return what changed since the last call."""
        progress = Progress(
            last_event=self.last_event,
            entry_count=self.builder.count,
            accepted=self.accepted,
            drafts=self.builder.take_changed(),
            asked=[_copy(one) for one in self._asked.values()],
            state=self.state if self.end is None else self.end.state,
            offer=self.offer if self._offer_changed else None,
        )
        self._asked.clear()
        self._offer_changed = False
        self._stored = (progress.last_event, progress.entry_count, progress.accepted, progress.state)
        return progress

    def _caused(self, number: int) -> None:
        if self.rpc_id and number > self.mark:
            self.accepted = True

    def _take_answer(self, message: Mapping[str, Any], number: int) -> None:
        rpc_id = message.get("id")
        if is_whole(rpc_id) and rpc_id >= MARKS:
            self.marks[rpc_id] = number
        elif self.rpc_id and rpc_id == self.rpc_id:
            if self.withdrawing:
                self.withdrawn = True
                return
            self.accepted = True
            self._finish(message)

    def _take_question(self, method: str, rpc_id: object, params: Mapping[str, Any]) -> None:
        builder = self.builder
        request = InputRequest(
            organization_id=self.record.organization_id,
            task_id=self.record.task_id,
            session_id=self.record.session_id,
            turn=self.record.turn,
            state=transcripts.INPUT_REQUEST_STATE_PENDING,
            create_time=builder.now(),
            revision=1,
        )
        if method == questions.PERMISSION:
            call = builder.call_of(questions.named_call(params))
            request.permission.CopyFrom(questions.permission(params, call))
        else:
            form = questions.question(params)
            if form is None:
                self.not_understood.append(rpc_text(rpc_id))
                return
            request.question.CopyFrom(form)
        entry = builder.question(lambda number: questions.question_id(self.record.session_id, number))
        request.id, request.entry_id = entry.input_request_id, entry.id
        self.open_questions[request.id] = self._asked[request.id] = Asked(request, rpc_text(rpc_id))

    def _look_at(self, update: Mapping[str, Any]) -> None:
        """Take what an update says beside the transcript: the model, the mode, the tokens used."""
        kind = text_of(update, "sessionUpdate")
        if kind == "current_mode_update":
            self._work_with("mode", text_of(update, "currentModeId") or text_of(update, "modeId"))
        elif kind == "config_option_update":
            offer = relisted(self.offer, update)
            if offer != self.offer:
                self.offer, self._offer_changed = offer, True
            for chosen in ("mode", "model"):
                self._work_with(chosen, choice(update, chosen).current)
        elif kind == "usage_update" and not self.usage.total_tokens:
            self.usage.total_tokens = usage_of({"totalTokens": update.get("used")}).total_tokens
        else:
            added(self.usage, usage_of(member(member(update, "_meta"), "usage")))

    def _work_with(self, kind: str, chosen: str) -> None:
        """Note that the agent works in another mode or with another model, if it is another one."""
        if not is_usable(chosen) or chosen == getattr(self.offer, kind):
            return
        self.offer = replace(self.offer, **{kind: chosen})
        self._offer_changed = True
        items = self.offer.agent.modes if kind == "mode" else self.offer.agent.models
        changed = transcripts.NOTICE_KIND_MODE_CHANGED if kind == "mode" else transcripts.NOTICE_KIND_MODEL_CHANGED
        self.builder.notice(changed, f"The agent works with the {kind} {name_of(items, chosen)}", by_agent=True)

    def _finish(self, message: Mapping[str, Any]) -> None:
        if self.over:
            return
        if "error" in message and not self.cancelled:
            error = AgentError.of(member(message, "error"))
            self.fail(refused(f"the agent failed: {error}", error))
            return
        result = member(message, "result")
        said = str(result.get("stopReason", "end_turn"))
        if said not in _STOP_REASONS:
            words = f"The turn ended in a way that is not known here: {said}"
            self.builder.notice(transcripts.NOTICE_KIND_UNKNOWN_UPDATE, words, {"stopReason": said})
        used = usage_of(member(result, "usage"))
        if used.ByteSize():
            self.usage = used
        reason = _STOP_REASONS.get(said, transcripts.STOP_REASON_END_TURN)
        abandoned = INTERRUPTED
        if self.cancelled:  # agents say "end_turn" of it, or an error
            reason, abandoned = transcripts.STOP_REASON_CANCELLED, transcripts.TOOL_CALL_STATE_CANCELLED
        self.end = End(sessions_pb2.SESSION_STATE_IDLE, reason, abandoned=abandoned)


def _copy(asked: Asked) -> Asked:
    request = InputRequest()
    request.CopyFrom(asked.request)
    return Asked(request, asked.rpc_id)
