"""Lives through a database that is away for a while: a turn of an agent does not end because of it."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from services.runtime.database import DatabaseError
from services.runtime.logging import get_logger
from services.runtime.retry import Backoff

log = get_logger(__name__)

T = TypeVar("T")


async def stored(call: Callable[[], Awaitable[T]]) -> T:
    """Read or write, again and again while the database refuses; raise whatever else is raised."""
    backoff = Backoff(first_seconds=0.1, most_seconds=5.0)
    while True:
        try:
            return await call()
        except DatabaseError as error:
            log.warning("the database is waited for", reason=error.message)
        await asyncio.sleep(backoff.next_seconds())
