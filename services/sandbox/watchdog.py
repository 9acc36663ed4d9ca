"""Ends turns that would not end by themselves: the agent is gone, or silent, or does not stop, or takes too long."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from branchline.v1.common_pb2 import FAILURE_REASON_AGENT_SILENT, FAILURE_REASON_TIMED_OUT

from services.runtime.failures import failed
from services.runtime.logging import get_logger
from services.runtime.signal import Signal
from services.sandbox.agent_server import AgentError, Unreachable
from services.sandbox.control import Control
from services.sandbox.limits import Limits
from services.sandbox.link import AgentLink, new_mark
from services.sandbox.reasons import exited
from services.sandbox.turn import Turn

log = get_logger(__name__)

_MOST_BETWEEN_LOOKS_SECONDS = 1.0
_REFUSALS = 2


@dataclass(slots=True)
class Watchdog:
    """Watches one turn."""

    turn: Turn
    link: AgentLink
    control: Control
    limits: Limits
    news: Signal
    wall_time: Callable[[], float]
    """Seconds since 1970: a turn's length is counted over restarts."""

    _heard: float = 0.0
    _probed: float | None = None
    _looked: float = 0.0
    _refusals: int = 0

    def heard(self) -> None:
        """Note a sign of life."""
        self._heard = asyncio.get_running_loop().time()
        self._probed = None

    async def run(self) -> None:
        """Watch until the turn is over."""
        self.heard()
        self._looked = self._heard
        shortest = min(self.limits.silence_seconds, self.limits.answer_seconds, self.limits.cancel_seconds)
        pause = min(_MOST_BETWEEN_LOOKS_SECONDS, shortest / 4)
        while not self.turn.over:
            await asyncio.sleep(pause)
            await self._look(asyncio.get_running_loop().time())
            if self.turn.over:
                self.news.notify()

    async def _look(self, now: float) -> None:
        turn, limits = self.turn, self.limits
        if self.wall_time() - turn.record.turn_time > limits.turn_seconds:
            hours = limits.turn_seconds / 3600
            words = f"the turn took longer than {hours:g} hours"
            turn.fail(failed(FAILURE_REASON_TIMED_OUT, words), end_first=True)
        cancelled = self.control.cancel_time
        if cancelled is not None and now - cancelled > limits.cancel_seconds:
            turn.give_up()
        if turn.busy:
            self.heard()
        elif self._probed is not None and now - self._probed > limits.answer_seconds:
            words = f"the agent said nothing for {now - self._heard:.0f} seconds and was ended"
            turn.fail(failed(FAILURE_REASON_AGENT_SILENT, words), end_first=True)
        elif self._probed is None and now - self._heard > limits.silence_seconds:
            self._probed = now
            await self._ask()
        if now - self._looked > limits.alive_seconds:
            self._looked = now
            await self._look_for_process()

    async def _ask(self) -> None:
        """Ask for a sign of life; it comes as an event."""
        log.info("silent agent probed", session=self.link.record.session_id)
        try:
            await self.link.mark(new_mark(), min(self.limits.mark_seconds, self.limits.answer_seconds))
        except (AgentError, Unreachable) as error:
            log.info("silent agent does not answer", session=self.link.record.session_id, reason=str(error))

    async def _look_for_process(self) -> None:
        """Notice an agent that died without a word: writing to it fails.

        JSON-RPC receivers pass over notifications that begin with "$/".
        """
        try:
            await self.link.server.post(self.link.connection, {"method": "$/alive"})
            self._refusals = 0
        except AgentError as error:
            self._refusals += 1
            if self._refusals >= _REFUSALS:
                self.turn.agent_gone(exited(f"the agent is gone: {error}"))
        except Unreachable:
            pass  # the stream finds out what became of the machine
