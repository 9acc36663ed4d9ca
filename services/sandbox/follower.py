"""The follower of one turn: gives the agent its prompt, stores what it says, and says how the turn ended.

How far the events are read is stored in the same transaction as what they said, and the end of the turn in the one of
its last event. After a restart the follower goes on behind that number, so that nothing is lost or doubled.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from branchline.v1.common_pb2 import FAILURE_REASON_INTERNAL, FAILURE_REASON_SANDBOX_LOST
from branchline_internal.sandbox.v1.sandbox_pb2 import StartTurnRequest

from services.runtime import faults
from services.runtime.clock import Clock
from services.runtime.database import Database
from services.runtime.errors import DomainError, Unavailable, reason_of
from services.runtime.failures import failed
from services.runtime.lanes import Lanes
from services.runtime.logging import get_logger
from services.runtime.principal import Principal, bind_principal
from services.runtime.retry import Backoff
from services.runtime.signal import Signal
from services.sandbox.agent_server import AgentServer
from services.sandbox.agents import Agents
from services.sandbox.blobs import Blobs
from services.sandbox.commands import run
from services.sandbox.control import Control
from services.sandbox.limits import Limits
from services.sandbox.link import AgentLink
from services.sandbox.machines import WORKSPACE, Machines
from services.sandbox.persistence import stored
from services.sandbox.prompting import Prompting
from services.sandbox.reasons import TurnFailed, failure_of
from services.sandbox.records import Opened, Overtaken, SessionRecord
from services.sandbox.sessions import SessionStore
from services.sandbox.stream import EventStream
from services.sandbox.transcript import TranscriptBuilder
from services.sandbox.turn import Turn
from services.sandbox.watchdog import Watchdog

log = get_logger(__name__)

FLUSH_SECONDS = 0.05
"""Shortest time between two stored updates of one session: watchers see at most 20 a second."""

_ATTEMPTS = 4
_COMMIT_DIGITS = 40

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ground:
    """What followers stand on."""

    database: Database
    clock: Clock
    sessions: SessionStore
    machines: Machines
    agents: Agents
    blobs: Blobs
    lanes: Lanes
    """A lane per session for starting and ending its agent."""
    limits: Limits


@dataclass(slots=True)
class Follower:
    """Takes one session through one turn."""

    ground: Ground
    opened: Opened
    wishes: Signal
    ticket: int
    """Ticket of the wishes, older than what was opened: what is wanted later makes itself heard."""
    news: Signal = field(default_factory=Signal)

    async def run(self) -> None:
        """Follow the turn to its end. Raise Overtaken if something else takes its place."""
        ground, opened = self.ground, self.opened
        turn, record = self._turn(opened), opened.record
        bind_principal(Principal(service="sandbox", organization_id=record.organization_id))
        if opened.prompt is None:
            words = "its prompt is not known any more; send a message to go on"
            turn.fail(failed(FAILURE_REASON_INTERNAL, words, retryable=False))
        while not turn.over:
            assert opened.prompt is not None
            await self._follow(turn, record, opened.prompt)
            if turn.lost is not None and turn.end is None:
                record = await stored(lambda: ground.database.write(ground.sessions.end_agent, turn.record))
                turn.lost = None
        if turn.overtaken:
            raise Overtaken
        await self._finish(turn)

    def _turn(self, opened: Opened) -> Turn:
        record = opened.record
        now = self.ground.clock.timestamp
        builder = TranscriptBuilder(
            record.session_id, record.task_id, record.turn, record.entry_count, now, dict(opened.drafts)
        )
        asked = {one.request.id: one for one in opened.asked}
        answered = {one.request.id: one.request for one in opened.asked if one.answered}
        return Turn(record, builder, asked, answered, opened.offer)

    @property
    def session_id(self) -> str:
        """The session that is followed."""
        return self.opened.record.session_id

    async def _follow(self, turn: Turn, record: SessionRecord, prompt: StartTurnRequest) -> None:
        """Follow one agent until the turn is over, or the agent is lost before it had the prompt."""
        link = await self._attach_in_time(turn, record)
        if link is None:
            return
        work = asyncio.create_task(self._work(turn, link, prompt))
        try:
            while not turn.over:
                ticket = self.news.ticket
                await self._flush(turn)
                await asyncio.sleep(FLUSH_SECONDS)
                if not turn.over:
                    await self.news.wait(ticket)
        finally:
            work.cancel()
            await asyncio.wait({work})

    async def _work(self, turn: Turn, link: AgentLink, prompt: StartTurnRequest) -> None:
        """Read, prompt, obey and watch at once."""
        ground, limits = self.ground, self.ground.limits
        control = Control(ground.database, ground.sessions, turn, link, self.wishes, self.ticket, self.news)
        watchdog = Watchdog(turn, link, control, limits, self.news, ground.clock.seconds)

        def heard() -> None:
            watchdog.heard()
            self.news.notify()
            if turn.not_understood or (turn.cancelled and turn.open_questions):
                self.wishes.notify()

        stream = EventStream(turn, link, ground.machines, limits.stream_seconds, heard)
        prompting = Prompting(ground.database, ground.sessions, turn, link, prompt, ground.blobs, limits, self.news)
        async with asyncio.TaskGroup() as group:
            for part in (stream.run(), prompting.run(), control.run(), watchdog.run(), self._keep_storing(turn)):
                group.create_task(self._guard(turn, part))

    async def _keep_storing(self, turn: Turn) -> None:
        """Store what entries cannot hold while the turn goes on."""
        while not turn.over:
            ticket = self.news.ticket
            await self._store(turn)
            await self.news.wait(ticket)

    async def _store(self, turn: Turn) -> None:
        """Store what waits to be; what cannot be stored is shown cut."""
        while turn.builder.waiting:
            entry_id, draft = next(iter(turn.builder.waiting.items()))
            wholes = draft.unstored
            blobs = [await self.ground.blobs.store(draft.entry.task_id, whole) for whole in wholes]
            turn.builder.stored(entry_id, wholes, blobs)
            self.news.notify()

    async def _attach_in_time(self, turn: Turn, record: SessionRecord) -> AgentLink | None:
        link: AgentLink | None = None

        async def attach() -> None:
            nonlocal link
            async with asyncio.timeout(self._seconds_left(turn)):
                link = await self._attach(turn, record)

        await self._guard(turn, attach())
        return link

    def _seconds_left(self, turn: Turn) -> float:
        return max(0.0, turn.record.turn_time + self.ground.limits.turn_seconds - self.ground.clock.seconds())

    async def _guard(self, turn: Turn, part: Coroutine[Any, Any, None]) -> None:
        """Run a part of the work; whatever goes wrong in it ends the turn with a reason."""
        try:
            await part
        except Overtaken:
            turn.overtaken = True
        except Exception as error:
            failure = failure_of(error)
            if failure.reason == FAILURE_REASON_INTERNAL and not isinstance(error, TurnFailed):
                log.exception("turn failed", session=self.session_id)
            turn.fail(failure)
        finally:
            self.news.notify()

    async def _attach(self, turn: Turn, record: SessionRecord) -> AgentLink:
        """Make sure that the session's agent is connected; start one where none can have this turn's prompt."""
        ground = self.ground
        async with ground.lanes.hold(self.session_id):
            if record.ending:
                ending = record
                await self._persist(lambda: ground.agents.end(ending))
                record = self._still(await stored(lambda: ground.database.write(ground.sessions.agent_gone, ending)))
            if record.acp_session_id:
                server, there = await self._persist(lambda: self._connected(record))
                if there:
                    return await self._linked(turn, record, server)
            if turn.accepted:
                words = "the agent was lost when its machine stopped; send a message to go on"
                raise TurnFailed(failed(FAILURE_REASON_SANDBOX_LOST, words))
            record = await self._persist(partial(self._start_agent, turn, record))
            turn.offer = await stored(lambda: ground.database.read(ground.sessions.offer, self.session_id))
            if record.turn > 1:
                turn.restarted()
            return await self._linked(turn, record, await ground.machines.server(record.sandbox_id))

    async def _linked(self, turn: Turn, record: SessionRecord, server: AgentServer) -> AgentLink:
        """Have a turn follow an agent that is connected."""
        turn.follow(record)
        turn.builder.root = f"{server.machine.home}/{WORKSPACE}"
        return AgentLink(server, record)

    async def _connected(self, record: SessionRecord) -> tuple[AgentServer, bool]:
        async def look(server: AgentServer) -> tuple[AgentServer, bool]:
            return server, record.connection in await server.connections()

        return await self.ground.machines.use(record.sandbox_id, look)

    async def _start_agent(self, turn: Turn, record: SessionRecord) -> SessionRecord:
        """End what is left of the session's agent, and start the next."""
        ground = self.ground
        if record.process or record.acp_session_id:
            await ground.agents.end(record)
        begun = await ground.database.write(ground.sessions.begin, record.place)
        turn.follow(self._still(begun))
        return self._still(await ground.agents.start(begun))

    def _still(self, record: SessionRecord) -> SessionRecord:
        """Return a record that is of the turn which is followed. Raise Overtaken."""
        if record.turn != self.opened.record.turn:
            raise Overtaken
        return record

    async def _persist(self, call: Callable[[], Awaitable[T]]) -> T:
        """Try again what failed because something could not be reached."""
        backoff = Backoff(first_seconds=0.5, most_seconds=5.0)
        for _ in range(_ATTEMPTS - 1):
            try:
                return await call()
            except Unavailable as error:
                log.info("tried again", session=self.session_id, reason=reason_of(error))
            await asyncio.sleep(backoff.next_seconds())
        return await call()

    async def _flush(self, turn: Turn) -> None:
        """Store what is new, if it is worth that. Raise Overtaken."""
        if not turn.worth_storing:
            return
        progress, record = turn.take(), turn.record
        sessions = self.ground.sessions
        try:
            await stored(lambda: self.ground.database.write(sessions.progress, record, progress))
        except Overtaken:
            turn.overtaken = True

    async def _finish(self, turn: Turn) -> None:
        """Store the end of the turn, with the event that told it."""
        end, ground = turn.end, self.ground
        assert end is not None
        if end.end_first:
            await self._end_agent(turn.record)
        turn.close()
        await self._store_the_last(turn)
        told = turn.told_end(await self._head_commit(turn.record))
        progress = turn.take()
        faults.reached("turn ended")
        finish, record = ground.sessions.finish, turn.record
        await stored(lambda: ground.database.write(finish, record, progress, told, end_agent=end.end_agent))

    async def _store_the_last(self, turn: Turn) -> None:
        """Store what is not yet, but let the turn end in time."""
        try:
            async with asyncio.timeout(self.ground.limits.store_seconds):
                await self._store(turn)
        except TimeoutError:
            log.info("outputs not stored in time", session=self.session_id)
        turn.builder.give_up_blobs()

    async def _end_agent(self, record: SessionRecord) -> None:
        try:
            await self.ground.agents.end(record)
        except DomainError as error:  # it stays noted that it must be ended before anything else starts
            log.warning("agent not ended yet", session=self.session_id, reason=error.message)

    async def _head_commit(self, record: SessionRecord) -> str:
        """Return the commit at the tip of the branch, or nothing if git does not say it in time."""
        seconds = self.ground.limits.head_seconds
        server = self.ground.machines.known(record.sandbox_id)
        if server is None:
            return ""
        command = ("git", "rev-parse", "--verify", "--quiet", "HEAD")
        directory = f"{server.machine.home}/{WORKSPACE}"
        try:
            async with asyncio.timeout(seconds):
                said = await run(server, command, directory, {}, max(1, int(seconds) - 1))
        except (DomainError, TimeoutError) as error:
            log.info("head commit not read", session=self.session_id, reason=reason_of(error))
            return ""
        commit = said.stdout.strip()
        return commit if len(commit) == _COMMIT_DIGITS else ""
