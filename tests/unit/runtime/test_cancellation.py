"""Cancellation is never swallowed. F25."""

import ast
import asyncio
from pathlib import Path

import pytest

from services.runtime.loops import Every, being_cancelled
from services.runtime.signal import Signal

ROOT = Path(__file__).parents[3]


def test_nothing_waits_with_wait_for() -> None:
    """In Python 3.11 `asyncio.wait_for` drops a cancellation that comes when what it waits for is done."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for folder in ("services", "gateway", "cli")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "wait_for" and isinstance(node.value, ast.Name)
        if node.value.id == "asyncio"
    ]

    assert found == []


async def test_a_cancelled_waiter_is_cancelled_though_the_notification_came_at_the_same_moment() -> None:
    signal = Signal()

    async def wait() -> None:
        await signal.wait(signal.ticket, 10)
        await asyncio.sleep(0)

    waiting = asyncio.create_task(wait())
    await asyncio.sleep(0)
    signal.notify()
    waiting.cancel()
    await asyncio.wait({waiting}, timeout=1)

    assert waiting.cancelled()


async def test_periodic_work_lives_through_errors_and_foreign_cancellations_and_ends_when_it_is_told_to() -> None:
    errors: list[BaseException] = [ValueError("a bug"), asyncio.CancelledError(), ConnectionError()]
    done = asyncio.Event()

    async def work() -> None:
        if errors:
            raise errors.pop()
        done.set()

    running = asyncio.create_task(Every(0.01, "work", work).run())
    async with asyncio.timeout(5):
        await done.wait()
    running.cancel()
    await asyncio.wait({running}, timeout=1)

    assert running.cancelled()


async def test_a_cancellation_from_outside_is_told_from_one_that_a_broken_call_raises() -> None:
    seen: list[bool] = []

    async def look(foreign: bool) -> None:
        try:
            if foreign:
                raise asyncio.CancelledError
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append(being_cancelled())
            raise

    for foreign in (True, False):
        task = asyncio.create_task(look(foreign))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    assert seen == [False, True]


async def test_a_cancellation_that_comes_while_a_group_fails_ends_the_loop() -> None:
    """The group raises its errors then, and no CancelledError: a loop that went on would never end."""
    breaking = asyncio.Event()

    async def breaks() -> None:
        await breaking.wait()
        raise ConnectionError

    async def ends_slowly() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)

    async def work() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(breaks())
            group.create_task(ends_slowly())

    running = asyncio.create_task(Every(0.01, "work", work).run())
    await asyncio.sleep(0.01)
    breaking.set()
    await asyncio.sleep(0.005)
    running.cancel()
    await asyncio.wait({running}, timeout=1)

    assert running.done()
