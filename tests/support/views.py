"""Watchers that keep what they were told, as a user interface does, to be compared with what reads answer."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

from branchline.v1 import watches_pb2
from branchline.v1.vocabulary_pb2 import EntityKind
from branchline.v1.watches_pb2 import WatchFrame

Key = tuple[EntityKind.ValueType, str]


@dataclass
class View:
    """What one watcher knows; it is open until it is closed, through whatever happens."""

    name: str
    frames: AsyncIterator[WatchFrame]
    held: dict[Key, tuple[int, bytes]] = field(default_factory=dict[Key, tuple[int, bytes]])
    resets: int = 0
    synced: bool = False
    _following: asyncio.Task[None] | None = None

    def open(self) -> Self:
        """Begin to follow."""
        self._following = asyncio.create_task(self._follow())
        return self

    async def close(self) -> None:
        """Stop following; raise what ended the watch before."""
        assert self._following is not None
        self._following.cancel()
        with suppress(asyncio.CancelledError):
            await self._following

    def of(self, kind: EntityKind.ValueType) -> dict[str, bytes]:
        """Return what is held of a kind, by id."""
        return {key[1]: payload for key, (_, payload) in self.held.items() if key[0] == kind}

    async def _follow(self) -> None:
        async for frame in self.frames:
            self.take(frame)

    def take(self, frame: WatchFrame) -> None:
        """Apply a frame. Fail if it brings an older state than one that is held."""
        if frame.kind == watches_pb2.WATCH_FRAME_KIND_RESET:
            self.held.clear()
            self.resets += 1
        self.synced = self.synced or frame.kind == watches_pb2.WATCH_FRAME_KIND_SYNCED
        for change in frame.changes:
            key = (change.kind, change.id)
            held = self.held.get(key)
            assert held is None or held[0] <= change.revision, f"{self.name}: {change.id} went back"
            if change.deleted:
                self.held.pop(key, None)
            else:
                self.held[key] = (change.revision, change.resource.value)
