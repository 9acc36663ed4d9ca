"""Status sync: the follower of a working agent's events. At most one per session, and only while it works.

How far the events are read is stored in the same transaction as what they said. After a restart the follower asks
for the events behind that number, so an entry is neither lost nor doubled.
"""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import structlog
from branchline.resource.v1 import session_pb2

from services.runtime.errors import DomainError, reason_of
from services.runtime.retry import Backoff
from services.runtime.service import Chassis
from services.runtime.signal import Signal
from services.sandbox.agent_server import AgentError, AgentEvent, AgentServer, rpc_error
from services.sandbox.agents import FIRST_PROMPT_RPC_ID, open_agent
from services.sandbox.machines import WORKSPACE, Machines
from services.sandbox.prompt import prompt_blocks
from services.sandbox.store import SandboxStore, SessionRecord
from services.sandbox.transcript import TranscriptBuilder

log = structlog.get_logger()

FLUSH_SECONDS = 0.05
"""Shortest time between two stored updates of one session: watchers see at most 20 a second."""

_ALIVE_SECONDS = 10.0
_RESEND_SECONDS = 5.0
_RESEND_RPC_STEP = 1_000_000
_QUEUE_EVENTS = 1000


class TurnFailed(Exception):
    """The turn is over and did not end well; the message says why."""


@dataclass(slots=True)
class StatusSync:
    """Starts a follower for every session that has a turn to do."""

    chassis: Chassis
    store: SandboxStore
    machines: Machines
    _followers: dict[str, asyncio.Task[None]] = field(default_factory=dict[str, asyncio.Task[None]])
    _control: dict[str, Signal] = field(default_factory=dict[str, Signal])
    _wanted: asyncio.Queue[str] = field(default_factory=asyncio.Queue[str])

    def wake(self, session_id: str) -> None:
        """Follow a session, or let its follower look at its row again."""
        self._wanted.put_nowait(session_id)

    async def run(self) -> None:
        """Follow for ever; begin with the sessions that worked when the service stopped."""
        for session_id in await self.store.working_sessions():
            self.wake(session_id)
        async with asyncio.TaskGroup() as group:
            while True:
                session_id = await self._wanted.get()
                if session_id in self._followers:
                    self._control[session_id].notify()
                    continue
                self._control[session_id] = Signal()
                follower = group.create_task(self._follow(session_id))
                self._followers[session_id] = follower

    async def _follow(self, session_id: str) -> None:
        follower = Follower(self.chassis, self.store, self.machines, session_id, self._control[session_id])
        try:
            await follower.run()
        except Exception:
            log.exception("status sync failed", session=session_id)
            await asyncio.sleep(_ALIVE_SECONDS)
        finally:
            del self._followers[session_id], self._control[session_id]
        if session_id in await self.store.working_sessions():
            await asyncio.sleep(FLUSH_SECONDS)
            self.wake(session_id)  # a turn was given while this follower ended


@dataclass(slots=True)
class Follower:
    """Takes one session through one turn."""

    chassis: Chassis
    store: SandboxStore
    machines: Machines
    session_id: str
    control: Signal
    _events: asyncio.Queue[AgentEvent] = field(default_factory=lambda: asyncio.Queue[AgentEvent](_QUEUE_EVENTS))

    async def run(self) -> None:
        """Prompt the agent, follow it to the end of the turn, and say how it ended."""
        async with self.chassis.database.read() as connection:
            record = await self.store.session(connection, self.session_id)
        if record.prompt is None:
            return
        drafts = await self.store.open_drafts(self.session_id)
        builder = TranscriptBuilder(
            record.session_id, record.task_id, record.turn, record.entry_count, self.chassis.clock.timestamp, drafts
        )
        failure: BaseException | None = None
        try:
            server = await self.machines.server(record.sandbox_id)
            await self._attach(server, record, builder)
            await self._turn(server, record, builder)
        except* Exception as errors:  # noqa: BLE001 - the turn must end with a reason, whatever it is
            failure = _first(errors)
        if failure is not None and not isinstance(failure, TurnFailed | DomainError | AgentError):
            log.error("status sync failed", session=self.session_id, exc_info=failure)
        await self._end(record, builder, reason_of(failure) if failure is not None else "")

    async def _attach(self, server: AgentServer, record: SessionRecord, builder: TranscriptBuilder) -> None:
        """Make sure that the session's agent is connected; open a new one where none has this turn's prompt."""
        if record.acp_session_id and record.connection in await server.connections():
            return
        if record.prompt_rpc_id:
            raise TurnFailed("the agent was lost when its machine stopped; send a message to go on")
        record.generation += 1
        record.last_event_id = 0
        directory = f"{server.machine.home}/{WORKSPACE}"
        record.acp_session_id = await open_agent(server, record, directory)
        if record.turn > 1:
            words = "The agent was started afresh; it does not remember what was said before"
            builder.note(session_pb2.TRANSCRIPT_ENTRY_KIND_STATUS, words, "agent_restarted")
        await self._save(record)

    async def _turn(self, server: AgentServer, record: SessionRecord, builder: TranscriptBuilder) -> None:
        sent_before = bool(record.prompt_rpc_id)
        prompting = None if sent_before else await self._prompt(server, record)
        try:
            async with asyncio.TaskGroup() as group:
                helpers = [
                    group.create_task(self._read(server, record)),
                    group.create_task(self._obey(server, record, builder)),
                    group.create_task(self._stay_alive(server, record)),
                ]
                if sent_before:
                    helpers.append(group.create_task(self._resend(server, record)))
                await self._take(record, builder, prompting)
                for helper in helpers:
                    helper.cancel()
        finally:
            if prompting is not None:
                prompting.cancel()

    async def _prompt(self, server: AgentServer, record: SessionRecord) -> asyncio.Task[Any]:
        """Send the prompt. That it is sent is stored first: a restart then follows instead of asking twice."""
        assert record.prompt is not None
        again = record.prompt_rpc_id + _RESEND_RPC_STEP
        record.prompt_rpc_id = again if record.prompt_rpc_id else FIRST_PROMPT_RPC_ID + record.turn
        record.prompt_event_id = record.last_event_id
        await self._save(record)
        params = {"sessionId": record.acp_session_id, "prompt": prompt_blocks(record.prompt)}
        request = server.request(
            record.connection, "session/prompt", params, record.prompt_rpc_id, timeout_seconds=None
        )
        return asyncio.create_task(request)

    async def _resend(self, server: AgentServer, record: SessionRecord) -> None:
        """After a restart: if the agent says nothing, the prompt may never have reached it. Ask once more.

        A first prompt that did arrive is cancelled, so that it is not worked on twice.
        """
        await asyncio.sleep(_RESEND_SECONDS)
        if record.last_event_id > record.prompt_event_id:
            return
        await server.post(
            record.connection, {"method": "session/cancel", "params": {"sessionId": record.acp_session_id}}
        )
        await self._await_quietly(await self._prompt(server, record))

    async def _await_quietly(self, prompting: asyncio.Task[Any]) -> None:
        try:
            await prompting
        except (AgentError, DomainError) as error:
            log.info("prompt answered with an error", session=self.session_id, reason=str(error))

    async def _read(self, server: AgentServer, record: SessionRecord) -> None:
        """Put the agent's events into the queue, connecting again after every break."""
        backoff = Backoff(most_seconds=2.0)
        after = record.last_event_id
        while True:
            try:
                async with server.events(record.connection, after) as events:
                    async for event in events:
                        backoff.reset()
                        after = event.number
                        await self._events.put(event)
            except httpx.HTTPError as error:
                log.info("event stream broke", session=self.session_id, reason=repr(error))
                if not await self.machines.is_running(record.sandbox_id):
                    raise TurnFailed("the machine stopped in mid-turn; send a message to go on") from error
            await asyncio.sleep(backoff.next_seconds())

    async def _take(
        self, record: SessionRecord, builder: TranscriptBuilder, prompting: asyncio.Task[Any] | None
    ) -> None:
        """Apply events until the turn ends; store at most twenty times a second."""
        while True:
            events = [await self._next(prompting)]
            while not self._events.empty():
                events.append(self._events.get_nowait())
            end: dict[str, Any] | None = None
            async with self.chassis.database.transaction() as tx:
                for event in events:
                    if event.number <= record.last_event_id:
                        continue
                    record.last_event_id = event.number
                    asked = self._apply(record, builder, event.message)
                    if asked is not None:
                        await self.store.ask_permission(tx, self.session_id, *asked)
                        await self.store.report_session(tx, record, session_pb2.SESSION_STATUS_WAITING)
                    if self._is_end(record, event.message):
                        end = event.message
                record.entry_count = builder.count
                await self.store.save_entries(tx, builder.take_changed())
                await self.store.save_session(tx, record)
            if end is not None:
                self._judge(builder, end)
                return
            await asyncio.sleep(FLUSH_SECONDS)

    async def _next(self, prompting: asyncio.Task[Any] | None) -> AgentEvent:
        """Return the next event. Raise AgentError if the server refused the prompt, which makes no event."""
        getting = asyncio.ensure_future(self._events.get())
        waiting: set[asyncio.Future[Any]] = {getting}
        if prompting is not None and not prompting.done():
            waiting.add(prompting)
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if not getting.done() and prompting is not None and prompting.done() and prompting.exception():
                await asyncio.wait({getting}, timeout=1.0)  # an agent's own error also comes as an event
                if not getting.done():
                    prompting.result()
            return await getting
        finally:
            getting.cancel()

    def _apply(
        self, record: SessionRecord, builder: TranscriptBuilder, message: dict[str, Any]
    ) -> tuple[str, str] | None:
        """Put one message into the transcript; return (entry id, request id) if it asks for permission."""
        params = message.get("params") or {}
        match message.get("method"):
            case "session/update":
                builder.update(params.get("update") or {})
            case "session/request_permission":
                entry = builder.permission(params)
                return entry.id, json.dumps(message.get("id"))
            case "_branchline/agent_exited":
                raise TurnFailed(f"the agent ended with exit code {params.get('code')} in mid-turn")
            case _:
                return None
        return None

    def _is_end(self, record: SessionRecord, message: dict[str, Any]) -> bool:
        return "method" not in message and message.get("id") == record.prompt_rpc_id

    def _judge(self, builder: TranscriptBuilder, message: dict[str, Any]) -> None:
        if "error" in message:
            raise TurnFailed(f"the agent failed: {rpc_error(message['error'])}")
        reason = str((message.get("result") or {}).get("stopReason", "end_turn"))
        if reason != "end_turn":
            builder.note(session_pb2.TRANSCRIPT_ENTRY_KIND_STATUS, f"The turn ended: {reason}", reason)

    async def _obey(self, server: AgentServer, record: SessionRecord, builder: TranscriptBuilder) -> None:
        """Deliver answers to permission requests, and the wish to cancel."""
        while True:
            ticket = self.control.ticket
            answered = await self.store.permissions(self.session_id, answered=True)
            for permission in answered:
                outcome = {"outcome": "selected", "optionId": permission.option_id}
                await self._answer(server, record, permission.rpc_id, outcome)
                builder.answer(permission.entry_id, f"answered: {permission.option_id}", permission.user_id)
            await self._settle(record, builder, [permission.entry_id for permission in answered])
            async with self.chassis.database.read() as connection:
                cancel = (await self.store.session(connection, self.session_id)).cancel_wanted
            if cancel and not record.cancel_wanted:
                record.cancel_wanted = True
                params = {"sessionId": record.acp_session_id}
                await server.post(record.connection, {"method": "session/cancel", "params": params})
                open_requests = await self.store.permissions(self.session_id, answered=False)
                for permission in open_requests:
                    await self._answer(server, record, permission.rpc_id, {"outcome": "cancelled"})
                    builder.answer(permission.entry_id, "cancelled", "")
                await self._settle(record, builder, [permission.entry_id for permission in open_requests])
            await self.control.wait(ticket)

    async def _answer(self, server: AgentServer, record: SessionRecord, rpc_id: str, outcome: dict[str, Any]) -> None:
        await server.post(record.connection, {"id": json.loads(rpc_id), "result": {"outcome": outcome}})

    async def _settle(self, record: SessionRecord, builder: TranscriptBuilder, entry_ids: Sequence[str]) -> None:
        if not entry_ids:
            return
        async with self.chassis.database.transaction() as tx:
            await self.store.close_permissions(tx, self.session_id, entry_ids)
            await self.store.save_entries(tx, builder.take_changed())
            await self.store.report_session(tx, record, session_pb2.SESSION_STATUS_RUNNING)

    async def _stay_alive(self, server: AgentServer, record: SessionRecord) -> None:
        """Notice an agent that died without a word: writing to it fails.

        JSON-RPC receivers pass over notifications that begin with "$/".
        """
        while True:
            await asyncio.sleep(_ALIVE_SECONDS)
            try:
                await server.post(record.connection, {"method": "$/alive"})
            except AgentError as error:
                raise TurnFailed(f"the agent is gone: {error}") from error

    async def _end(
        self,
        record: SessionRecord,
        builder: TranscriptBuilder,
        reason: str,
    ) -> None:
        status = session_pb2.SESSION_STATUS_ERROR if reason else session_pb2.SESSION_STATUS_IDLE
        builder.seal_all("cancelled" if record.cancel_wanted else "interrupted")
        if reason:
            builder.note(session_pb2.TRANSCRIPT_ENTRY_KIND_ERROR, reason)
            record.acp_session_id = ""  # the next turn begins with a fresh agent
        record.entry_count = builder.count
        record.prompt = None
        record.prompt_rpc_id = 0
        async with self.chassis.database.transaction() as tx:
            await self.store.save_entries(tx, builder.take_changed())
            await self.store.want_cancel(tx, self.session_id, wanted=False)
            await self.store.close_permissions(tx, self.session_id)
            await self.store.report_session(tx, record, status, reason)

    async def _save(self, record: SessionRecord) -> None:
        async with self.chassis.database.transaction() as tx:
            await self.store.save_session(tx, record)


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
