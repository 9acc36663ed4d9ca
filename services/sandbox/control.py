"""What people want of a working agent: answers to its questions, and that it stops.

What the agent was told is remembered for the life of the follower alone. After a restart it is told again: that is
harmless, and nothing is lost.
"""

import asyncio
from dataclasses import dataclass

from services.runtime.database import Database, Reader
from services.runtime.signal import Signal
from services.sandbox import faults
from services.sandbox.link import AgentLink
from services.sandbox.persistence import stored
from services.sandbox.sessions import Permission, SessionRecord, SessionStore
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
        record, answers = self.link.record, list(turn.answers.values())
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

    def _wanted(self, tx: Reader) -> tuple[SessionRecord | None, list[Permission]]:
        session_id = self.turn.record.session_id
        asked = self.sessions.permissions(tx, session_id) if self.turn.open_questions else []
        return self.sessions.find(tx, session_id), asked

    async def _answer(self, answer: Permission) -> None:
        if not answer.option_id or answer.entry_id not in self.turn.open_questions:
            return
        self.turn.answers[answer.entry_id] = answer
        await self.link.answer(answer.rpc_id, {"outcome": "selected", "optionId": answer.option_id})
        faults.reached("answer told")
        self.turn.settle_answered(answer)

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
        for entry_id, rpc_id in list(turn.open_questions.items()):
            await self.link.answer(rpc_id, {"outcome": "cancelled"})
            turn.settle(entry_id, "cancelled")
