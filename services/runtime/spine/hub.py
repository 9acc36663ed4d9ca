"""Fan-out inside one process: committed changes to any number of watchers, each with bounded memory.

A watcher's queue is keyed by entity: a slow reader gets the newest state of each, never a backlog. When even
that outgrows the limit the queue is dropped and the reader is told to catch up from the source.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from weakref import WeakValueDictionary

from branchline.v1.common_pb2 import EntityKind
from branchline_internal.spine.v1.push_pb2 import WatchChange

PENDING_CHANGES = 512
PENDING_BYTES = 4 * 1024 * 1024

WOKEN_AT_ONCE = 2
"""Watchers that are woken before the event loop goes on with something else: it takes one new call a turn."""

Kind = EntityKind.ValueType


class Watcher:
    """One reader of one scope."""

    def __init__(self) -> None:
        self._pending: dict[tuple[int, str], WatchChange] = {}
        self._bytes = 0
        self._arrived = asyncio.Event()
        self.lagging = False
        self.to_be_woken = False

    def offer(self, change: WatchChange) -> None:
        """Queue a change, in the place of an older one of the same entity. The reader is woken later."""
        if self.lagging:
            return
        key = (change.kind, change.id)
        older = self._pending.pop(key, None)
        self._bytes += len(change.entity) - (len(older.entity) if older is not None else 0)
        self._pending[key] = change
        if len(self._pending) > PENDING_CHANGES or self._bytes > PENDING_BYTES:
            self.lag()

    def lag(self) -> None:
        """Have the reader catch up from the source."""
        self.lagging = True
        self._pending.clear()
        self._bytes = 0

    def wake(self) -> None:
        """Have the reader look."""
        self.to_be_woken = False
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


def _nobody() -> None:
    return


class Hub:
    """Knows who watches which scope, and who waits for which entity.

    A change that thousands watch is told to a few of them at a time, so that other work is done in between.
    """

    def __init__(self) -> None:
        self._watchers: dict[str, set[Watcher]] = {}
        self._to_wake: deque[Watcher] = deque()
        self._waiting: WeakValueDictionary[tuple[int, str], asyncio.Event] = WeakValueDictionary()
        self.tell_others: Callable[[], None] = _nobody
        """Has those who wait in other processes look."""

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

    def watched(self, scope: str) -> bool:
        """Whether anybody watches a scope."""
        return scope in self._watchers

    @property
    def scopes(self) -> list[str]:
        """What is watched."""
        return list(self._watchers)

    def publish(self, scope: str, changes: Collection[WatchChange]) -> None:
        """Give committed changes of a scope to all who watch it."""
        watchers = self._watchers.get(scope, ())
        for change in changes:
            for watcher in watchers:
                watcher.offer(change)
            if self._waiting:
                self.touch(change.kind, change.id)
        if changes:
            self._wake(watchers)

    def lag(self, scope: str) -> None:
        """Have all who watch a scope catch up from the source."""
        watchers = self._watchers.get(scope, ())
        for watcher in watchers:
            watcher.lag()
        self._wake(watchers)

    def _wake(self, watchers: Collection[Watcher]) -> None:
        waking = bool(self._to_wake)
        for watcher in watchers:
            if not watcher.to_be_woken:
                watcher.to_be_woken = True
                self._to_wake.append(watcher)
        if not waking:
            self._wake_some()

    def _wake_some(self) -> None:
        for _ in range(min(WOKEN_AT_ONCE, len(self._to_wake))):
            self._to_wake.popleft().wake()
        if self._to_wake:
            asyncio.get_running_loop().call_soon(self._wake_some)

    def touch(self, kind: Kind, entity_id: str) -> None:
        """Wake those who wait for an entity to change."""
        event = self._waiting.pop((kind, entity_id), None)
        if event is not None:
            event.set()

    def announce(self, kind: Kind, entity_id: str) -> None:
        """Wake those who wait for an entity to change, here and in other processes; for what nobody watches."""
        self.touch(kind, entity_id)
        self.tell_others()

    def wake_waiting(self) -> None:
        """Have all who wait for an entity look."""
        for event in list(self._waiting.values()):
            event.set()
        self._waiting.clear()

    def awaited(self, kind: Kind, entity_id: str) -> asyncio.Event:
        """Return what is set when an entity changes next. It is forgotten with the last who holds it."""
        return self._waiting.setdefault((kind, entity_id), asyncio.Event())
