"""Gives an agent its prompt, once.

Before each post a mark is set behind what the agent has said so far, and stored with the fact that the prompt is about
to be posted; a second mark behind the post shows that the agent has it. A prompt that is known to have arrived is never
posted again. One of which it is not known is withdrawn first, so that it is not worked on twice.
"""

import asyncio
from dataclasses import dataclass

import grpc
from branchline_internal.sandbox.v1.sandbox_pb2 import StartTurnRequest

from services.runtime import faults
from services.runtime.database import Database
from services.runtime.errors import Unavailable, is_permanent, reason_of
from services.runtime.logging import get_logger
from services.runtime.retry import Backoff
from services.runtime.signal import Signal
from services.sandbox.agent_server import AgentError, Json, Unreachable
from services.sandbox.attachments import place
from services.sandbox.blobs import Blobs
from services.sandbox.limits import Limits
from services.sandbox.link import AgentLink, new_mark
from services.sandbox.persistence import stored
from services.sandbox.prompt import prompt_blocks
from services.sandbox.reasons import TurnFailed, exited, refused, unprepared
from services.sandbox.sessions import SessionStore
from services.sandbox.turn import PROMPT_POSTS, Turn

log = get_logger(__name__)

_NOTICE_SECONDS = 0.05
_FETCH_ATTEMPTS = 5


@dataclass(slots=True)
class Prompting:
    """The prompt of one turn."""

    database: Database
    sessions: SessionStore
    turn: Turn
    link: AgentLink
    prompt: StartTurnRequest
    blobs: Blobs
    limits: Limits
    news: Signal
    """Told of every event, and to be told of every change of the turn."""

    async def run(self) -> None:
        """See to it that the agent has the prompt; return once the rest is for the stream to tell."""
        turn = self.turn
        if turn.rpc_id:  # posted in an earlier life
            await self._mark()
            if turn.accepted or turn.over:
                return
            await self._withdraw()
        blocks = await self._blocks()
        backoff = Backoff(first_seconds=0.2, most_seconds=2.0)
        while not turn.over and not turn.cancelled:
            if turn.posts >= PROMPT_POSTS:
                turn.fail(refused("the agent did not take the prompt"))
                break
            mark = await self._mark()
            if turn.over or turn.cancelled:
                break
            turn.next_post(mark)
            await self._note_post()
            faults.reached("prompt stored")
            if await self._post(blocks):
                break
            await asyncio.sleep(backoff.next_seconds())
        if turn.cancelled and not turn.rpc_id:
            turn.give_up()
        self.news.notify()

    async def _blocks(self) -> list[Json]:
        """Make the prompt ready: what it names is written where the agent can read it. Raise TurnFailed."""
        turn, prompt, server = self.turn, self.prompt.prompt, self.link.server
        backoff = Backoff(first_seconds=0.5, most_seconds=5.0)
        for attempt in range(_FETCH_ATTEMPTS):
            try:
                images = turn.offer.takes_images
                placed = await place(self.blobs, server, turn.record.task_id, prompt, images=images)
                return prompt_blocks(prompt, placed)
            except (grpc.aio.AioRpcError, Unavailable) as error:
                words = f"an attachment could not be fetched: {reason_of(error)}"
                if is_permanent(error) or attempt == _FETCH_ATTEMPTS - 1:
                    raise TurnFailed(unprepared(words)) from error
                log.info("attachments are tried again", session=turn.record.session_id, reason=words)
            if turn.over or turn.cancelled:
                break
            await asyncio.sleep(backoff.next_seconds())
        return []

    async def _note_post(self) -> None:
        turn, record = self.turn, self.link.record
        write, post = self.database.write, self.sessions.post
        await stored(lambda: write(post, record, turn.posts, turn.rpc_id, turn.mark))

    async def _post(self, blocks: list[Json]) -> bool:
        """Post the prompt; return False if it must be posted again."""
        turn = self.turn
        noticing = asyncio.create_task(self._notice())
        try:
            answer = await self.link.prompt(blocks, turn.rpc_id, self.limits.turn_seconds + 60)
        except AgentError as error:
            await self._quiet()
            turn.agent_gone(refused(f"the agent refused the prompt: {error}", error))
        except Unreachable as error:
            log.info("prompt request broke", session=self.link.record.session_id, reason=str(error))
            if turn.accepted or turn.over:
                return True
            if error.sent:
                await self._withdraw()
            return turn.over
        else:
            await self._quiet()
            turn.answered(answer)
        finally:
            noticing.cancel()
        return True

    async def _notice(self) -> None:
        """Learn that the agent has the prompt."""
        rpc_id = self.turn.rpc_id
        await asyncio.sleep(_NOTICE_SECONDS)
        faults.reached("prompt posted")
        if await self._mark(given_up=-1) > self.turn.mark and rpc_id == self.turn.rpc_id:
            self.turn.accepted = True
            self.news.notify()

    async def _withdraw(self) -> None:
        """Have the agent drop a prompt that it may have. Nothing of it has been worked on."""
        turn = self.turn
        turn.withdrawing = True
        await self.link.cancel()
        await self._mark()
        try:
            async with asyncio.timeout(self.limits.withdraw_seconds):
                while not (turn.withdrawn or turn.over):
                    await self.news.wait(self.news.ticket)
        except TimeoutError:
            log.info("nothing to withdraw", session=self.link.record.session_id)

    async def _mark(self, given_up: int | None = None) -> int:
        """Set a mark behind all that the agent has said; return the number of its event.

        An agent that does not answer in time has said what has been read, or what is given.
        """
        rpc_id = new_mark()
        try:
            async with asyncio.timeout(self.limits.mark_seconds):
                while True:
                    try:
                        await self.link.mark(rpc_id, self.limits.mark_seconds)
                        break
                    except Unreachable:
                        await asyncio.sleep(0.2)
                while rpc_id not in self.turn.marks and not self.turn.over:
                    await self.news.wait(self.news.ticket)
        except TimeoutError:
            log.info("no mark was set", session=self.link.record.session_id)
        except AgentError as error:
            self.turn.agent_gone(exited(f"the agent is gone: {error}"))
            self.news.notify()
        return self.turn.marks.pop(rpc_id, self.turn.last_event if given_up is None else given_up)

    async def _quiet(self) -> None:
        """Wait until the stream has told what it has to tell: the turn is over, or nothing came for a while."""
        while not self.turn.over and await self.news.wait(self.news.ticket, self.limits.quiet_seconds):
            pass
