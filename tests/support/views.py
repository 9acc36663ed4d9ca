"""Watchers that keep what they were told, as a user interface does, to be compared with what reads answer."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

from branchline.v1.watches_pb2 import CHANGE_TYPE_UPSERTED, FRAME_KIND_RESET, FRAME_KIND_SYNCED
from branchline.views import identity

Key = tuple[str, str]
"""The field of the change, and the entity's id."""


@dataclass
class View:
    """What one watcher knows; it is open until it is closed, through whatever happens."""

    name: str
    frames: AsyncIterator[Any]
    held: dict[Key, Any] = field(default_factory=dict[Key, Any])
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

    def of(self, field: str) -> dict[str, Any]:
        """Return what is held in a field of the change, by id."""
        return {key[1]: entity for key, entity in self.held.items() if key[0] == field}

    async def _follow(self) -> None:
        async for response in self.frames:
            self.take(response)

    def take(self, response: Any) -> None:
        """Apply a frame. Fail if it brings an older state than one that is held."""
        if response.header.kind == FRAME_KIND_RESET:
            self.held.clear()
            self.resets += 1
        self.synced = self.synced or response.header.kind == FRAME_KIND_SYNCED
        for change in response.changes:
            name = change.WhichOneof("entity")
            entity = getattr(change, name)
            key = (name, identity(entity))
            if change.type != CHANGE_TYPE_UPSERTED:
                self.held.pop(key, None)
                continue
            held = self.held.get(key)
            revision = getattr(entity, "revision", 1)
            assert held is None or getattr(held, "revision", 1) <= revision, f"{self.name}: {key} went back"
            self.held[key] = entity
