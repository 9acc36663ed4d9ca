"""Views of the Python client: what they show and tell through breaks, resets and slow readers. Item 6."""

import asyncio
from collections.abc import AsyncGenerator
from datetime import timedelta
from itertools import islice
from typing import Any

import grpc
import pytest
from branchline import AsyncClient, BranchlineError, OrganizationView
from branchline.v1.errors_pb2 import ERROR_REASON_RESOURCE_NOT_FOUND
from branchline.v1.history_pb2 import HistoryChange
from branchline.v1.organizations_pb2 import OrganizationChange, WatchOrganizationResponse
from branchline.v1.tasks_pb2 import TaskChange, TaskSummary
from branchline.v1.watches_pb2 import (
    CHANGE_TYPE_DELETED,
    CHANGE_TYPE_REMOVED,
    CHANGE_TYPE_UPSERTED,
    FRAME_KIND_CHANGES,
    FRAME_KIND_HEARTBEAT,
    FRAME_KIND_RESET,
    FRAME_KIND_SNAPSHOT,
    FRAME_KIND_SYNCED,
    ChangeType,
    FrameHeader,
    FrameKind,
)
from branchline.views import identity
from google.protobuf.descriptor import FieldDescriptor

from tests.unit.sdk.server import Failure, Server

UPSERTED, REMOVED, DELETED = CHANGE_TYPE_UPSERTED, CHANGE_TYPE_REMOVED, CHANGE_TYPE_DELETED
CHANGES, SYNCED, SNAPSHOT = FRAME_KIND_CHANGES, FRAME_KIND_SYNCED, FRAME_KIND_SNAPSHOT
SECONDS = 10


def upserted(name: str, title: str = "") -> OrganizationChange:
    return OrganizationChange(type=UPSERTED, task=TaskSummary(id=name, title=title))


def gone(name: str, kind: ChangeType.ValueType = DELETED) -> OrganizationChange:
    return OrganizationChange(type=kind, task=TaskSummary(id=name))


def frame(
    kind: FrameKind.ValueType, *changes: OrganizationChange, token: str = "", heartbeat: float = SECONDS
) -> WatchOrganizationResponse:
    header = FrameHeader(kind=kind, resume_token=token)
    header.heartbeat_interval.FromTimedelta(timedelta(seconds=heartbeat))
    return WatchOrganizationResponse(header=header, changes=changes)


def snapshot(*changes: OrganizationChange, token: str = "") -> list[WatchOrganizationResponse]:
    return [frame(FRAME_KIND_RESET), frame(SNAPSHOT, *changes), frame(SYNCED, token=token)]


def shown(view: OrganizationView) -> dict[str, str]:
    return {task.id: task.title for task in view.tasks.values()}


async def until(view: OrganizationView, **tasks: str) -> None:
    await view.wait_for(lambda view: shown(view) == tasks, SECONDS)


async def told(reader: AsyncGenerator[OrganizationChange, None], count: int) -> list[tuple[str, str, str]]:
    """Return the next changes that a reader is told, as (type, task, title)."""
    async with asyncio.timeout(SECONDS):
        changes = [await anext(reader) for _ in range(count)]
    return [(ChangeType.Name(one.type)[len("CHANGE_TYPE_") :], one.task.id, one.task.title) for one in changes]


async def test_a_view_shows_a_snapshot_when_it_is_complete_and_then_every_change(
    server: Server, client: AsyncClient
) -> None:
    async with client.watch_organization("org_1") as view:
        server.stream(frame(FRAME_KIND_RESET), frame(SNAPSHOT, upserted("a")), frame(SNAPSHOT, upserted("b")))
        with pytest.raises(TimeoutError):
            await view.wait_for(lambda _: True, 0.1)
        assert (view.synced, shown(view)) == (False, {})

        server.stream(frame(SYNCED))
        await until(view, a="", b="")
        server.stream(
            frame(CHANGES, upserted("a", "new"), gone("b"), upserted("c")), frame(CHANGES, gone("c", REMOVED))
        )
        await until(view, a="new")

    assert not view.connected


async def test_a_broken_watch_goes_on_where_it_was(server: Server, client: AsyncClient) -> None:
    async with client.watch_organization("org_1") as view:
        server.stream(*snapshot(upserted("a"), token="one"), frame(CHANGES, upserted("b"), token="two"), Failure())
        await until(view, a="", b="")
        await view.wait_for(lambda view: not view.connected, SECONDS)
        server.stream(frame(CHANGES, gone("a"), token="three"), frame(SYNCED), frame(FRAME_KIND_HEARTBEAT))
        await until(view, b="")

    assert [sent.resume_token for sent in server.requests] == ["", "two"]
    assert view.resume_token == "three"


@pytest.mark.parametrize("code", ["INTERNAL", "RESOURCE_EXHAUSTED", "CANCELLED", "DEADLINE_EXCEEDED", "UNAVAILABLE"])
async def test_a_view_outlives_what_may_pass(server: Server, client: AsyncClient, code: str) -> None:
    async with client.watch_organization("org_1") as view:
        server.stream(Failure(grpc.StatusCode[code]), *snapshot(upserted("a")))
        await until(view, a="")


async def test_a_reset_tells_exactly_what_differs(server: Server, client: AsyncClient) -> None:
    async with client.watch_organization("org_1") as view:
        server.stream(*snapshot(upserted("left"), upserted("same"), upserted("moved", "old")))
        await view.wait_for(lambda _: True, SECONDS)
        reader = view.changes()
        await told(reader, 3)

        server.stream(frame(FRAME_KIND_RESET), frame(SNAPSHOT, upserted("came")))
        server.stream(frame(SNAPSHOT, upserted("same"), upserted("moved", "new")), frame(SYNCED))

        assert await told(reader, 3) == [
            ("REMOVED", "left", ""),
            ("UPSERTED", "came", ""),
            ("UPSERTED", "moved", "new"),
        ]
        assert shown(view) == {"came": "", "same": "", "moved": "new"}


async def test_a_break_within_a_snapshot_leaves_what_was_shown(server: Server, client: AsyncClient) -> None:
    async with client.watch_organization("org_1") as view:
        server.stream(*snapshot(upserted("a"), token="one"))
        await until(view, a="")
        server.stream(Failure(), frame(FRAME_KIND_RESET), frame(SNAPSHOT, upserted("half")), Failure())
        server.stream(frame(CHANGES, upserted("b"), token="two"), frame(SYNCED))
        await until(view, a="", b="")

    assert [sent.resume_token for sent in server.requests] == ["", "one", "one"]


async def test_a_reset_within_a_snapshot_forgets_its_beginning(server: Server, client: AsyncClient) -> None:
    async with client.watch_organization("org_1") as view:
        server.stream(frame(FRAME_KIND_RESET), frame(SNAPSHOT, upserted("half")), *snapshot(upserted("whole")))
        await view.wait_for(lambda _: True, SECONDS)

        assert shown(view) == {"whole": ""}


async def test_what_was_never_shown_or_is_gone_already_is_not_told_again(server: Server, client: AsyncClient) -> None:
    async with client.watch_organization("org_1") as view:
        reader = view.changes()
        server.stream(*snapshot(upserted("a")))
        first = await told(reader, 1)
        server.stream(frame(CHANGES, gone("never"), gone("a"), gone("a", REMOVED), upserted("b")))

        assert [*first, *await told(reader, 2)] == [("UPSERTED", "a", ""), ("DELETED", "a", ""), ("UPSERTED", "b", "")]


async def test_a_later_view_is_told_what_it_missed(server: Server, client: AsyncClient) -> None:
    async with client.watch_organization("org_1", resume_token="before") as view:
        reader = view.changes()
        server.stream(frame(CHANGES, upserted("a"), token="now"))
        assert await told(reader, 1) == [("UPSERTED", "a", "")]
        assert not view.synced
        server.stream(frame(SYNCED))
        await until(view, a="")

    assert server.requests[0].resume_token == "before"


async def test_a_reader_begins_with_what_is_held_whenever_it_comes(server: Server, client: AsyncClient) -> None:
    async with client.watch_organization("org_1") as view:
        early = view.changes()
        server.stream(*snapshot(upserted("a"), upserted("b")))
        await until(view, a="", b="")

        assert await told(early, 2) == await told(view.changes(), 2) == [("UPSERTED", "a", ""), ("UPSERTED", "b", "")]


async def test_a_slow_reader_is_told_the_newest_of_each_in_the_order_of_the_last_changes(
    server: Server, client: AsyncClient
) -> None:
    async with client.watch_organization("org_1") as view:
        server.stream(*snapshot(upserted("a"), upserted("b")))
        reader = view.changes()
        await told(reader, 2)
        server.stream(*(frame(CHANGES, upserted("a", str(number))) for number in range(100)))
        server.stream(frame(CHANGES, gone("b"), upserted("a", "last")))
        await until(view, a="last")

        assert await told(reader, 2) == [("DELETED", "b", ""), ("UPSERTED", "a", "last")]


async def test_a_snapshot_of_any_size_reaches_its_readers(server: Server, client: AsyncClient) -> None:
    names = [f"task_{number}" for number in range(25_000)]
    async with client.watch_organization("org_1") as view:
        reader = view.changes()
        parts = iter(names)
        server.stream(frame(FRAME_KIND_RESET))
        while part := [upserted(name) for name in islice(parts, 1000)]:
            server.stream(frame(SNAPSHOT, *part))
        server.stream(frame(SYNCED))

        assert [name for _, name, _ in await told(reader, len(names))] == names


async def test_what_cannot_be_mended_ends_the_view_for_all_who_wait(server: Server, client: AsyncClient) -> None:
    async with client.watch_organization("org_1") as view:
        server.stream(*snapshot(upserted("a")))
        reader = view.changes()
        await told(reader, 1)
        server.stream(Failure(grpc.StatusCode.NOT_FOUND, "RESOURCE_NOT_FOUND"))
        for waiting in (anext(reader), view.wait_for(lambda _: False, SECONDS), told(view.changes(), 2)):
            with pytest.raises(BranchlineError) as failed:
                await waiting
            assert failed.value.reason == ERROR_REASON_RESOURCE_NOT_FOUND
        assert (shown(view), view.connected) == ({"a": ""}, False)


async def test_who_waits_when_a_view_is_closed_is_told(server: Server, client: AsyncClient) -> None:
    async with client.watch_organization("org_1") as view:
        waiting = asyncio.create_task(view.wait_for(lambda _: False))
        reading = asyncio.create_task(told(view.changes(), 1))
        await asyncio.sleep(0)

    for one in (waiting, reading):
        with pytest.raises(BranchlineError, match="closed"):
            await one


async def test_what_a_view_cannot_read_is_raised_where_it_is_used() -> None:
    async def broken(_: str) -> AsyncGenerator[Any, None]:
        raise KeyError("a fault of ours")
        yield

    async with OrganizationView(broken) as view:
        with pytest.raises(KeyError):
            await view.wait_for(lambda _: True, SECONDS)


async def test_a_silent_stream_is_given_up_and_opened_again(server: Server, client: AsyncClient) -> None:
    async with client.watch_organization("org_1", heartbeat=timedelta(seconds=1)) as view:
        server.stream(frame(FRAME_KIND_RESET), frame(SYNCED, token="one", heartbeat=0.1))
        await server.called(2)
        assert not view.connected
        server.stream(frame(SYNCED, upserted("a")))
        await until(view, a="")

    assert server.requests[1].resume_token == "one"
    assert server.requests[0].heartbeat_interval.seconds == 1


async def test_a_watch_comes_back_when_the_server_says(server: Server, client: AsyncClient) -> None:
    loop = asyncio.get_running_loop()
    async with client.watch_organization("org_1") as view:
        server.stream(Failure(reason="INDEX_BEHIND", retry=timedelta(seconds=0.5)))
        begun = loop.time()
        server.stream(*snapshot())
        await view.wait_for(lambda _: True, SECONDS)

    assert loop.time() - begun >= 0.5


@pytest.mark.parametrize("change", [OrganizationChange, TaskChange, HistoryChange])
def test_every_entity_of_every_watch_has_an_identity(change: type[Any]) -> None:
    for field in change.DESCRIPTOR.oneofs_by_name["entity"].fields:
        entities = [getattr(change(), field.name) for _ in "ab"]
        for entity, value in zip(entities, "ab", strict=True):
            for one in entity.DESCRIPTOR.fields:
                if one.type == FieldDescriptor.TYPE_STRING and not one.is_repeated:
                    setattr(entity, one.name, value)

        assert identity(entities[0]) != identity(entities[1])
