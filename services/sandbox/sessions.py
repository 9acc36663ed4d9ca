"""Queries about agent sessions: the turn each works on, what its agent says, and what people want of it.

Each writes only its own columns. What a follower stores is guarded by the turn and the generation of the agent that it
follows: one that was overtaken changes nothing.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from branchline.v1 import sessions_pb2, transcripts_pb2
from branchline.v1.agents_pb2 import Agent
from branchline.v1.common_pb2 import ENTITY_KIND_SESSION
from branchline.v1.transcripts_pb2 import InputRequest, TranscriptEntry, TurnEnd
from branchline_internal.sandbox.v1.sandbox_pb2 import AgentSession, StartTurnRequest
from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy import bindparam, case, delete, literal, or_, select, update

from services.runtime.database import Reader, Statement, Tx, insert_new, upsert
from services.runtime.errors import NotFound
from services.runtime.spine.outbox import Mark, Outbox
from services.sandbox.offers import Offer
from services.sandbox.question_store import QuestionStore
from services.sandbox.questions import Asked
from services.sandbox.records import WORKING, Opened, Overtaken, Place, Progress, SessionRecord
from services.sandbox.tables import agent_sessions, drafts, input_requests, offers, prompts
from services.sandbox.transcript import INTERRUPTED, Draft, TranscriptBuilder

_s = agent_sessions.c
_WORKS = or_(*(_s.state == state for state in WORKING))
_THIS = _s.session_id == bindparam("session")
_FOLLOWED = (_THIS, _s.turn == bindparam("of_turn"), _s.generation == bindparam("of_generation"), _WORKS)


def _returning(statement: Any) -> Statement:
    return Statement(statement.returning(*agent_sessions.c))


_FIND = Statement(select(agent_sessions).where(_THIS))
_OPEN = Statement(
    select(
        agent_sessions,
        prompts.c.payload.label("prompt"),
        offers.c.payload.label("offer"),
        offers.c.model.label("offer_model"),
        offers.c.mode.label("offer_mode"),
    )
    .outerjoin(prompts, prompts.c.session_id == _s.session_id)
    .outerjoin(offers, offers.c.session_id == _s.session_id)
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
        organization_id=bindparam("to_organization"),
        agent=bindparam("to_agent"),
        model=bindparam("to_model"),
        mode=bindparam("to_mode"),
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
_STAND_IDLE = _returning(
    update(agent_sessions)
    .where(_THIS, _s.state != WORKING[0], _s.state != WORKING[1])
    .values(state=sessions_pb2.SESSION_STATE_IDLE, revision=_s.revision + 1)
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
        state=sessions_pb2.SESSION_STATE_RUNNING,
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
    update(agent_sessions).where(_THIS, _s.state != sessions_pb2.SESSION_STATE_CLOSED).values(closing=True)
)
_POST = Statement(
    update(agent_sessions)
    .where(*_FOLLOWED)
    .values(posts=bindparam("to_posts"), prompt_rpc_id=bindparam("to_rpc_id"), mark=bindparam("to_mark"))
)
_PROGRESS = Statement(
    update(agent_sessions)
    .where(*_FOLLOWED, _s.state == bindparam("to_state"))
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
        state=bindparam("to_state"),
        revision=_s.revision + 1,
    )
)
_FINISH = _returning(
    update(agent_sessions)
    .where(*_FOLLOWED)
    .values(
        last_event=bindparam("to_event"),
        entry_count=bindparam("to_count"),
        state=bindparam("to_state"),
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
        state=sessions_pb2.SESSION_STATE_CLOSED,
        entry_count=bindparam("to_count"),
        revision=_s.revision + 1,
    )
)
_DRAFTS = Statement(select(drafts).where(drafts.c.session_id == bindparam("session")).order_by(drafts.c.number))
_PUT_DRAFT = Statement(upsert(drafts, ["id"], keep=["session_id", "number", "key"]))
_UNSETTLED = (
    select(drafts.c.id, drafts.c.number, drafts.c.key, drafts.c.payload, literal("").label("rpc_id"))
    .where(drafts.c.session_id == bindparam("session"))
    .union_all(
        select(input_requests.c.id, literal(0), literal(""), input_requests.c.payload, input_requests.c.rpc_id).where(
            input_requests.c.session_id == bindparam("session")
        )
    )
    .subquery()
)
_OPEN_UNSETTLED = Statement(select(_UNSETTLED).order_by(_UNSETTLED.c.number, _UNSETTLED.c.id))
"""Entries that may still change, and questions; an entry has no id of a request."""

_DROP_DRAFT = Statement(delete(drafts).where(drafts.c.id == bindparam("entry")))
_PUT_OFFER = Statement(upsert(offers, ["session_id"]))
_OFFER = Statement(select(offers).where(offers.c.session_id == bindparam("session")))


@dataclass(frozen=True, slots=True)
class SessionStore:
    """The agent sessions of this service."""

    outbox: Outbox
    now: Callable[[], Timestamp]

    @property
    def questions(self) -> QuestionStore:
        """What their agents wait for."""
        return QuestionStore(self.outbox, self.now)

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
        """Return a session; if it has a turn to do, with all that a follower begins with."""
        row = tx.row(_OPEN, {"session": session_id})
        if row is None:
            return None
        values = row._asdict()
        payload, offered, model, mode = (values.pop(name) for name in ("prompt", "offer", "offer_model", "offer_mode"))
        record = _record(values)
        if not record.works:
            return Opened(record)
        prompt = StartTurnRequest.FromString(payload) if payload is not None else None
        offer = Offer(Agent.FromString(offered), model, mode) if offered is not None else Offer(Agent())
        rows = tx.rows(_OPEN_UNSETTLED, {"session": session_id})
        asked = [Asked(InputRequest.FromString(row.payload), row.rpc_id) for row in rows if row.rpc_id]
        return Opened(record, prompt, offer, {row.id: _draft(row) for row in rows if not row.rpc_id}, asked)

    def unfinished(self, tx: Reader) -> list[str]:
        """Return the sessions that have a turn to do, an agent to be ended, or are to be closed."""
        return [row.session_id for row in tx.rows(_UNFINISHED)]

    def processes(self, tx: Reader, sandbox_id: str) -> set[str]:
        """Return the names of all processes of a sandbox that are a session's agent."""
        return {row.process for row in tx.rows(_PROCESSES, {"sandbox": sandbox_id})}

    def begin(self, tx: Tx, place: Place) -> SessionRecord:
        """Give a session, new or known, its next agent, which is yet to be started.

        Until it has, it is one to be ended: whatever breaks off its start, nothing of it stays.
        """
        tx.change(_ADD, _new(place))
        given = {
            "to_sandbox": place.sandbox_id,
            "to_task": place.task_id,
            "to_organization": place.organization_id,
            "to_agent": place.agent,
            "to_model": place.model,
            "to_mode": place.mode,
        }
        return _followed(tx.row(_BEGIN, {"session": place.session_id, **given}))

    def reopen(self, tx: Tx, place: Place) -> SessionRecord:
        """Give a session its next agent though it was to be closed; a wish to close that comes later counts."""
        tx.change(_REOPEN, {"session": place.session_id})
        return self.begin(tx, place)

    def agent_opened(
        self, tx: Tx, record: SessionRecord, acp_session_id: str, process: str, offer: Offer
    ) -> SessionRecord:
        """Note that a session's agent has started, and what it offers. Raise Overtaken if it has another one by now."""
        given = {"acp_session": acp_session_id, "named": process}
        opened = _followed(tx.row(_OPENED, {**_generation(record), **given}))
        self._put_offer(tx, record.session_id, offer)
        return opened

    def offer(self, tx: Reader, session_id: str) -> Offer:
        """Return what the agent of a session offers, as far as it is known."""
        row = tx.row(_OFFER, {"session": session_id})
        return Offer(Agent.FromString(row.payload), row.model, row.mode) if row is not None else Offer(Agent())

    def stand_idle(self, tx: Tx, session_id: str) -> None:
        """Tell that a session takes turns, if it has none to do."""
        row = tx.row(_STAND_IDLE, {"session": session_id})
        if row is not None:
            self._tell(tx, _followed(row))

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
            self.questions.cancel_all(tx, request.session_id)
        tx.change(_PUT_PROMPT, {"session_id": request.session_id, "payload": request.SerializeToString()})

    def want_cancel(self, tx: Tx, session_id: str, turn: int) -> None:
        """Record that a turn shall be cancelled, if it is the one being done."""
        tx.change(_WANT_CANCEL, {"session": session_id, "of_turn": turn})

    def want_close(self, tx: Tx, session_id: str) -> None:
        """Record that a session shall be closed, if it is there and is not."""
        tx.change(_WANT_CLOSE, {"session": session_id})

    def post(self, tx: Tx, record: SessionRecord, posts: int, rpc_id: int, mark: int) -> None:
        """Note that the prompt is about to be posted. Raise Overtaken."""
        if not tx.change(_POST, {**_followed_by(record), "to_posts": posts, "to_rpc_id": rpc_id, "to_mark": mark}):
            raise Overtaken

    def progress(self, tx: Tx, record: SessionRecord, progress: Progress) -> None:
        """Store how far a turn has come. Raise Overtaken."""
        given = {**_followed_by(record), **_read(progress)}
        given |= {"is_accepted": progress.accepted, "to_state": progress.state}
        if not tx.change(_PROGRESS, given):  # it stands elsewhere now
            self._tell(tx, _followed(tx.row(_STAND, given)))
        self._keep(tx, record.session_id, progress)

    def finish(self, tx: Tx, record: SessionRecord, progress: Progress, end: TurnEnd, *, end_agent: bool) -> None:
        """Store the end of a turn, with all that was said before it. Raise Overtaken."""
        given = {**_followed_by(record), **_read(progress), "to_state": progress.state, "is_ending": end_agent}
        ended = _followed(tx.row(_FINISH, given))
        self._keep(tx, record.session_id, progress)
        tx.change(_DROP_PROMPT, {"session": record.session_id})
        self._tell(tx, ended, end)

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
            session_id, record.task_id, record.turn, record.entry_count, self.now, self._drafts(tx, session_id)
        )
        builder.seal_all(INTERRUPTED)
        end = TurnEnd(reason=transcripts_pb2.STOP_REASON_CANCELLED) if record.works else TurnEnd()
        if record.works:
            builder.end_turn(end)
        closed = _followed(tx.row(_CLOSED, {"session": session_id, "to_count": builder.count}))
        self._keep_entries(tx, builder.take_changed())
        self.questions.cancel_all(tx, session_id)
        tx.change(_DROP_PROMPT, {"session": session_id})
        self._tell(tx, closed, end)

    def _keep(self, tx: Tx, session_id: str, progress: Progress) -> None:
        self._keep_entries(tx, progress.drafts)
        self.questions.keep(tx, progress.asked)
        if progress.offer is not None:
            self._put_offer(tx, session_id, progress.offer)

    def _put_offer(self, tx: Tx, session_id: str, offer: Offer) -> None:
        payload = offer.agent.SerializeToString()
        row = {"session_id": session_id, "model": offer.model, "mode": offer.mode, "payload": payload}
        tx.change(_PUT_OFFER, row)

    def _keep_entries(self, tx: Tx, changed: Sequence[Draft]) -> None:
        """Push entries, and keep those that may still change."""
        still = [draft for draft in changed if not draft.entry.HasField("end_time")]
        over = [draft for draft in changed if draft.entry.HasField("end_time")]
        tx.change_many(_PUT_DRAFT, [_draft_row(draft) for draft in still])
        tx.change_many(_DROP_DRAFT, [{"entry": draft.entry.id} for draft in over])
        self.outbox.mark(tx, [Mark(draft.entry.id, draft.entry.revision, draft.entry) for draft in changed])

    def _tell(self, tx: Tx, record: SessionRecord, end: TurnEnd | None = None) -> None:
        """Tell the task where a session stands, and how its turn ended if it has."""
        offer = self.offer(tx, record.session_id).agent
        state = AgentSession(
            session_id=record.session_id,
            task_id=record.task_id,
            state=record.state,
            turn=record.turn,
            revision=record.revision,
            models=offer.models,
            modes=offer.modes,
        )
        if end is not None:
            state.stop_reason, state.head_commit = end.reason, end.head_commit
            if end.HasField("failure"):
                state.failure.CopyFrom(end.failure)
        self.outbox.mark(tx, [Mark(record.session_id, record.revision, state)])

    def _drafts(self, tx: Reader, session_id: str) -> dict[str, Draft]:
        rows = tx.rows(_DRAFTS, {"session": session_id})
        return {row.id: _draft(row) for row in rows}


def rpc_text(rpc_id: object) -> str:
    """Return a request's id, a word or a number, as it is kept."""
    return json.dumps(rpc_id)


def _new(place: Place) -> dict[str, Any]:
    numbers = ("generation", "last_event", "entry_count", "turn", "posts", "prompt_rpc_id", "mark", "cancel_turn")
    return {
        **asdict(place),
        **dict.fromkeys(("acp_session_id", "process"), ""),
        **dict.fromkeys(numbers, 0),
        **dict.fromkeys(("ending", "closing", "accepted"), False),
        "turn_time": 0.0,
        "state": sessions_pb2.SESSION_STATE_PENDING,
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
    return Draft(TranscriptEntry.FromString(row.payload), row.number, row.key)


def _draft_row(draft: Draft) -> dict[str, Any]:
    return {
        "id": draft.entry.id,
        "session_id": draft.entry.session_id,
        "number": draft.number,
        "key": draft.key,
        "payload": draft.entry.SerializeToString(),
    }
