"""Creation of tasks: one for each request, on a branch of its own."""

import asyncio

import grpc
import pytest
from branchline.v1 import tasks_pb2
from branchline.v1.common_pb2 import Prompt
from branchline.v1.repositories_pb2 import Branch, PullRequest, Repository
from branchline.v1.tasks_pb2 import BranchChoice, Task
from branchline.v1.tasks_pb2_grpc import TaskServiceStub
from branchline_internal.repository.v1.repository_pb2 import EnsureRepositoryRequest
from branchline_internal.task.v1.task_pb2 import CreateTaskRequest, SetPullRequestRequest

from services.repository.downward import TO_TASK
from services.runtime.errors import AlreadyExists, NotFound
from services.runtime.principal import Principal, bind_principal
from tests.unit.repository.conftest import Owner, Room, Running, eventually, running_repository

REQUEST_ID = "0b9c0a8e-2f0d-4c0a-9d2e-8c6a4c9b1f11"


def reported(revision: int, *names: str, pull_requests: list[PullRequest] | None = None) -> EnsureRepositoryRequest:
    return EnsureRepositoryRequest(
        repository=Repository(id="repo_1", organization_id="org_1", display_name="acme/shop", revision=1),
        github=True,
        branches=[Branch(name=name) for name in names],
        pull_requests=pull_requests or [],
        github_revision=revision,
    )


async def test_the_same_command_twice_at_once_makes_one_task(running: Running) -> None:  # F11, F26
    await running.add_repository()
    request = tasks_pb2.CreateTaskRequest(
        request_id=REQUEST_ID, repository_id="repo_1", prompt=Prompt(text="Add a window")
    )
    stub = running.stub(TaskServiceStub)

    answers = await asyncio.gather(*(stub.CreateTask(request) for _ in range(5)))

    assert len({answer.task.id for answer in answers}) == 1
    assert [one.task.id for one in running.owner.created] == [answers[0].task.id]


async def test_a_repeated_command_does_not_wait_for_the_child_again(url: str) -> None:
    owner = Owner()
    async with running_repository(url, owner) as running:
        await running.add_repository()
        request = tasks_pb2.CreateTaskRequest(
            request_id=REQUEST_ID, repository_id="repo_1", prompt=Prompt(text="Add a window")
        )
        stub = running.stub(TaskServiceStub)
        first = await stub.CreateTask(request)

        async with asyncio.timeout(1.0):  # the child does not answer; a creation waits two seconds for it
            again = await stub.CreateTask(request)

        assert again == first
        assert owner.created == []
        owner.ready.set()


async def test_a_request_id_is_not_taken_for_another_body(running: Running) -> None:
    await running.add_repository()
    await running.create(request_id=REQUEST_ID)

    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await running.create(request_id=REQUEST_ID, prompt=Prompt(text="Something else"))

    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_derived_name_avoids_what_tasks_and_github_have_and_the_owner_is_told(room: Room) -> None:  # F12
    await room.add_repository()
    await room.database.write(room.store.ensure, reported(1, "feat/add-a-window", "main"))

    first, second = await room.create(), await room.create()
    explicit = await room.choose(BranchChoice(existing_branch="main"))

    assert [first.branch, second.branch] == ["feat/add-a-window-2", "feat/add-a-window-3"]
    told = {one.task.id: one.branch.WhichOneof("branch") for one, _ in await room.marked(CreateTaskRequest, TO_TASK)}
    assert told == {first.id: None, second.id: None, explicit.id: "existing_branch"}


async def test_a_branch_has_one_live_task(room: Room) -> None:
    await room.add_repository()
    holder = await room.create(branch="topic")

    with pytest.raises(AlreadyExists) as refused:
        await room.create(branch="topic")

    named = {"resource_type": "task", "id": holder.id}
    assert refused.value.metadata == {"task_id": holder.id, "branch": "topic", **named}


async def test_nobody_creates_in_a_repository_of_others(room: Room) -> None:
    await room.add_repository()
    bind_principal(Principal(user_id="usr_2", organization_id="org_2", default_agent="mock"))

    with pytest.raises(NotFound):
        await room.create()


async def test_a_task_hears_of_its_branchs_pull_request_behind_its_creation(room: Room) -> None:
    await room.add_repository()
    pull = PullRequest(number=7, head_branch="topic")
    task = await room.create(branch="topic")
    await room.create(branch="other")

    await room.database.write(room.store.ensure, reported(1, "topic", pull_requests=[pull]))
    await room.database.write(room.store.ensure, reported(1, "topic"))  # no newer: ignored

    ((told, _),) = await room.marked(SetPullRequestRequest, TO_TASK)
    assert (told.task_id, told.pull_request.number) == (task.id, 7)
    born_with = await room.create(branch="topic-2")
    assert not born_with.HasField("pull_request")


async def test_replacing_the_caches_takes_the_same_number_of_statements_for_any_number_of_branches(room: Room) -> None:
    await room.add_repository()

    async def report(revision: int, count: int) -> None:
        await room.database.write(room.store.ensure, reported(revision, *(f"b{n}" for n in range(count))))

    few = await room.statements_of(lambda: report(1, 2))
    many = await room.statements_of(lambda: report(2, 500))

    assert few == many


async def test_the_child_gets_the_task_as_it_is_shown(running: Running) -> None:
    await running.add_repository()

    task = await running.create(branch=BranchChoice(new_branch="topic"))

    await eventually(lambda: bool(running.owner.created))
    (told,) = running.owner.created
    assert told.task == task
    assert isinstance(task, Task)
    assert told.branch == BranchChoice(new_branch="topic")
