"""Queries about agent sessions: the turn each works on, what its agent says and asks, and what people want of it.

Each writes only its own columns. What a follower stores is guarded by the turn and the generation of the agent that it
follows: one that was overtaken changes nothing.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from branchline.v1 import sessions_pb2
from branchline.v1.sessions_pb2 import TranscriptEntry
from branchline.v1.vocabulary_pb2 import ENTITY_KIND_SESSION
from branchline_internal.sandbox.v1.sandbox_pb2 import AgentSession, StartTurnRequest
from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy import bindparam, case, delete, or_, select, update

from services.runtime.database import Reader, Statement, Tx, insert_new, upsert
from services.runtime.errors import NotFound
from services.runtime.spine.outbox import Mark, Outbox
from services.sandbox.tables import agent_sessions, drafts, permissions, prompts
from services.sandbox.transcript import Draft, TranscriptBuilder, cut

Status = sessions_pb2.SessionStatus.ValueType

WORKING = (sessions_pb2.SESSION_STATUS_RUNNING, sessions_pb2.SESSION_STATUS_WAITING)

_s = agent_sessions.c
_WORKS = or_(*(_s.status == status for status in WORKING))
_THIS = _s.session_id == bindparam("session")
_FOLLOWED = (_THIS, _s.turn == bindparam("of_turn"), _s.generation == bindparam("of_generation"), _WORKS)


class Overtaken(Exception):
    """Another turn or another agent has taken the place of the one that was followed."""


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """An agent session as its row holds it."""

    session_id: str
    sandbox_id: str
    task_id: str
    agent: str
    model: str
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
    status: Status
    revision: int

    @property
    def connection(self) -> str:
        """Id of the agent's connection at the sandbox-agent server."""
        return f"{self.session_id}-{self.generation}"

    @property
    def works(self) -> bool:
        """Whether there is a turn to be done."""
        return self.status in WORKING


@dataclass(frozen=True, slots=True)
class Permission:
    """An open permission request. One with an option is answered."""

    entry_id: str
    rpc_id: str
    option_id: str
    user_id: str


@dataclass(frozen=True, slots=True)
class Asked:
    """A permission request that the agent has just made."""

    entry_id: str
    rpc_id: str


@dataclass(frozen=True, slots=True)
class Progress:
    """What has become of a turn since it was last stored."""

    last_event: int
    entry_count: int
    accepted: bool
    drafts: Sequence[Draft]
    asked: Sequence[Asked]
    settled: Sequence[str]
    status: Status
    """Where the session stands now."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A session with all that a follower begins with."""

    record: SessionRecord
    prompt: StartTurnRequest | None = None
    drafts: Mapping[str, Draft] = field(default_factory=dict[str, Draft])
    permissions: Sequence[Permission] = ()


def _returning(statement: Any) -> Statement:
    return Statement(statement.returning(*agent_sessions.c))


_FIND = Statement(select(agent_sessions).where(_THIS))
_OPEN = Statement(
    select(agent_sessions, prompts.c.payload.label("prompt"))
    .outerjoin(prompts, prompts.c.session_id == _s.session_id)
    .where(_THIS)
)
_UNFINISHED = Statement(select(_s.session_id).where(or_(_WORKS, _s.ending, _s.closing)))
_PROCESSES = Statement(select(_s.process).where(_s.sandbox_id == bindparam("sandbox"), _s.process != ""))
_ADD = Statement(insert_new(agent_sessions, ["session_id"]))
_BEGIN = _returning(
    update(agent_sessions)
    .where(_THIS)
    .values(
        sandbox_id=bindparam("to_sandbox"),
        task_id=bindparam("to_task"),
        agent=bindparam("to_agent"),
        model=bindparam("to_model"),
        generation=_s.generation + 1,
        acp_session_id="",
        process="",
        ending=True,
        last_event=0,
        prompt_rpc_id=0,
        mark=0,
    )
)
_OPENED = _returning(
    update(agent_sessions)
    .where(_THIS, _s.generation == bindparam("of_generation"))
    .values(acp_session_id=bindparam("acp_session"), process=bindparam("named"), ending=False)
)
_REOPEN = Statement(update(agent_sessions).where(_THIS).values(closing=False))
_STAND_IDLE = Statement(
    update(agent_sessions)
    .where(_THIS, _s.status != WORKING[0], _s.status != WORKING[1])
    .values(status=sessions_pb2.SESSION_STATUS_IDLE)
)
_START_TURN = Statement(
    update(agent_sessions)
    .where(_THIS, _s.turn < bindparam("to_turn"))
    .values(
        turn=bindparam("to_turn"),
        turn_time=bindparam("now"),
        posts=0,
        prompt_rpc_id=0,
        mark=0,
        accepted=False,
        cancel_turn=0,
        ending=case((or_(_s.ending, _s.closing, _WORKS), True), else_=False),
        closing=False,
        status=sessions_pb2.SESSION_STATUS_RUNNING,
    )
    .returning(_s.ending)
)
_PUT_PROMPT = Statement(upsert(prompts, ["session_id"]))
_DROP_PROMPT = Statement(delete(prompts).where(prompts.c.session_id == bindparam("session")))
_WANT_CANCEL = Statement(
    update(agent_sessions)
    .where(_THIS, _s.turn == bindparam("of_turn"), _WORKS)
    .values(cancel_turn=bindparam("of_turn"))
)
_WANT_CLOSE = Statement(
    update(agent_sessions).where(_THIS, _s.status != sessions_pb2.SESSION_STATUS_CLOSED).values(closing=True)
)
_POST = Statement(
    update(agent_sessions)
    .where(*_FOLLOWED)
    .values(posts=bindparam("to_posts"), prompt_rpc_id=bindparam("to_rpc_id"), mark=bindparam("to_mark"))
)
_PROGRESS = Statement(
    update(agent_sessions)
    .where(*_FOLLOWED, _s.status == bindparam("to_status"))
    .values(
        last_event=bindparam("to_event"),
        entry_count=bindparam("to_count"),
        accepted=bindparam("is_accepted"),
    )
)
_STAND = _returning(
    update(agent_sessions)
    .where(*_FOLLOWED)
    .values(
        last_event=bindparam("to_event"),
        entry_count=bindparam("to_count"),
        accepted=bindparam("is_accepted"),
        status=bindparam("to_status"),
        revision=_s.revision + 1,
    )
)
_FINISH = _returning(
    update(agent_sessions)
    .where(*_FOLLOWED)
    .values(
        last_event=bindparam("to_event"),
        entry_count=bindparam("to_count"),
        status=bindparam("to_status"),
        revision=_s.revision + 1,
        cancel_turn=0,
        ending=bindparam("is_ending"),
        acp_session_id=case((bindparam("is_ending", type_=_s.ending.type), ""), else_=_s.acp_session_id),
    )
)
_AGENT_GONE = _returning(
    update(agent_sessions)
    .where(_THIS, _s.generation == bindparam("of_generation"))
    .values(ending=False, process="", acp_session_id="")
)
_END_AGENT = _returning(update(agent_sessions).where(*_FOLLOWED).values(ending=True, acp_session_id=""))
_CLOSED = _returning(
    update(agent_sessions)
    .where(_THIS, _s.closing)
    .values(
        closing=False,
        ending=False,
        process="",
        acp_session_id="",
        cancel_turn=0,
        status=sessions_pb2.SESSION_STATUS_CLOSED,
        entry_count=bindparam("to_count"),
        revision=_s.revision + 1,
    )
)
_DRAFTS = Statement(select(drafts).where(drafts.c.session_id == bindparam("session")).order_by(drafts.c.number))
_OPEN_DRAFTS = Statement(
    select(drafts, permissions.c.rpc_id, permissions.c.option_id, permissions.c.user_id)
    .outerjoin(permissions, permissions.c.entry_id == drafts.c.id)
    .where(drafts.c.session_id == bindparam("session"))
    .order_by(drafts.c.number)
)
_PUT_DRAFT = Statement(upsert(drafts, ["id"], keep=["session_id", "number", "tool_call_id"]))
_DROP_DRAFT = Statement(delete(drafts).where(drafts.c.id == bindparam("entry")))
_DRAFT = Statement(
    select(drafts.c.payload).where(drafts.c.id == bindparam("entry"), drafts.c.session_id == bindparam("session"))
)
_ASK = Statement(insert_new(permissions, ["entry_id"]))
_PERMISSIONS = Statement(select(permissions).where(permissions.c.session_id == bindparam("session")))
_ANSWER = Statement(
    update(permissions)
    .where(
        permissions.c.entry_id == bindparam("entry"),
        permissions.c.session_id == bindparam("session"),
        permissions.c.option_id == "",
    )
    .values(option_id=bindparam("option"), user_id=bindparam("user"))
)
_DROP_PERMISSION = Statement(delete(permissions).where(permissions.c.entry_id == bindparam("entry")))
_DROP_PERMISSIONS = Statement(delete(permissions).where(permissions.c.session_id == bindparam("session")))


@dataclass(frozen=True, slots=True)
class SessionStore:
    """The agent sessions of this service."""

    outbox: Outbox
    now: Callable[[], Timestamp]

    def find(self, tx: Reader, session_id: str) -> SessionRecord | None:
        """Return a session, or None."""
        row = tx.row(_FIND, {"session": session_id})
        return _record(row._asdict()) if row is not None else None

    def get(self, tx: Reader, session_id: str) -> SessionRecord:
        """Return a session; raise NotFound."""
        record = self.find(tx, session_id)
        if record is None:
            raise NotFound(ENTITY_KIND_SESSION, session_id)
        return record

    def opened(self, tx: Reader, session_id: str) -> Opened | None:
        """Return a session; if it has a turn to do, with its prompt, its open entries and its open questions."""
        row = tx.row(_OPEN, {"session": session_id})
        if row is None:
            return None
        values = row._asdict()
        payload = values.pop("prompt")
        record = _record(values)
        if not record.works:
            return Opened(record)
        prompt = StartTurnRequest.FromString(payload) if payload is not None else None
        rows = tx.rows(_OPEN_DRAFTS, {"session": session_id})
        asked = [Permission(one.id, one.rpc_id, one.option_id, one.user_id) for one in rows if one.rpc_id is not None]
        return Opened(record, prompt, {one.id: _draft(one) for one in rows}, asked)

    def unfinished(self, tx: Reader) -> list[str]:
        """Return the sessions that have a turn to do, an agent to be ended, or are to be closed."""
        return [row.session_id for row in tx.rows(_UNFINISHED)]

    def processes(self, tx: Reader, sandbox_id: str) -> set[str]:
        """Return the names of all processes of a sandbox that are a session's agent."""
        return {row.process for row in tx.rows(_PROCESSES, {"sandbox": sandbox_id})}

    def begin(self, tx: Tx, session_id: str, sandbox_id: str, task_id: str, agent: str, model: str) -> SessionRecord:
        """Give a session, new or known, its next agent, which is yet to be started.

        Until it has, it is one to be ended: whatever breaks off its start, nothing of it stays.
        """
        tx.change(_ADD, _new(session_id))
        given = {"to_sandbox": sandbox_id, "to_task": task_id, "to_agent": agent, "to_model": model}
        return _followed(tx.row(_BEGIN, {"session": session_id, **given}))

    def reopen(self, tx: Tx, session_id: str, sandbox_id: str, task_id: str, agent: str, model: str) -> SessionRecord:
        """Give a session its next agent though it was to be closed; a wish to close that comes later counts."""
        tx.change(_REOPEN, {"session": session_id})
        return self.begin(tx, session_id, sandbox_id, task_id, agent, model)

    def agent_opened(self, tx: Tx, record: SessionRecord, acp_session_id: str, process: str) -> SessionRecord:
        """Note that a session's agent has started. Raise Overtaken if it has another one by now."""
        given = {"acp_session": acp_session_id, "named": process}
        return _followed(tx.row(_OPENED, {**_generation(record), **given}))

    def stand_idle(self, tx: Tx, session_id: str) -> None:
        """Note that a session takes turns, if it has none to do."""
        tx.change(_STAND_IDLE, {"session": session_id})

    def start_turn(self, tx: Tx, request: StartTurnRequest, now: float) -> None:
        """Give a session a turn, unless it had it before. An agent that works on an earlier one is to be ended.

        Raise NotFound.
        """
        this = {"session": request.session_id}
        started = tx.row(_START_TURN, {**this, "to_turn": request.turn, "now": now})
        if started is None:
            self.get(tx, request.session_id)
            return
        if started.ending:  # the end of a turn leaves no questions; one that is cut off may
            tx.change(_DROP_PERMISSIONS, this)
        tx.change(_PUT_PROMPT, {"session_id": request.session_id, "payload": request.SerializeToString()})

    def want_cancel(self, tx: Tx, session_id: str, turn: int) -> None:
        """Record that a turn shall be cancelled, if it is the one being done."""
        tx.change(_WANT_CANCEL, {"session": session_id, "of_turn": turn})

    def want_close(self, tx: Tx, session_id: str) -> None:
        """Record that a session shall be closed, if it is there and is not."""
        tx.change(_WANT_CLOSE, {"session": session_id})

    def answer(self, tx: Tx, session_id: str, entry_id: str, option_id: str, user_id: str) -> bool:
        """Record the first answer to a question that is open; return False for any other, which is dropped."""
        payload = tx.value(_DRAFT, {"entry": entry_id, "session": session_id})
        if payload is None:
            return False
        if option_id not in [option.id for option in TranscriptEntry.FromString(payload).options]:
            return False
        given = {"entry": entry_id, "session": session_id, "option": option_id, "user": user_id}
        return tx.change(_ANSWER, given) > 0

    def permissions(self, tx: Reader, session_id: str) -> list[Permission]:
        """Return the open questions of a session."""
        rows = tx.rows(_PERMISSIONS, {"session": session_id})
        return [Permission(row.entry_id, row.rpc_id, row.option_id, row.user_id) for row in rows]

    def post(self, tx: Tx, record: SessionRecord, posts: int, rpc_id: int, mark: int) -> None:
        """Note that the prompt is about to be posted. Raise Overtaken."""
        if not tx.change(_POST, {**_followed_by(record), "to_posts": posts, "to_rpc_id": rpc_id, "to_mark": mark}):
            raise Overtaken

    def progress(self, tx: Tx, record: SessionRecord, progress: Progress) -> None:
        """Store how far a turn has come. Raise Overtaken."""
        given = {**_followed_by(record), **_read(progress)}
        given |= {"is_accepted": progress.accepted, "to_status": progress.status}
        if not tx.change(_PROGRESS, given):  # it stands elsewhere now
            self._tell(tx, _followed(tx.row(_STAND, given)))
        self._keep(tx, record.session_id, progress)

    def finish(
        self, tx: Tx, record: SessionRecord, progress: Progress, reason: str, head_commit: str, *, end_agent: bool
    ) -> None:
        """Store the end of a turn, with all that was said before it. Raise Overtaken."""
        given = {**_followed_by(record), **_read(progress), "to_status": progress.status, "is_ending": end_agent}
        ended = _followed(tx.row(_FINISH, given))
        self._keep(tx, record.session_id, progress)
        tx.change(_DROP_PROMPT, {"session": record.session_id})
        tx.change(_DROP_PERMISSIONS, {"session": record.session_id})
        self._tell(tx, ended, reason, head_commit)

    def end_agent(self, tx: Tx, record: SessionRecord) -> SessionRecord:
        """Note that a turn's agent must be gone before anything else starts. Raise Overtaken."""
        return _followed(tx.row(_END_AGENT, _followed_by(record)))

    def agent_gone(self, tx: Tx, record: SessionRecord) -> SessionRecord:
        """Note that a session's agent is confirmed gone. Raise Overtaken if it has another one."""
        return _followed(tx.row(_AGENT_GONE, _generation(record)))

    def close(self, tx: Tx, session_id: str) -> None:
        """Close a session whose agent is gone, unless that is not wanted any more."""
        record = self.get(tx, session_id)
        if not record.closing:
            return
        builder = TranscriptBuilder(
            session_id, record.task_id, record.turn, record.entry_count, self.now, dict(self._drafts(tx, session_id))
        )
        builder.seal_all("interrupted")
        closed = _followed(tx.row(_CLOSED, {"session": session_id, "to_count": builder.count}))
        self._keep_entries(tx, builder.take_changed())
        tx.change(_DROP_PROMPT, {"session": session_id})
        tx.change(_DROP_PERMISSIONS, {"session": session_id})
        self._tell(tx, closed)

    def _keep(self, tx: Tx, session_id: str, progress: Progress) -> None:
        self._keep_entries(tx, progress.drafts)
        asked = [
            {
                "entry_id": asked.entry_id,
                "session_id": session_id,
                "rpc_id": asked.rpc_id,
                "option_id": "",
                "user_id": "",
            }
            for asked in progress.asked
        ]
        tx.change_many(_ASK, asked)
        tx.change_many(_DROP_PERMISSION, [{"entry": entry_id} for entry_id in progress.settled])

    def _keep_entries(self, tx: Tx, changed: Sequence[Draft]) -> None:
        """Push entries, and keep those that may still change."""
        tx.change_many(_PUT_DRAFT, [_draft_row(draft) for draft in changed if draft.entry.streaming])
        tx.change_many(_DROP_DRAFT, [{"entry": draft.entry.id} for draft in changed if not draft.entry.streaming])
        self.outbox.mark(tx, [Mark(draft.entry.id, draft.entry.revision, draft.entry) for draft in changed])

    def _tell(self, tx: Tx, record: SessionRecord, reason: str = "", head_commit: str = "") -> None:
        state = AgentSession(
            session_id=record.session_id,
            task_id=record.task_id,
            status=record.status,
            status_reason=cut(reason),
            turn=record.turn,
            head_commit=head_commit,
            revision=record.revision,
        )
        self.outbox.mark(tx, [Mark(record.session_id, record.revision, state)])

    def _drafts(self, tx: Reader, session_id: str) -> dict[str, Draft]:
        rows = tx.rows(_DRAFTS, {"session": session_id})
        return {row.id: _draft(row) for row in rows}


def rpc_text(rpc_id: object) -> str:
    """Return a request's id, a word or a number, as it is kept."""
    return json.dumps(rpc_id)


def _new(session_id: str) -> dict[str, Any]:
    words = ("sandbox_id", "task_id", "agent", "model", "acp_session_id", "process")
    numbers = ("generation", "last_event", "entry_count", "turn", "posts", "prompt_rpc_id", "mark", "cancel_turn")
    return {
        "session_id": session_id,
        **dict.fromkeys(words, ""),
        **dict.fromkeys(numbers, 0),
        **dict.fromkeys(("ending", "closing", "accepted"), False),
        "turn_time": 0.0,
        "status": sessions_pb2.SESSION_STATUS_PENDING,
        "revision": 0,
    }


def _record(values: dict[str, Any]) -> SessionRecord:
    for name in ("ending", "closing", "accepted"):
        values[name] = bool(values[name])
    return SessionRecord(**values)


def _followed(row: Any) -> SessionRecord:
    if row is None:
        raise Overtaken
    return _record(row._asdict())


def _generation(record: SessionRecord) -> dict[str, Any]:
    return {"session": record.session_id, "of_generation": record.generation}


def _followed_by(record: SessionRecord) -> dict[str, Any]:
    return {**_generation(record), "of_turn": record.turn}


def _read(progress: Progress) -> dict[str, Any]:
    return {"to_event": progress.last_event, "to_count": progress.entry_count}


def _draft(row: Any) -> Draft:
    return Draft(TranscriptEntry.FromString(row.payload), row.number, row.tool_call_id)


def _draft_row(draft: Draft) -> dict[str, Any]:
    return {
        "id": draft.entry.id,
        "session_id": draft.entry.session_id,
        "number": draft.number,
        "tool_call_id": draft.tool_call_id,
        "payload": draft.entry.SerializeToString(),
    }
