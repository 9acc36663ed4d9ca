"""Status sync: sees to every session that is unfinished. At most one at work per session, and only while there is any.

A session is unfinished while its agent has a turn to do, while an agent must be ended, or while it is to be closed.
"""

import asyncio
from dataclasses import dataclass, field

from services.runtime.database import Tx
from services.runtime.errors import Unavailable, reason_of
from services.runtime.logging import get_logger
from services.runtime.retry import Backoff
from services.runtime.signal import Signal
from services.sandbox.follower import FLUSH_SECONDS, Follower, Ground
from services.sandbox.records import Overtaken, SessionRecord

log = get_logger(__name__)


@dataclass(slots=True)
class StatusSync:
    """Starts a worker for every unfinished session."""

    ground: Ground
    _workers: dict[str, Signal] = field(default_factory=dict[str, Signal])
    _wanted: asyncio.Queue[str] = field(default_factory=asyncio.Queue[str])

    def wake(self, session_id: str) -> None:
        """See to a session, or have its worker look at it again."""
        self._wanted.put_nowait(session_id)

    async def sweep(self) -> None:
        """See to every session that is unfinished; at the start these are those that the service was stopped at."""
        for session_id in await self.ground.database.read(self.ground.sessions.unfinished):
            if session_id not in self._workers:
                self.wake(session_id)

    async def run(self) -> None:
        """See to sessions for ever."""
        async with asyncio.TaskGroup() as group:
            while True:
                session_id = await self._wanted.get()
                if session_id in self._workers:
                    self._workers[session_id].notify()
                    continue
                self._workers[session_id] = Signal()
                group.create_task(self._see_to(session_id, self._workers[session_id]))

    async def _see_to(self, session_id: str, wishes: Signal) -> None:
        backoff = Backoff(first_seconds=0.5, most_seconds=30.0)
        while True:
            ticket = wishes.ticket
            try:
                if await self._step(session_id, wishes, ticket):
                    backoff.reset()
                    continue
            except Overtaken:
                await asyncio.sleep(FLUSH_SECONDS)
                continue
            except Exception as error:
                if not isinstance(error, Unavailable):
                    log.exception("session not seen to", session=session_id)
                log.info("session is seen to again", session=session_id, reason=reason_of(error))
                await wishes.wait(wishes.ticket, backoff.next_seconds())
                continue
            if wishes.ticket == ticket:
                break
        del self._workers[session_id]

    async def _step(self, session_id: str, wishes: Signal, ticket: int) -> bool:
        """Do what is next for a session; return False if nothing is. The ticket is older than what is read here."""
        ground = self.ground
        async with ground.lanes.hold(session_id):  # no agent of it is being started, and none while it has a turn
            opened = await ground.database.read(ground.sessions.opened, session_id)
        if opened is None:
            return False
        record = opened.record
        if record.works and not record.closing:
            await Follower(ground, opened, wishes, ticket).run()
        elif record.closing or record.ending:
            await self._end_agent(session_id)
        else:
            return False
        return True

    async def _end_agent(self, session_id: str) -> None:
        """End the agent of a session, and close the session, if that is wanted once nobody starts one."""
        ground = self.ground
        async with ground.lanes.hold(session_id):
            record = await ground.database.read(ground.sessions.get, session_id)
            if record.closing or (record.ending and not record.works):
                await ground.agents.end(record)
                await ground.database.write(self._ended, record)

    def _ended(self, tx: Tx, record: SessionRecord) -> None:
        self.ground.sessions.agent_gone(tx, record)
        self.ground.sessions.close(tx, record.session_id)
