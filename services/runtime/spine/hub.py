"""Fan-out inside one process: committed changes to any number of watchers, each with bounded memory.

A watcher's queue is keyed by entity: a slow reader gets the newest state of each, never a backlog. When even
that outgrows the limit the queue is dropped and the reader is told to catch up from the table.
"""

import asyncio
from collections import defaultdict
from collections.abc import Generator, Iterable
from contextlib import contextmanager

from branchline.resource.v1.watch_pb2 import WatchChange

from services.runtime.signal import Signal

PENDING_LIMIT = 4096


class Watcher:
    """One reader of one scope."""

    def __init__(self, limit: int = PENDING_LIMIT) -> None:
        self._limit = limit
        self._pending: dict[tuple[str, str], WatchChange] = {}
        self._arrived = asyncio.Event()
        self.lagging = False

    def offer(self, change: WatchChange) -> None:
        """Queue a change, in the place of an older one of the same entity."""
        self._arrived.set()
        if self.lagging:
            return
        key = (change.kind, change.id)
        self._pending.pop(key, None)
        self._pending[key] = change
        if len(self._pending) > self._limit:
            self._pending.clear()
            self.lagging = True

    async def take(self, timeout_seconds: float) -> list[WatchChange]:
        """Return what is queued, in order of change; empty when the time ran out or the reader lags."""
        try:
            await asyncio.wait_for(self._arrived.wait(), timeout_seconds)
        except TimeoutError:
            return []
        return self.drain()

    def drain(self) -> list[WatchChange]:
        """Return what is queued without waiting."""
        self._arrived.clear()
        changes = list(self._pending.values())
        self._pending.clear()
        return changes


class Hub:
    """Knows who watches which scope."""

    def __init__(self) -> None:
        self._watchers: defaultdict[str, set[Watcher]] = defaultdict(set)
        self.changed = Signal()

    @contextmanager
    def watcher(self, scope: str) -> Generator[Watcher, None, None]:
        """Watch a scope for the length of the block."""
        watcher = Watcher()
        self._watchers[scope].add(watcher)
        try:
            yield watcher
        finally:
            self._watchers[scope].discard(watcher)
            if not self._watchers[scope]:
                del self._watchers[scope]

    def publish(self, scope: str, changes: Iterable[WatchChange]) -> None:
        """Give committed changes of a scope to all who watch it."""
        for change in changes:
            for watcher in self._watchers.get(scope, ()):
                watcher.offer(change)
        self.changed.notify()
