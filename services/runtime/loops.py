"""Loops that run as long as their service: they live through errors, and end only when they are told to."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from services.runtime.errors import reason_of
from services.runtime.logging import get_logger
from services.runtime.retry import Backoff

log = get_logger(__name__)

Work = Callable[[], Awaitable[object]]
T = TypeVar("T")


def being_cancelled() -> bool:
    """Say whether the running task is being cancelled, whatever error came of it.

    gRPC raises CancelledError for broken calls, too. And before Python 3.13 a TaskGroup whose part fails may swallow a
    cancellation, or leave a trace of one: a task that asks this opens no TaskGroup itself.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


@dataclass(frozen=True, slots=True)
class Every:
    """Does something at once and then every so often, whatever becomes of it."""

    seconds: float
    name: str
    work: Work

    async def run(self) -> None:
        """Do it for ever."""
        backoff = Backoff(first_seconds=min(1.0, self.seconds), most_seconds=self.seconds)
        while True:
            try:
                await asyncio.ensure_future(self.work())  # in a task of its own: see `being_cancelled`
                backoff.reset()
                pause = self.seconds
            except (Exception, asyncio.CancelledError) as error:
                if being_cancelled():
                    raise
                log.warning("periodic work failed", work=self.name, reason=reason_of(error), exc_info=error)
                pause = backoff.next_seconds()
            await asyncio.sleep(pause)


async def for_each(items: Iterable[T], name: str, work: Callable[[T], Awaitable[object]], parallel: int = 1) -> None:
    """Do something with each of some items, so many at a time; one that fails is logged and holds up no other."""
    turns = asyncio.Semaphore(parallel)

    async def work_on(item: T) -> None:
        async with turns:
            try:
                await work(item)
            except (Exception, asyncio.CancelledError) as error:
                if being_cancelled():
                    raise
                log.warning("one of several failed", work=name, reason=reason_of(error), exc_info=error)

    await asyncio.gather(*map(work_on, items))
