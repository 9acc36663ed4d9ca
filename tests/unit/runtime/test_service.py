"""A running service: its loops are its life, and its end is orderly."""

import asyncio
from pathlib import Path

import pytest

from services.runtime.database import DatabaseUnavailable
from services.runtime.service import Service
from services.runtime.serving import Call


async def admit(_call: Call) -> None:
    return


def service(tmp_path: Path) -> Service:
    return Service("test", f"unix:{tmp_path / 's.sock'}", admit, drain_seconds=0.1)


async def ends() -> None:
    await asyncio.sleep(0)


async def raises() -> None:
    raise ValueError("a bug")


async def swallows() -> None:
    raise asyncio.CancelledError


@pytest.mark.parametrize("loop", [ends, raises, swallows])
async def test_a_loop_that_ends_in_any_way_takes_the_service_down(tmp_path: Path, loop: object) -> None:  # F3
    running = service(tmp_path)
    running.loops.append(loop)  # type: ignore[arg-type]

    async def run() -> None:
        async with running.running():
            await asyncio.Event().wait()

    with pytest.raises(ExceptionGroup):
        async with asyncio.timeout(5):
            await run()


async def test_a_database_that_goes_away_between_two_steps_of_a_start_is_waited_for(tmp_path: Path) -> None:
    starting, taken = service(tmp_path), list[str]()

    async def second() -> None:
        taken.append("second")
        if len(taken) == 2:
            raise DatabaseUnavailable("the server is gone again")

    async def first() -> None:
        taken.append("first")

    starting.before_start += [first, second]
    async with asyncio.timeout(10), starting.running():
        assert taken == ["first", "second", "second"]


async def test_what_was_made_last_is_ended_first_and_all_of_it(tmp_path: Path) -> None:
    running, ended = service(tmp_path), list[str]()

    async def end(name: str) -> None:
        ended.append(name)
        if name == "channel":
            raise ConnectionError

    for name in ("database", "channel", "workflows"):
        running.after_stop.append(lambda name=name: end(name))
    with pytest.raises(ConnectionError):
        async with running.running():
            pass

    assert ended == ["workflows", "channel", "database"]
