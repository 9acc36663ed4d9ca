"""What people want of a working agent: answers to its questions, and that it stops.

What the agent was told is remembered for the life of the follower alone. After a restart it is told again: that is
harmless, and nothing is lost.
"""

import asyncio
from dataclasses import dataclass

from services.runtime import faults
from services.runtime.database import Database, Reader
from services.runtime.signal import Signal
from services.sandbox.link import AgentLink
from services.sandbox.persistence import stored
from services.sandbox.questions import Asked, cancelled, result
from services.sandbox.records import SessionRecord
from services.sandbox.sessions import SessionStore
from services.sandbox.turn import Turn

_CANCEL_AGAIN_SECONDS = 5.0


@dataclass(slots=True)
class Control:
    """Brings wishes to one agent."""

    database: Database
    sessions: SessionStore
    turn: Turn
    link: AgentLink
    wishes: Signal
    """Told when there is something to look at."""
    ticket: int
    """Ticket of the wishes, older than what is known of them at the beginning: the link's record and the answers."""
    news: Signal
    """Told of every change of the turn."""

    cancel_time: float | None = None
    """When the agent was first told to stop, in the event loop's time."""

    async def run(self) -> None:
        """Look at what is wanted, each time there may be something."""
        turn, ticket = self.turn, self.ticket
        record, answers = self.link.record, [one for one in turn.open_questions.values() if one.answered]
        while not turn.over:
            if record is None or record.turn != turn.record.turn or record.closing or not record.works:
                turn.overtaken = True
            elif record.cancel_turn == turn.record.turn:
                await self._cancel()
            else:
                for answer in answers:
                    await self._answer(answer)
            while turn.not_understood:
                await self.link.refuse(turn.not_understood.pop(0))
            self.news.notify()
            if not turn.over:
                await self.wishes.wait(ticket, _CANCEL_AGAIN_SECONDS if turn.cancelled else None)
                ticket = self.wishes.ticket
                record, answers = await stored(lambda: self.database.read(self._wanted))

    def _wanted(self, tx: Reader) -> tuple[SessionRecord | None, list[Asked]]:
        session_id = self.turn.record.session_id
        asked = self.sessions.questions.asked(tx, session_id) if self.turn.open_questions else []
        return self.sessions.find(tx, session_id), asked

    async def _answer(self, asked: Asked) -> None:
        request = asked.request
        if not asked.answered or request.id not in self.turn.open_questions:
            return
        self.turn.answers[request.id] = request
        await self.link.answer(asked.rpc_id, result(request))
        faults.reached("answer told")
        self.turn.settle_answered(request)

    async def _cancel(self) -> None:
        """Tell the agent to stop; what it asks is answered with that. Answers that come later are dropped."""
        turn = self.turn
        if not turn.cancelled:
            turn.cancelled = True
            self.cancel_time = asyncio.get_running_loop().time()
        if not turn.rpc_id:
            return  # nothing was posted; `Prompting` ends the turn
        faults.reached("cancel wanted")
        await self.link.cancel()
        for request_id, asked in list(turn.open_questions.items()):
            await self.link.answer(asked.rpc_id, cancelled(asked.request))
            turn.settle(request_id)
