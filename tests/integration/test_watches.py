"""Watches: a snapshot, then changes; exactly what was missed after a break; nobody sees what is not theirs."""

import asyncio
import base64
import itertools
from functools import partial
from typing import Any, cast

import grpc
from branchline.v1 import history_pb2, organizations_pb2, sessions_pb2, tasks_pb2, users_pb2, watches_pb2
from branchline.v1.common_pb2 import ENTITY_KIND_MEMBER, ENTITY_KIND_TASK, Consistency, Prompt
from branchline.v1.history_pb2 import EVENT_KIND_MESSAGE_SENT, HistoryEvent, HistoryFilter
from branchline.v1.tasks_pb2 import TaskFilter
from branchline.views import identity
from branchline_internal.spine.v1.push_pb2 import ResumePoint

from services.runtime.spine.tokens import Position, resume_token
from tests.support.client import Client
from tests.support.stack import Stack, eventually, failure, request_id

RESET, SYNCED = watches_pb2.FRAME_KIND_RESET, watches_pb2.FRAME_KIND_SYNCED
UPSERTED, REMOVED = watches_pb2.CHANGE_TYPE_UPSERTED, watches_pb2.CHANGE_TYPE_REMOVED
IDLE, RUNNING = tasks_pb2.TASK_ACTIVITY_IDLE, tasks_pb2.TASK_ACTIVITY_RUNNING


async def opening(call: Any) -> list[Any]:
    """Read a watch until it is complete."""
    frames: list[Any] = []
    async with asyncio.timeout(20):
        async for response in call:
            frames.append(response)
            if response.header.kind == SYNCED:
                return frames
    raise AssertionError("a watch does not end")


def told(frames: list[Any]) -> dict[tuple[str, str], Any]:
    """Return the entities that frames brought, by field and id; an entity that came twice as it came last."""
    entities = [(change.WhichOneof("entity"), change) for frame in frames for change in frame.changes]
    return {(name, identity(getattr(change, name))): getattr(change, name) for name, change in entities}


def watch(client: Client, organization_id: str, token: str = "", **fields: Any) -> Any:
    return client.organizations.WatchOrganization(
        organizations_pb2.WatchOrganizationRequest(organization_id=organization_id, resume_token=token, **fields)
    )


async def test_a_watch_begins_with_what_the_sidebar_lists(stack: Stack) -> None:  # ORG-8
    task = await stack.ready_task()

    frames = await opening(watch(stack.client, stack.organization_id))

    assert frames[0].header.kind == RESET
    held = {key[1]: task for key, task in told(frames).items() if key[0] == "task"}
    listed = await stack.client.tasks.ListTasks(
        tasks_pb2.ListTasksRequest(organization_id=stack.organization_id, page_size=1000)
    )
    assert held[task.id].activity == IDLE
    assert held == {one.id: one for one in listed.tasks}


async def test_a_watch_with_a_consistency_token_begins_with_the_change(stack: Stack) -> None:  # API-5
    repository_id = await stack.add_repository()
    made = await stack.client.tasks.CreateTask(
        tasks_pb2.CreateTaskRequest(
            request_id=request_id(), repository_id=repository_id, prompt=Prompt(text="say hi"), hold_prompt=True
        )
    )

    fresh = Consistency(at_least_as_fresh=[made.consistency_token])
    frames = await opening(watch(stack.client, stack.organization_id, consistency=fresh))

    assert ("task", made.task.id) in told(frames)


async def test_a_returning_watcher_gets_exactly_what_it_missed(stack: Stack) -> None:  # API-4
    task = await stack.ready_task()
    before = await opening(watch(stack.client, stack.organization_id))
    held = told(before)

    await stack.send(task, "say hello")
    await stack.until(task.id, activity=IDLE, turn=1)
    missed = await opening(watch(stack.client, stack.organization_id, before[-1].header.resume_token))

    assert RESET not in {frame.header.kind for frame in missed}
    assert ("task", task.id) in told(missed)
    assert all(one.revision > held[key].revision for key, one in told(missed).items() if key in held)


async def test_a_token_that_is_too_old_or_of_another_life_gives_a_reset_that_says_why(stack: Stack) -> None:  # API-4
    frames = await opening(watch(stack.client, stack.organization_id))
    token = frames[-1].header.resume_token
    point = ResumePoint.FromString(base64.urlsafe_b64decode(token + "=="))
    before = resume_token(point.topic, Position("before", 1), point.selection)
    beyond = resume_token(point.topic, Position(point.epoch, 10**9), point.selection)  # as after a restore

    other_life = await opening(watch(stack.client, stack.organization_id, before))
    future = await opening(watch(stack.client, stack.organization_id, beyond))

    assert other_life[0].header.kind == future[0].header.kind == RESET
    assert other_life[0].header.reset_reason not in (0, watches_pb2.RESET_REASON_NO_TOKEN)


async def test_a_token_of_another_selection_begins_anew_and_says_so(stack: Stack) -> None:  # API-4
    task = await stack.ready_task()
    frames = await opening(watch(stack.client, stack.organization_id, kinds=[ENTITY_KIND_MEMBER]))
    token = frames[-1].header.resume_token

    same = await opening(watch(stack.client, stack.organization_id, token, kinds=[ENTITY_KIND_MEMBER]))
    other = await opening(watch(stack.client, stack.organization_id, token))

    assert RESET not in {frame.header.kind for frame in same}
    assert other[0].header.reset_reason == watches_pb2.RESET_REASON_REQUEST_CHANGED
    assert ("task", task.id) in told(other)


async def test_a_list_goes_on_as_a_watch_of_the_same_tasks(stack: Stack) -> None:  # API-4
    watched, other = await stack.ready_task(), await stack.ready_task()
    wanted = tasks_pb2.TaskFilter(repository_ids=[watched.repository_id])
    tasks_alone = {"kinds": [ENTITY_KIND_TASK], "tasks": wanted}
    listed = await stack.client.tasks.ListTasks(
        tasks_pb2.ListTasksRequest(organization_id=stack.organization_id, filter=wanted)
    )
    for task in (watched, other):
        await stack.send(task, "say hello")
        await stack.until(task.id, activity=IDLE, turn=1)

    same = await opening(watch(stack.client, stack.organization_id, listed.resume_token, **tasks_alone))
    again = await opening(watch(stack.client, stack.organization_id, same[-1].header.resume_token, **tasks_alone))
    wider = await opening(watch(stack.client, stack.organization_id, listed.resume_token, kinds=[ENTITY_KIND_TASK]))

    shown = [change.task for frame in same for change in frame.changes if change.type == UPSERTED]
    assert [task.id for task in listed.tasks] == [watched.id]
    assert RESET not in {frame.header.kind for frame in (*same, *again)}
    assert {task.id for task in shown} == {watched.id}
    assert shown[-1].revision > listed.tasks[0].revision
    assert [frame for frame in again if frame.changes] == []
    assert wider[0].header.reset_reason == watches_pb2.RESET_REASON_REQUEST_CHANGED
    assert {watched.id, other.id} <= {one for kind, one in told(wider) if kind == "task"}


async def test_a_filtered_watch_shows_a_task_while_it_matches_and_no_longer(stack: Stack) -> None:  # API-4
    task, other = await stack.ready_task(), await stack.ready_task()
    wanted = tasks_pb2.TaskFilter(repository_ids=[task.repository_id], activities=[RUNNING])
    call = watch(stack.client, stack.organization_id, kinds=[ENTITY_KIND_TASK], tasks=wanted)
    before = await opening(call)

    await stack.send(other, "say elsewhere")
    await stack.send(task, "say hello")
    seen: list[Any] = []
    async with asyncio.timeout(30):
        while REMOVED not in {change.type for change in seen}:
            seen.extend((await call.read()).changes)
    call.cancel()

    assert told(before) == {}
    assert {change.task.id for change in seen} == {task.id}
    assert [change.task.activity for change in seen[:-1]] == [RUNNING] * (len(seen) - 1)
    assert seen[-1].task == tasks_pb2.TaskSummary(id=task.id)


async def test_a_token_of_one_sessions_watch_hides_no_other_session_of_its_task(stack: Stack) -> None:  # API-4
    task = await stack.ready_task()
    first = await stack.session(task.id)
    made = await stack.client.sessions.CreateSession(
        sessions_pb2.CreateSessionRequest(request_id=request_id(), task_id=task.id)
    )
    await stack.send(task, "say here", session_id=first.id)
    await stack.send(task, "say there", session_id=made.session.id)
    await asyncio.gather(*(eventually(partial(has_worked, stack, task.id, one)) for one in (first.id, made.session.id)))
    one_alone = tasks_pb2.TranscriptSelection(session_ids=[first.id])
    request = tasks_pb2.WatchTaskRequest(task_id=task.id, transcripts=one_alone)
    narrow = await opening(stack.client.tasks.WatchTask(request))

    request = tasks_pb2.WatchTaskRequest(task_id=task.id, resume_token=narrow[-1].header.resume_token)
    wide = await opening(stack.client.tasks.WatchTask(request))

    assert sessions_of(narrow) == {first.id}
    assert wide[0].header.reset_reason == watches_pb2.RESET_REASON_REQUEST_CHANGED
    assert sessions_of(wide) == {first.id, made.session.id}


async def has_worked(stack: Stack, task_id: str, session_id: str) -> bool:
    session = await stack.session(task_id, session_id)
    return session.turn == 1 and session.state == sessions_pb2.SESSION_STATE_IDLE


def sessions_of(frames: list[Any]) -> set[str]:
    """Return the sessions of which frames brought transcript entries."""
    return {one.session_id for (kind, _), one in told(frames).items() if kind == "transcript_entry"}


async def test_a_token_of_another_watch_is_refused(stack: Stack) -> None:  # API-4
    task = await stack.ready_task()
    frames = await opening(watch(stack.client, stack.organization_id))

    request = tasks_pb2.WatchTaskRequest(task_id=task.id, resume_token=frames[-1].header.resume_token)
    refused = await failure(opening(stack.client.tasks.WatchTask(request)))

    assert (refused.code, refused.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["resume_token"])


async def test_a_task_is_watched_with_its_transcript_as_it_streams(stack: Stack) -> None:  # REP-7, SES-4
    task = await stack.ready_task()
    seen: dict[str, list[tuple[int, str]]] = {}

    async def collect() -> None:
        async for frame in stack.client.watch_task(task.id):
            for change in frame.changes:
                if change.HasField("transcript_entry"):
                    entry = change.transcript_entry
                    seen.setdefault(entry.id, []).append((entry.revision, entry.agent_message.text))

    collecting = asyncio.create_task(collect())
    await stack.send(task, "say one two three four five six seven eight nine ten")
    await stack.until(task.id, activity=IDLE, turn=1)

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

    await stack.client.users.UpdateUserTaskState(
        users_pb2.UpdateUserTaskStateRequest(
            user_task_state=users_pb2.UserTaskState(organization_id=stack.organization_id, task_id=task.id, unread=True)
        )
    )
    await stack.client.users.UpdateDraft(
        users_pb2.UpdateDraftRequest(draft=users_pb2.Draft(task_id=task.id, prompt=Prompt(text="half a thought")))
    )

    async def states(client: Client) -> list[Any]:
        entities = told(await opening(watch(client, stack.organization_id))).items()
        return [one for key, one in entities if key[0] == "user_task_state" and one.task_id == task.id]

    async def with_draft() -> list[Any]:
        return [one for one in await states(stack.client) if one.HasField("draft_time")]

    (mine,) = await eventually(with_draft)
    assert mine.unread
    assert await states(other) == []
    read = await stack.client.users.GetDraft(users_pb2.GetDraftRequest(task_id=task.id))
    foreign = await other.users.GetDraft(users_pb2.GetDraftRequest(task_id=task.id))
    assert (read.draft.prompt.text, foreign.draft.prompt.text) == ("half a thought", "")


async def test_a_finished_agent_marks_the_task_unread_for_all_members(stack: Stack) -> None:  # USR-6
    task = await stack.ready_task()
    other, other_id = await stack.new_member()
    await stack.send(task, "say done")

    async def unread():
        entities = told(await opening(watch(other, stack.organization_id))).items()
        states = [one for key, one in entities if key[0] == "user_task_state"]
        return [state for state in states if state.task_id == task.id and state.unread]

    states = await eventually(unread)
    assert {state.user_id for state in states} == {other_id}


async def test_many_watchers_share_one_upstream_and_end_equal(stack: Stack) -> None:  # API-4
    task = await stack.ready_task()
    synced = 0

    def upstream_watches() -> int:
        return len([1 for one, method in stack.calls if one == "repository" and method.endswith("/WatchIndex")])

    async def follow() -> dict[tuple[str, str], int]:
        nonlocal synced
        held: dict[tuple[str, str], int] = {}
        async for frame in stack.client.watch_task(task.id):
            synced += frame.header.kind == SYNCED
            for key, entity in told([frame]).items():
                held[key] = entity.revision
                if key[0] == "task" and entity.head_commit:
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
    await stack.until(task.id, activity=IDLE, turn=1)
    await asyncio.sleep(1)  # whatever the turn still causes on its own is over
    stack.calls.clear()

    client, organization_id = stack.client, stack.organization_id
    await client.tasks.ListTasks(tasks_pb2.ListTasksRequest(organization_id=organization_id))
    await client.tasks.GetTask(tasks_pb2.GetTaskRequest(task_id=task.id))
    await stack.transcript(task)
    await client.users.GetCurrentUser(users_pb2.GetCurrentUserRequest())
    await client.users.ListApiTokens(users_pb2.ListApiTokensRequest())
    await client.organizations.ListMembers(organizations_pb2.ListMembersRequest(organization_id=organization_id))
    await opening(watch(client, organization_id))
    await opening(client.tasks.WatchTask(tasks_pb2.WatchTaskRequest(task_id=task.id)))

    assert {service for service, _ in stack.calls} == {"gateway", "organization", "repository"}
    assert not [method for _, method in stack.calls if method.endswith("/Push")]


async def test_a_watch_goes_on_where_a_list_of_the_same_ended(stack: Stack) -> None:  # API-4
    task = await stack.ready_task()
    chosen = TaskFilter(repository_ids=[task.repository_id])
    listed = await stack.client.tasks.ListTasks(
        tasks_pb2.ListTasksRequest(organization_id=stack.organization_id, filter=chosen)
    )
    other = await stack.create_task(task.repository_id, "say other", hold_prompt=True)
    await stack.until(other.id, activity=tasks_pb2.TASK_ACTIVITY_IDLE)
    kinds = [ENTITY_KIND_TASK]

    missed = await opening(watch(stack.client, stack.organization_id, listed.resume_token, kinds=kinds, tasks=chosen))
    elsewhere = await opening(watch(stack.client, stack.organization_id, listed.resume_token, kinds=kinds))

    assert [one.id for one in listed.tasks] == [task.id]
    assert {change.task.id for frame in missed for change in frame.changes} == {other.id}
    assert not [frame for frame in missed if frame.header.kind == RESET]
    assert elsewhere[0].header.reset_reason == watches_pb2.RESET_REASON_REQUEST_CHANGED


async def test_a_feed_is_listed_then_watched_as_its_filter_says(stack: Stack) -> None:  # API-4, HIS-3
    task = await stack.ready_task()
    chosen = HistoryFilter(repository_ids=[task.repository_id], kinds=[EVENT_KIND_MESSAGE_SENT])
    listed = await stack.client.history.ListHistoryEvents(
        history_pb2.ListHistoryEventsRequest(organization_id=stack.organization_id, filter=chosen)
    )
    await stack.send(task, "say hello")
    await stack.until(task.id, activity=tasks_pb2.TASK_ACTIVITY_IDLE, turn=1)

    request = history_pb2.WatchHistoryRequest(
        organization_id=stack.organization_id, filter=chosen, resume_token=listed.resume_token
    )
    seen: list[HistoryEvent] = []
    async for frame in cast("Any", stack.client.history.WatchHistory(request)):
        seen += [change.history_event for change in frame.changes]
        if seen:
            break

    assert not listed.events
    assert [(event.kind, event.task_id) for event in seen] == [(EVENT_KIND_MESSAGE_SENT, task.id)]
