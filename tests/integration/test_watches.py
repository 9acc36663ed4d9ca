"""Watches: a snapshot, then changes; exactly what was missed after a break; nobody sees what is not theirs."""

import asyncio
import itertools
from typing import Any

import grpc
from branchline.client import Client
from branchline.v1 import organizations_pb2, tasks_pb2, users_pb2, watches_pb2
from branchline.v1.sessions_pb2 import TranscriptEntry
from branchline.v1.tasks_pb2 import Task, TaskSummary
from branchline.v1.users_pb2 import Draft, UserTaskState
from branchline.v1.vocabulary_pb2 import (
    ENTITY_KIND_TASK,
    ENTITY_KIND_TRANSCRIPT_ENTRY,
    ENTITY_KIND_USER_TASK_STATE,
)
from branchline.v1.watches_pb2 import WatchChange, WatchFrame

from services.runtime.spine.tokens import Position, parse_resume_token, resume_token
from tests.support.stack import Stack, eventually, failure, request_id

RESET, SYNCED = watches_pb2.WATCH_FRAME_KIND_RESET, watches_pb2.WATCH_FRAME_KIND_SYNCED
IDLE = tasks_pb2.TASK_STATUS_IDLE
STATE = ENTITY_KIND_USER_TASK_STATE


async def opening(call: Any) -> list[WatchFrame]:
    """Read a watch until it is complete."""
    frames: list[WatchFrame] = []
    async with asyncio.timeout(20):
        async for response in call:
            frames.append(response.frame)
            if response.frame.kind == SYNCED:
                return frames
    raise AssertionError("a watch does not end")


def changes(frames: list[WatchFrame]) -> list[WatchChange]:
    return [change for frame in frames for change in frame.changes]


def watch(client: Client, organization_id: str, token: str = "", consistency_token: str = "") -> Any:
    return client.organizations.WatchOrganization(
        organizations_pb2.WatchOrganizationRequest(
            organization_id=organization_id, resume_token=token, consistency_token=consistency_token
        )
    )


async def test_a_watch_begins_with_what_the_sidebar_lists(stack: Stack) -> None:  # ORG-8
    task = await stack.ready_task()

    frames = await opening(watch(stack.client, stack.organization_id))

    assert frames[0].kind == RESET
    tasks = [change for change in changes(frames) if change.kind == ENTITY_KIND_TASK]
    held = {change.id: TaskSummary.FromString(change.resource.value) for change in tasks}
    listed = await stack.client.tasks.ListTasks(
        tasks_pb2.ListTasksRequest(organization_id=stack.organization_id, page_size=1000)
    )
    assert held[task.id].status == IDLE
    assert set(held) == {one.id for one in listed.tasks}


async def test_a_watch_with_a_consistency_token_begins_with_the_change(stack: Stack) -> None:  # API-5
    repository_id = await stack.add_repository()
    made = await stack.client.tasks.CreateTask(
        tasks_pb2.CreateTaskRequest(
            request_id=request_id(), repository_id=repository_id, text="say hi", hold_prompt=True
        )
    )

    frames = await opening(watch(stack.client, stack.organization_id, consistency_token=made.consistency_token))

    assert made.task.id in {change.id for change in changes(frames)}


async def test_a_returning_watcher_gets_exactly_what_it_missed(stack: Stack) -> None:  # API-4
    task = await stack.ready_task()
    before = await opening(watch(stack.client, stack.organization_id))
    held = {(change.kind, change.id): change.revision for change in changes(before)}

    await stack.send(task, "say hello")
    await stack.until(task.id, IDLE, turn=1)
    missed = await opening(watch(stack.client, stack.organization_id, before[-1].resume_token))

    assert RESET not in {frame.kind for frame in missed}
    assert (ENTITY_KIND_TASK, task.id) in {(change.kind, change.id) for change in changes(missed)}
    assert all(change.revision > held.get((change.kind, change.id), 0) for change in changes(missed))


async def test_a_token_that_is_too_old_or_of_another_life_gives_a_reset(stack: Stack) -> None:  # API-4
    frames = await opening(watch(stack.client, stack.organization_id))
    user_id = (await stack.client.users.WhoAmI(users_pb2.WhoAmIRequest())).user.id
    topic = f"organization/{stack.organization_id}/{user_id}"
    point = parse_resume_token(frames[-1].resume_token, topic)
    assert point is not None

    other_life = await opening(watch(stack.client, stack.organization_id, resume_token(topic, Position("before", 1))))
    beyond = Position(point.epoch, 10**9)  # as after a restore from an older backup
    future = await opening(watch(stack.client, stack.organization_id, resume_token(topic, beyond)))

    assert other_life[0].kind == future[0].kind == RESET


async def test_a_token_of_another_watch_is_refused(stack: Stack) -> None:  # API-4
    task = await stack.ready_task()
    frames = await opening(watch(stack.client, stack.organization_id))

    request = tasks_pb2.WatchTaskRequest(task_id=task.id, resume_token=frames[-1].resume_token)
    refused = await failure(opening(stack.client.tasks.WatchTask(request)))

    assert (refused.code, refused.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["resume_token"])


async def test_a_task_is_watched_with_its_transcript_as_it_streams(stack: Stack) -> None:  # REP-7, SES-4
    task = await stack.ready_task()
    seen: dict[str, list[tuple[int, str]]] = {}

    async def collect() -> None:
        async for frame in stack.client.watch_task(task.id):
            for change in frame.changes:
                if change.kind == ENTITY_KIND_TRANSCRIPT_ENTRY:
                    entry = TranscriptEntry.FromString(change.resource.value)
                    seen.setdefault(entry.id, []).append((entry.revision, entry.text))

    collecting = asyncio.create_task(collect())
    await stack.send(task, "say one two three four five six seven eight nine ten")
    await stack.until(task.id, IDLE, turn=1)

    async def complete():
        return any(states[-1][1].endswith("ten\nDone.\n") for states in seen.values())

    await eventually(complete)
    collecting.cancel()
    streamed = next(states for states in seen.values() if states[-1][1].endswith("Done.\n"))
    assert len(streamed) > 3
    assert [revision for revision, _ in streamed] == sorted({revision for revision, _ in streamed})
    assert all(later.startswith(earlier) for (_, earlier), (_, later) in itertools.pairwise(streamed))


async def test_a_users_own_state_is_seen_by_nobody_else(stack: Stack) -> None:  # USR-5
    task = await stack.ready_task()
    other, _ = await stack.new_member()

    await stack.client.users.SetTaskState(
        users_pb2.SetTaskStateRequest(task_id=task.id, unread=True, draft=Draft(text="half a thought"))
    )

    async def drafts(client: Client) -> list[str]:
        frames = await opening(watch(client, stack.organization_id))
        states = [UserTaskState.FromString(one.resource.value) for one in changes(frames) if one.kind == STATE]
        return [state.draft.text for state in states if state.task_id == task.id and state.draft.text]

    assert await eventually(lambda: drafts(stack.client)) == ["half a thought"]
    assert await drafts(other) == []


async def test_a_finished_agent_marks_the_task_unread_for_all_members(stack: Stack) -> None:  # USR-6
    task = await stack.ready_task()
    other, other_id = await stack.new_member()
    await stack.send(task, "say done")

    async def unread():
        frames = await opening(watch(other, stack.organization_id))
        states = [UserTaskState.FromString(one.resource.value) for one in changes(frames) if one.kind == STATE]
        return [state for state in states if state.task_id == task.id and state.unread]

    states = await eventually(unread)
    assert {state.user_id for state in states} == {other_id}


async def test_many_watchers_share_one_upstream_and_end_equal(stack: Stack) -> None:  # API-4
    task = await stack.ready_task()
    synced = 0

    def upstream_watches() -> int:
        return len([1 for one, method in stack.calls if one == "repository" and method.endswith("/WatchIndex")])

    async def follow() -> dict[str, int]:
        nonlocal synced
        held: dict[str, int] = {}
        async for frame in stack.client.watch_task(task.id):
            synced += frame.kind == SYNCED
            for change in frame.changes:
                held[change.id] = change.revision
                if change.kind == ENTITY_KIND_TASK and Task.FromString(change.resource.value).head_commit:
                    return held
        raise AssertionError("a watch does not end")

    async def all_are_synced() -> bool:
        return synced >= 20

    followers = [asyncio.create_task(follow()) for _ in range(20)]
    await eventually(all_are_synced)
    before = upstream_watches()
    await stack.send(task, "say hello\nwrite a.txt: a\ncommit A")
    views = await asyncio.gather(*followers)

    assert all(view == views[0] for view in views)
    assert upstream_watches() == before


async def test_reads_reach_organization_and_repository_alone(stack: Stack) -> None:  # API-2
    task = await stack.ready_task()
    await stack.send(task, "say hello")
    await stack.until(task.id, IDLE, turn=1)
    await asyncio.sleep(1)  # whatever the turn still causes on its own is over
    stack.calls.clear()

    client, organization_id = stack.client, stack.organization_id
    await client.tasks.ListTasks(tasks_pb2.ListTasksRequest(organization_id=organization_id))
    await client.tasks.GetTask(tasks_pb2.GetTaskRequest(task_id=task.id))
    await stack.transcript(task)
    await client.users.WhoAmI(users_pb2.WhoAmIRequest())
    await client.users.ListApiTokens(users_pb2.ListApiTokensRequest())
    await client.organizations.ListMembers(organizations_pb2.ListMembersRequest(organization_id=organization_id))
    await opening(watch(client, organization_id))
    await opening(client.tasks.WatchTask(tasks_pb2.WatchTaskRequest(task_id=task.id)))

    assert {service for service, _ in stack.calls} == {"gateway", "organization", "repository"}
    assert not [method for _, method in stack.calls if method.endswith("/Push")]
