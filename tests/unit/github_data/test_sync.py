"""The loop that reads GitHub: it lives on, and nobody waits for another's account."""

from typing import Any

import pytest
from branchline.v1 import organizations_pb2
from branchline.v1.organizations_pb2 import GithubStatus

from services.runtime.database import Reader
from tests.unit.github_data.conftest import FakeGithub, Room


async def test_one_organizations_slow_github_does_not_hold_up_another(room: Room, github: FakeGithub) -> None:
    github.slow.add("snail")
    await room.want("org_slow", "snail")
    await room.want("org_fast", "acme")

    status = await room.status("org_fast")

    assert status.connection == organizations_pb2.GITHUB_CONNECTION_CONNECTED
    assert (await room.repositories())["org_fast"].full_name == "acme/shop"
    assert [one.organization_id for one in await room.marked(GithubStatus)] == ["org_fast"]


async def test_reading_an_account_has_a_deadline(room: Room, github: FakeGithub) -> None:
    github.slow.add("snail")
    room.sync.sync_seconds = 0.1
    await room.want("org_1", "snail")

    status = await room.status("org_1")

    assert status.connection == organizations_pb2.GITHUB_CONNECTION_FAILING
    assert "took longer than" in status.detail


async def test_an_answer_that_makes_no_sense_is_said_and_the_next_sync_goes_on(room: Room, github: FakeGithub) -> None:
    github.broken.add("acme")
    await room.want("org_1", "acme")
    first = await room.status("org_1")

    github.broken.clear()
    await room.want("org_1", "acme")
    second = await room.status("org_1", revision=2)

    assert first.connection == organizations_pb2.GITHUB_CONNECTION_FAILING
    assert second.connection == organizations_pb2.GITHUB_CONNECTION_CONNECTED
    assert (second.detail, second.repository_count) == ("", 1)


async def test_the_loop_lives_through_errors_of_the_database(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:  # F3
    read, failures = room.database.read, [1]

    async def failing(fn: Any, *args: Any) -> Any:
        if fn == room.store.wanted and failures:
            failures.pop()
            raise OSError("disk")
        return await read(fn, *args)

    monkeypatch.setattr(room.database, "read", failing)
    await room.want("org_1", "acme")
    while failures:
        await read(Reader.is_outage, OSError())
    await room.want("org_2", "acme")

    assert (await room.status("org_1")).connection == organizations_pb2.GITHUB_CONNECTION_CONNECTED


async def test_a_wish_during_a_sync_is_fulfilled_after_it(room: Room, github: FakeGithub) -> None:
    github.slow.add("acme")
    await room.want("org_1", "acme")
    while not github.asked:
        await room.marked(GithubStatus)
    await room.want("org_1", "acme")
    github.slow.clear()
    github.release.set()

    assert (await room.status("org_1", revision=2)).revision == 2


async def test_what_did_not_change_is_not_pushed_again(room: Room) -> None:
    await room.want("org_1", "acme")
    await room.status("org_1")
    await room.want("org_1", "acme")
    await room.status("org_1", revision=2)

    assert (await room.repositories())["org_1"].revision == 1


async def test_a_forgotten_organization_comes_back_neither_by_a_sync_that_runs_nor_by_its_end(
    room: Room, github: FakeGithub
) -> None:
    await room.want("org_1", "acme")
    await room.status("org_1")
    reported = (await room.repositories())["org_1"]
    held = len(await room.marked(GithubStatus))

    await room.database.write(room.store.forget, "org_1")
    reported.default_branch = "trunk"
    stored = await room.database.write(room.store.save_repository, reported)

    assert not stored
    assert await room.database.read(room.store.wanted) == []
    assert len(await room.marked(GithubStatus)) == held
