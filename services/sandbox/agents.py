"""The agents of sessions: started, shaken hands with, given a model and mode; and ended until nothing is left.

Source: https://agentclientprotocol.com (initialization, session setup, session config options).
"""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from branchline.v1.errors_pb2 import (
    ERROR_REASON_AGENT_NOT_STARTED,
    ERROR_REASON_AGENT_UNKNOWN,
    ERROR_REASON_SANDBOX_UNREACHABLE,
)

from services.runtime import faults
from services.runtime.database import Database, Tx
from services.runtime.errors import DomainError, FailedPrecondition, InvalidArgument, Unavailable
from services.runtime.lanes import Lanes
from services.runtime.logging import get_logger
from services.runtime.retry import Backoff
from services.sandbox.agent_server import AgentError, AgentServer, AgentUnknownError
from services.sandbox.machines import WORKSPACE, Machines
from services.sandbox.members import member, text_of
from services.sandbox.offers import Offer, offer_of, selection
from services.sandbox.providers.base import Condition
from services.sandbox.records import SessionRecord
from services.sandbox.reports import Reports
from services.sandbox.sessions import SessionStore
from services.sandbox.turn import AGENT_EXITED

log = get_logger(__name__)

T = TypeVar("T")

_PROTOCOL_VERSION = 1
_START_SECONDS = 120.0
_INITIALIZE, _NEW_SESSION, _SET_MODEL, _SET_MODE = 1, 2, 3, 4


@dataclass(slots=True)
class Agents:
    """Starts and ends agents. In one sandbox they start one after the other, so that processes can be told apart."""

    database: Database
    sessions: SessionStore
    machines: Machines
    reports: Reports
    end_seconds: float
    _starting: Lanes = field(default_factory=Lanes)

    async def start(self, record: SessionRecord) -> SessionRecord:
        """Start the agent of a session that is to have one. What no session claims is ended before.

        Raise InvalidArgument for an unknown agent or model, FailedPrecondition if the agent does not start, Overtaken
        if the session has another agent by now.
        """
        async with self._starting.hold(record.sandbox_id):
            provider = await self.machines.provider(record.sandbox_id)
            server = await self.machines.use(record.sandbox_id, _reached)
            claimed = await self._end_strays(record.sandbox_id)
            try:
                acp_session_id, offer = await _unless_it_ends(
                    server, record, _open(server, record, f"{server.machine.home}/{WORKSPACE}")
                )
                found = await provider.agents(record.sandbox_id) - claimed
                process = max(found, default="")
                faults.reached("agent started")
                return await self.database.write(self._opened, record, acp_session_id, process, offer)
            except (AgentError, DomainError) as error:
                await self._withdraw(server, record)
                if isinstance(error, DomainError):
                    raise
                words = f"{record.agent} did not start: {error}"
                raise FailedPrecondition(ERROR_REASON_AGENT_NOT_STARTED, words) from error

    def _opened(self, tx: Tx, record: SessionRecord, acp_session_id: str, process: str, offer: Offer) -> SessionRecord:
        opened = self.sessions.agent_opened(tx, record, acp_session_id, process, offer)
        self.reports.learn(tx, record.sandbox_id, record.task_id, [offer.agent])
        return opened

    async def end(self, record: SessionRecord) -> None:
        """End the agent of a session: its connection is not listed any more and none of its processes is left.

        Raise Unavailable if that could not be confirmed in time; what was tried can be tried again.
        """
        backoff = Backoff(first_seconds=0.1, most_seconds=2.0)
        try:
            async with asyncio.timeout(self.end_seconds):
                while not await self._ended(record):  # noqa: ASYNC110 - nothing tells when a process has ended
                    await asyncio.sleep(backoff.next_seconds())
        except TimeoutError as error:
            words = "the agent of the turn before could not be confirmed gone"
            raise Unavailable(ERROR_REASON_SANDBOX_UNREACHABLE, words) from error

    async def _ended(self, record: SessionRecord) -> bool:
        probe = await self.machines.look(record.sandbox_id)
        listed = probe.condition is Condition.UNKNOWN
        if probe.machine is not None:
            server = self.machines.server_of(probe.machine)
            try:
                await server.disconnect(record.connection)
                listed = record.connection in await server.connections()
            except (AgentError, DomainError) as error:
                log.info("agent not disconnected", session=record.session_id, reason=str(error))
                listed = True
        if not record.process:
            return not listed
        provider = await self.machines.provider(record.sandbox_id)
        return await provider.end_agent(record.sandbox_id, record.process) and not listed

    async def _end_strays(self, sandbox_id: str) -> set[str]:
        """End agents that no session claims; return the processes of the others."""
        provider = await self.machines.provider(sandbox_id)
        claimed = await self.database.read(self.sessions.processes, sandbox_id)
        for stray in await provider.agents(sandbox_id) - claimed:
            log.warning("agent without a session is ended", sandbox=sandbox_id, process=stray)
            if not await provider.end_agent(sandbox_id, stray):
                words = "an agent without a session does not end"
                raise Unavailable(ERROR_REASON_SANDBOX_UNREACHABLE, words)
        return claimed

    async def _withdraw(self, server: AgentServer, record: SessionRecord) -> None:
        """Leave nothing of an agent that did not start as it should."""
        try:
            await server.disconnect(record.connection)
            await self._end_strays(record.sandbox_id)
        except (AgentError, DomainError) as error:
            log.info("agent not withdrawn", session=record.session_id, reason=str(error))


async def _reached(server: AgentServer) -> AgentServer:
    """Return the server once it has answered."""
    await server.connections()
    return server


async def _unless_it_ends(server: AgentServer, record: SessionRecord, opening: Coroutine[Any, Any, T]) -> T:
    """Return what the opening of an agent returns. Raise AgentError if the agent ends before: it will not answer."""
    opened = asyncio.create_task(opening)
    ended = asyncio.create_task(_end_of(server, record.connection))
    try:
        await asyncio.wait({opened, ended}, return_when=asyncio.FIRST_COMPLETED)
        if not opened.done():
            raise AgentError(f"it ended with code {ended.result()}")
        return opened.result()
    finally:
        opened.cancel()
        ended.cancel()
        await asyncio.wait({opened, ended})


async def _end_of(server: AgentServer, connection: str) -> str:
    """Return with which code an agent ended, once it has."""
    backoff = Backoff(first_seconds=0.05, most_seconds=1.0)
    while True:
        try:
            async with server.events(connection, 0, _START_SECONDS) as events:
                async for event in events:
                    if event.message.get("method") == AGENT_EXITED:
                        return text_of(member(event.message, "params"), "code")
        except (AgentError, DomainError):  # it is not there yet; who opens it says what is wrong
            pass
        await asyncio.sleep(backoff.next_seconds())


async def _open(server: AgentServer, record: SessionRecord, directory: str) -> tuple[str, Offer]:
    """Start the agent of a session; return the agent's own id of the session, and what it offers."""
    hello: dict[str, Any] = {
        "protocolVersion": _PROTOCOL_VERSION,
        "clientCapabilities": {"elicitation": {"form": {}}},
        "clientInfo": {"name": "branchline", "version": "1"},
    }
    ask = server.request
    try:
        greeted = await ask(record.connection, "initialize", hello, _INITIALIZE, record.agent, _START_SECONDS)
    except AgentUnknownError as error:
        known = ", ".join(agent.name for agent in await server.agents())
        words = f'there is no agent "{record.agent}"; there are: {known}'
        raise InvalidArgument("agent", words, ERROR_REASON_AGENT_UNKNOWN, agent=record.agent, agents=known) from error
    where: dict[str, Any] = {"cwd": directory, "mcpServers": []}
    opened = await ask(record.connection, "session/new", where, _NEW_SESSION, timeout_seconds=_START_SECONDS)
    session_id = text_of(opened, "sessionId")
    if not session_id:
        raise AgentError("it gave its session no id")
    offer = offer_of(record.agent, greeted, opened)
    for kind, wanted, rpc_id in (("model", record.model, _SET_MODEL), ("mode", record.mode, _SET_MODE)):
        if wanted:
            method, params = selection(opened, kind, wanted, record.agent)
            await ask(record.connection, method, {"sessionId": session_id, **params}, rpc_id)
            offer = replace(offer, **{kind: wanted})
    return session_id, offer
