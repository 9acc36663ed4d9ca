"""Fan-out inside one process: committed changes to any number of watchers, each with bounded memory.

A watcher's queue is keyed by entity: a slow reader gets the newest state of each, never a backlog. When even
that outgrows the limit the queue is dropped and the reader is told to catch up from the source.
"""

import asyncio
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from weakref import WeakValueDictionary

from branchline.resource.v1.vocabulary_pb2 import EntityKind
from branchline.resource.v1.watch_pb2 import WatchChange

PENDING_CHANGES = 512
PENDING_BYTES = 4 * 1024 * 1024

Kind = EntityKind.ValueType


class Watcher:
    """One reader of one scope."""

    def __init__(self) -> None:
        self._pending: dict[tuple[int, str], WatchChange] = {}
        self._bytes = 0
        self._arrived = asyncio.Event()
        self.lagging = False

    def offer(self, change: WatchChange) -> None:
        """Queue a change, in the place of an older one of the same entity."""
        self._arrived.set()
        if self.lagging:
            return
        key = (change.kind, change.id)
        older = self._pending.pop(key, None)
        self._bytes += len(change.resource.value) - (len(older.resource.value) if older is not None else 0)
        self._pending[key] = change
        if len(self._pending) > PENDING_CHANGES or self._bytes > PENDING_BYTES:
            self.lag()

    def lag(self) -> None:
        """Tell the reader that it must catch up from the source."""
        self.lagging = True
        self._pending.clear()
        self._bytes = 0
        self._arrived.set()

    def start_over(self) -> None:
        """Forget what is queued: the reader is about to catch up from the source."""
        self.lagging = False
        self._pending.clear()
        self._bytes = 0
        self._arrived.clear()

    async def take(self, timeout_seconds: float) -> list[WatchChange]:
        """Return what is queued, in order of change; empty when the time ran out or the reader lags."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._arrived.wait()
        except TimeoutError:
            return []
        self._arrived.clear()
        changes = list(self._pending.values())
        self._pending.clear()
        self._bytes = 0
        return changes


class Hub:
    """Knows who watches which scope, and who waits for which entity."""

    def __init__(self) -> None:
        self._watchers: dict[str, set[Watcher]] = {}
        self._waiting: WeakValueDictionary[tuple[int, str], asyncio.Event] = WeakValueDictionary()

    @contextmanager
    def watcher(self, scope: str) -> Generator[Watcher, None, None]:
        """Watch a scope for the length of the block."""
        watcher = Watcher()
        watchers = self._watchers.setdefault(scope, set())
        watchers.add(watcher)
        try:
            yield watcher
        finally:
            watchers.discard(watcher)
            if not watchers:
                self._watchers.pop(scope, None)

    def heard(self, scope: str) -> bool:
        """Whether anybody would hear of a change of a scope."""
        return scope in self._watchers or len(self._waiting) > 0

    def publish(self, scope: str, changes: Iterable[WatchChange]) -> None:
        """Give committed changes of a scope to all who watch it."""
        watchers = self._watchers.get(scope, ())
        for change in changes:
            for watcher in watchers:
                watcher.offer(change)
            if self._waiting:
                self.touch(change.kind, change.id)

    def lag(self, scope: str) -> None:
        """Have all who watch a scope catch up from the source."""
        for watcher in self._watchers.get(scope, ()):
            watcher.lag()

    def touch(self, kind: Kind, entity_id: str) -> None:
        """Wake those who wait for an entity to change."""
        event = self._waiting.pop((kind, entity_id), None)
        if event is not None:
            event.set()

    def awaited(self, kind: Kind, entity_id: str) -> asyncio.Event:
        """Return what is set when an entity changes next. It is forgotten with the last who holds it."""
        return self._waiting.setdefault((kind, entity_id), asyncio.Event())
