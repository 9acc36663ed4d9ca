"""The way to one session's agent, for what a turn says to it."""

import asyncio
import json
import secrets
from dataclasses import dataclass
from typing import Any

from services.runtime.logging import get_logger
from services.runtime.retry import Backoff
from services.sandbox.agent_server import AgentError, AgentServer, Json, Unreachable
from services.sandbox.records import SessionRecord
from services.sandbox.turn import MARKS

log = get_logger(__name__)

_ATTEMPTS = 6


@dataclass(frozen=True, slots=True)
class AgentLink:
    """A connection of a sandbox-agent server, and the session behind it."""

    server: AgentServer
    record: SessionRecord

    @property
    def connection(self) -> str:
        """Id of the connection."""
        return self.record.connection

    async def prompt(self, blocks: list[Json], rpc_id: int, timeout_seconds: float) -> Json:
        """Give the agent a prompt and return its answer, at the end of the turn if at all."""
        params = {"sessionId": self.record.acp_session_id, "prompt": blocks}
        return await self.server.ask(self.connection, "session/prompt", params, rpc_id, timeout_seconds=timeout_seconds)

    async def mark(self, rpc_id: int, timeout_seconds: float) -> None:
        """Ask for something that no agent knows: its refusal, in the stream, stands behind all that was said before."""
        await self.server.ask(self.connection, "_branchline/mark", {}, rpc_id, timeout_seconds=timeout_seconds)

    async def cancel(self) -> None:
        """Ask the agent to end its turn. It may be asked again."""
        await self.say({"method": "session/cancel", "params": {"sessionId": self.record.acp_session_id}})

    async def answer(self, rpc_id: str, result: Json) -> None:
        """Answer what the agent waits for."""
        await self.say({"id": json.loads(rpc_id), "result": result})

    async def refuse(self, rpc_id: str) -> None:
        """Answer a request for something that is not offered here."""
        await self.say({"id": json.loads(rpc_id), "error": {"code": -32601, "message": "Method not found"}})

    async def say(self, message: dict[str, Any]) -> None:
        """Send a message that may arrive twice; try again if the server cannot be reached.

        An agent that is gone is noticed elsewhere.
        """
        backoff = Backoff(first_seconds=0.1, most_seconds=2.0)
        for _ in range(_ATTEMPTS):
            try:
                await self.server.post(self.connection, message)
                return
            except Unreachable:
                await asyncio.sleep(backoff.next_seconds())
            except AgentError as error:
                log.info("agent not told", session=self.record.session_id, reason=str(error))
                return


def new_mark() -> int:
    """Make the id of a request that sets a mark."""
    return MARKS + secrets.randbelow(MARKS)
