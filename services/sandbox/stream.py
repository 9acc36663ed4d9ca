"""Reads what an agent says, straight into the turn, connecting again after every break.

Events are numbered. Where numbers are missing the stream is opened once more from the last one that was read; what is
missing then, too, is lost, and the transcript says how much.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from branchline.v1.common_pb2 import FAILURE_REASON_SANDBOX_LOST

from services.runtime.failures import failed
from services.runtime.logging import get_logger
from services.runtime.retry import Backoff
from services.sandbox.agent_server import AgentError, AgentEvent, Unreachable
from services.sandbox.link import AgentLink
from services.sandbox.machines import Machines
from services.sandbox.providers.base import Condition
from services.sandbox.reasons import exited
from services.sandbox.turn import Turn

log = get_logger(__name__)

_REFUSALS = 3


@dataclass(slots=True)
class EventStream:
    """The events of one agent."""

    turn: Turn
    link: AgentLink
    machines: Machines
    silence_seconds: float
    heard: Callable[[], None]
    """Called after each event."""

    _gap_seen: int = -1
    _refusals: int = 0

    async def run(self) -> None:
        """Read until the turn is over."""
        backoff = Backoff(first_seconds=0.05, most_seconds=2.0)
        server, connection = self.link.server, self.link.connection
        while not self.turn.over:
            try:
                async with server.events(connection, self.turn.last_event, self.silence_seconds) as events:
                    async for event in events:
                        self._refusals = 0
                        if self._is_gap(event):
                            break
                        backoff.reset()
                        self.turn.apply(event)
                        self.heard()
                        if self.turn.over:
                            return
            except Unreachable as error:
                log.info("event stream broke", session=self.link.record.session_id, reason=str(error))
                seen = await self.machines.look(self.link.record.sandbox_id)
                if seen.condition is Condition.GONE:
                    why = f" ({seen.words})" if seen.words else ""
                    words = f"the machine stopped in mid-turn{why}; send a message to go on"
                    self.turn.agent_gone(failed(FAILURE_REASON_SANDBOX_LOST, words))
            except AgentError as error:
                self._refusals += 1
                if self._refusals >= _REFUSALS:
                    self.turn.agent_gone(exited(f"the agent was lost: {error}"))
            if not self.turn.over:
                await asyncio.sleep(backoff.next_seconds())
        self.heard()

    def _is_gap(self, event: AgentEvent) -> bool:
        """Say whether events before this one may be had by another look; note them as lost if not."""
        missing = event.number - self.turn.last_event - 1
        if missing <= 0:
            return False
        if self._gap_seen != self.turn.last_event:
            self._gap_seen = self.turn.last_event
            return True
        self.turn.lose(missing)
        return False
