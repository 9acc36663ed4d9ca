"""What tasks push: it is followed whatever it is, with a number of statements that does not grow with the batch."""

from datetime import timedelta

import pytest
from branchline.v1 import history_pb2, tasks_pb2
from branchline.v1.common_pb2 import FAILURE_REASON_CLONE_FAILED, Failure
from branchline.v1.history_pb2 import HistoryEvent
from branchline.v1.repositories_pb2 import Repository
from branchline.v1.sandboxes_pb2 import Sandbox
from branchline.v1.sessions_pb2 import Session
from branchline.v1.tasks_pb2 import Task, TaskSummary
from branchline.v1.transcripts_pb2 import TranscriptEntry
from branchline_internal.spine.v1.push_pb2 import PushRequest

from services.repository.ingest import RepositoryIngest
from services.repository.store import RepositoryStore
from services.runtime.errors import AlreadyExists
from tests.unit.repository.conftest import PRINCIPAL, Room, entry, newer


async def states(room: Room, count: int) -> list[Task]:
    return [await room.create(branch=f"branch-{room.clock.new_id('b')}") for _ in range(count)]


async def test_a_batch_of_any_length_takes_the_same_number_of_statements(room: Room) -> None:
    await room.add_repository()
    few, many = await states(room, 2), await states(room, 40)

    def pushed_by(tasks: list[Task], revision: int) -> list[object]:
        pushed: list[object] = []
        for task in tasks:
            pushed.append(newer(task, state=tasks_pb2.TASK_STATE_ARCHIVED))
            pushed.append(Session(id=f"ses_{task.id}", task_id=task.id, revision=revision))
            pushed.append(Sandbox(id=f"sbx_{task.id}", task_id=task.id, revision=revision))
            pushed.append(HistoryEvent(id=f"evt_{task.id}", organization_id="org_1"))
            pushed += [
                TranscriptEntry(id=f"e{n}_{task.id}", task_id=task.id, session_id="s", position=n, revision=revision)
                for n in range(3)
            ]
        return pushed

    taken_by_few = await room.statements_of(lambda: room.push(*pushed_by(few, 1)))
    taken_by_many = await room.statements_of(lambda: room.push(*pushed_by(many, 1)))

    assert taken_by_many == taken_by_few
    assert (await room.place(many[-1].id)).live is False


async def test_a_turn_that_begins_takes_six_statements(room: Room) -> None:  # C5
    await room.add_repository()
    task = await room.create(branch="topic")
    await room.push(newer(task, state=tasks_pb2.TASK_STATE_ACTIVE, activity=tasks_pb2.TASK_ACTIVITY_IDLE))

    def turn() -> list[object]:
        return [
            newer(task, revision=3, state=tasks_pb2.TASK_STATE_ACTIVE, activity=tasks_pb2.TASK_ACTIVITY_RUNNING),
            Session(id="ses_1", task_id=task.id, revision=3),
            TranscriptEntry(id="ent_1", task_id=task.id, session_id="ses_1", position=1, revision=1),
            HistoryEvent(id="evt_1", organization_id="org_1"),
        ]

    # The places, the sequence, task, session, entry, the outbox. No branch moves, so no repository is locked.
    assert await room.statements_of(lambda: room.push(*turn())) == 6
    place = await room.place(task.id)
    assert (place.branch, place.live, place.gone) == ("topic", True, False)


async def test_parts_that_come_with_the_end_of_their_task_are_ignored(room: Room) -> None:
    await room.add_repository()
    task = await room.create(branch="topic")

    gone = entry(newer(task), deleted=True)
    part = entry(Session(id="ses_late", task_id=task.id, revision=1))
    assert await room.ingest.submit(PushRequest(entries=[part, gone])) == {}

    held = await room.database.read(room.workbench.sessions, task.id, "", 100)
    assert "ses_late" not in [one.id for one in held.found]


async def test_an_archived_task_that_is_killed_never_takes_its_branch_back(room: Room) -> None:  # F9, F23
    await room.add_repository()
    first = await room.create(branch="topic")
    archived = newer(first, state=tasks_pb2.TASK_STATE_ARCHIVED)
    await room.push(archived)
    second = await room.create(branch="topic")

    killing = newer(archived, state=tasks_pb2.TASK_STATE_KILLING)
    refused = [await room.push(killing), await room.push(newer(killing, state=tasks_pb2.TASK_STATE_KILLED))]

    assert refused == [{}, {}]
    holders = await room.database.read(room.store.branch_holders, "repo_1")
    assert holders == {"topic": second.id}
    held = await room.database.read(room.workbench.task, first.id, PRINCIPAL)
    assert held.state == tasks_pb2.TASK_STATE_KILLED


async def test_no_state_of_an_ended_task_takes_its_branch_back(room: Room) -> None:  # F9
    await room.add_repository()
    task = newer(await room.create(branch="topic"), state=tasks_pb2.TASK_STATE_ARCHIVED)
    await room.push(task)
    holder = await room.create(branch="topic")

    for state in tasks_pb2.TaskState.values():
        task = newer(task, state=state)
        assert await room.push(task) == {}

    assert await room.database.read(room.store.branch_holders, "repo_1") == {"topic": holder.id}


async def test_a_branch_that_another_task_holds_stays_with_it_and_the_conflict_is_in_the_feed(room: Room) -> None:
    await room.add_repository()
    holder, mover = await room.create(branch="taken"), await room.create(branch="topic")
    before = len(await room.marked(HistoryEvent))

    refused = await room.push(newer(mover, branch="taken"))

    assert refused == {}
    assert await room.database.read(room.store.branch_holders, "repo_1") == {"taken": holder.id, "topic": mover.id}
    event, _ = (await room.marked(HistoryEvent))[before]
    assert event.kind == history_pb2.EVENT_KIND_BRANCH_MOVED
    assert dict(event.details) == {"from": "topic", "to": "taken", "holder_task_id": holder.id}

    await room.push(newer(holder, state=tasks_pb2.TASK_STATE_KILLED), newer(newer(mover, branch="taken")))

    assert await room.database.read(room.store.branch_holders, "repo_1") == {"taken": mover.id}


async def test_a_branch_follows_what_the_task_says(room: Room) -> None:  # F12
    await room.add_repository()
    task = await room.create(branch="topic")

    await room.push(newer(task, branch="topic-7f3a"))

    assert (await room.place(task.id)).branch == "topic-7f3a"
    summary, _ = (await room.marked(TaskSummary))[-1]
    assert summary.branch == "topic-7f3a"
    assert (await room.create(branch="topic")).branch == "topic"
    with pytest.raises(AlreadyExists):
        await room.create(branch="topic-7f3a")


async def test_one_batch_frees_a_branch_and_gives_it_away_in_any_order(room: Room) -> None:
    await room.add_repository()
    leaving, coming = await room.create(branch="a"), await room.create(branch="b")

    refused = await room.push(newer(coming, branch="a"), newer(leaving, state=tasks_pb2.TASK_STATE_ARCHIVED))

    assert refused == {}
    assert await room.database.read(room.store.branch_holders, "repo_1") == {"a": coming.id}


async def test_the_organization_gets_a_summary_and_the_index_keeps_the_whole_task(room: Room) -> None:  # C11
    await room.add_repository()
    task = await room.create(text="Sell more\n" + "x" * 60_000)

    failure = Failure(reason=FAILURE_REASON_CLONE_FAILED, message="y" * 2000, output_tail="z" * 8000)
    await room.push(newer(task, failure=failure))

    assert await room.marked(Task) == []
    ((summary, deleted),) = await room.marked(TaskSummary)
    assert not deleted
    assert summary.ByteSize() < 1024
    assert summary.failure_reason == FAILURE_REASON_CLONE_FAILED
    held = await room.database.read(room.workbench.task, task.id, PRINCIPAL)
    assert (held.prompt, held.failure) == (task.prompt, failure)


async def test_the_repository_is_touched_once_for_a_batch(room: Room) -> None:
    await room.add_repository()
    tasks = await states(room, 5)
    ((before, _),) = await room.marked(Repository)

    await room.push(*(newer(task, state=tasks_pb2.TASK_STATE_KILLED) for task in tasks))

    ((after, _),) = await room.marked(Repository)
    assert (before.live_task_count, after.live_task_count) == (5, 0)
    assert after.revision == before.revision + 1


async def test_a_task_of_somebody_else_is_refused_without_its_neighbours(room: Room) -> None:
    await room.add_repository()
    task = await room.create()

    refused = await room.push(Task(id="task_x", repository_id="repo_1", revision=1), newer(task, title="New"))

    assert list(refused) == [0]
    assert (await room.database.read(room.workbench.task, task.id, PRINCIPAL)).title == "New"


async def test_older_states_change_nothing(room: Room) -> None:
    await room.add_repository()
    task = await room.create(branch="topic")
    archived = newer(task, state=tasks_pb2.TASK_STATE_ARCHIVED)
    await room.push(archived)
    marked = len(await room.marked(TaskSummary))

    await room.push(task, archived)

    assert (await room.place(task.id)).live is False
    assert len(await room.marked(TaskSummary)) == marked


async def test_activity_is_noted_once_a_minute_whoever_asks(room: Room) -> None:
    """Also by a service that has just started: what was noted is in the database alone."""
    await room.add_repository()
    task = await room.create()
    revisions: list[int] = []
    for ahead in (0, 30, 58, 61):
        room.ahead.append(timedelta(seconds=ahead))
        works = task.activity == tasks_pb2.TASK_ACTIVITY_RUNNING
        activity = tasks_pb2.TASK_ACTIVITY_IDLE if works else tasks_pb2.TASK_ACTIVITY_RUNNING
        task = newer(task, state=tasks_pb2.TASK_STATE_ACTIVE, activity=activity)
        fresh = RepositoryIngest(
            room.outbox, room.clock, RepositoryStore(room.outbox, room.clock), room.workbench, room.deletion
        )
        room.ingest = fresh.ingest(room.database)
        await room.push(task)
        ((told, _),) = await room.marked(Repository)
        revisions.append(told.revision)

    first = revisions[0]
    assert revisions == [first, first, first, first + 1]
