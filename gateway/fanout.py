"""All replicas of the gateway: one upstream watch for each topic, any number of watchers below it."""

import asyncio
from collections.abc import Generator
from contextlib import contextmanager

from gateway.replica import Replica, Upstream

LINGER_SECONDS = 30.0
"""How long a replica is kept after its last watcher has left."""


class FanOut:
    """Opens a replica with its first watcher, and closes it a while after the last has left."""

    def __init__(self, linger_seconds: float = LINGER_SECONDS) -> None:
        self._linger_seconds = linger_seconds
        self._replicas: dict[str, Replica] = {}
        self._opened: asyncio.Queue[Replica] = asyncio.Queue()

    @property
    def watchers(self) -> int:
        """Number of open watches."""
        return sum(replica.watchers for replica in self._replicas.values())

    async def run(self) -> None:
        """Follow the upstreams of what is watched, for ever: a loop of the gateway."""
        async with asyncio.TaskGroup() as group:
            while True:
                replica = await self._opened.get()
                following = group.create_task(replica.follow())
                group.create_task(self._close_when_left(replica, following))

    async def _close_when_left(self, replica: Replica, following: "asyncio.Task[None]") -> None:
        left = False
        while not (left and replica.watchers == 0):
            left = replica.watchers == 0
            await asyncio.sleep(self._linger_seconds)
        del self._replicas[replica.topic]
        following.cancel()

    @contextmanager
    def replica(self, topic: str, upstream: Upstream) -> Generator[Replica, None, None]:
        """Hold a replica open for the length of the block."""
        replica = self._replicas.get(topic)
        if replica is None:
            replica = self._replicas[topic] = Replica(topic, upstream)
            self._opened.put_nowait(replica)
        replica.watchers += 1
        try:
            yield replica
        finally:
            replica.watchers -= 1
