"""The sandbox service alone, with the real sandbox-agent: killed, paused and cut at the moments that hurt."""

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest_asyncio
from branchline.resource.v1 import session_pb2

from tests.support.sandbox import Room, sandbox_room

IDLE, ERROR = session_pb2.SESSION_STATUS_IDLE, session_pb2.SESSION_STATUS_ERROR
WORDS = "".join(f"word {number}\n" for number in range(1, 31))


@pytest_asyncio.fixture
async def room(tmp_path: Path, request: Any) -> AsyncGenerator[Room, None]:
    async with sandbox_room(tmp_path, **getattr(request, "param", {})) as made:
        yield made


async def test_a_turn_is_done_and_brings_the_commit_at_the_tip(room: Room) -> None:  # C3, C12
    await room.start()
    await room.open()

    ended = await room.turn(1, "say hello there\nwrite a.txt: a\ncommit A")

    assert ended.status == IDLE, ended
    head = await room.execute("cd workspace && git rev-parse HEAD")
    assert ended.head_commit == head.stdout.strip()
    assert room.coordinator.said().startswith("hello there\n")
    assert [state.status for state in room.coordinator.sessions] == [IDLE]
