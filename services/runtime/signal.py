"""Wake-ups between coroutines of one process."""

import asyncio


class Signal:
    """Lets any number of coroutines wait for the next notification. None is missed: take `ticket` first."""

    def __init__(self) -> None:
        self._count = 0
        self._changed = asyncio.Event()

    @property
    def ticket(self) -> int:
        """Number of notifications so far."""
        return self._count

    def notify(self) -> None:
        """Wake all who wait."""
        self._count += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait(self, ticket: int, timeout_seconds: float | None = None) -> bool:
        """Wait for a notification after the ticket; return False if the time ran out first."""
        if self._count != ticket:
            return True
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._changed.wait()
        except TimeoutError:
            return False
        return True
