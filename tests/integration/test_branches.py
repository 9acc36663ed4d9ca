"""Which branch a task gets: made, continued or derived, as the remote has it, whatever we know of the remote."""

import pytest
from branchline.v1 import tasks_pb2
from branchline.v1.common_pb2 import FAILURE_REASON_BRANCH_CONFLICT
from branchline.v1.tasks_pb2 import BranchChoice

from tests.support.processes import execute
from tests.support.stack import Stack, failure, git, make_remote

FAILED, IDLE = tasks_pb2.TASK_STATE_FAILED, tasks_pb2.TASK_ACTIVITY_IDLE


async def test_a_derived_branch_that_the_remote_has_gets_a_number_and_all_see_it(stack: Stack) -> None:  # REP-3
    remote = make_remote(stack.remotes)
    git("branch", "fix/fix-the-login-loop", "main", cwd=remote)
    made = await stack.create_task(await stack.add_repository(remote), "Fix the login loop", hold_prompt=True)

    ready = await stack.until(made.id, activity=IDLE)

    head = await execute(stack.client, made.id, "git", "symbolic-ref", "--short", "HEAD")
    assert made.branch == "fix/fix-the-login-loop"
    assert ready.branch == head.stdout.strip() == "fix/fix-the-login-loop-2"


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (BranchChoice(new_branch="topic"), "the remote has a branch topic already"),
        (BranchChoice(new_branch="topic/below"), "the remote has a branch topic"),
        (BranchChoice(existing_branch="missing"), "the remote has no branch missing"),
        (BranchChoice(new_branch="mine", base="missing"), "the remote has no branch missing to start from"),
    ],
    ids=["taken", "below another", "missing", "no base"],
)
async def test_a_branch_that_is_not_as_it_should_be_fails_the_task_and_says_so(
    stack: Stack, choice: BranchChoice, words: str
) -> None:  # REP-3
    remote = make_remote(stack.remotes)
    git("branch", "topic", "main", cwd=remote)
    task = await stack.create_task(await stack.add_repository(remote), branch=choice)

    failed = await stack.until(task.id, state=FAILED)

    assert failed.failure.reason == FAILURE_REASON_BRANCH_CONFLICT
    assert words in failed.failure.message
    assert str(stack.remotes) not in str(failed.failure)
    assert git("branch", "--list", "mine", "topic/below", "missing", cwd=remote) == ""


async def test_a_branch_is_made_from_the_base_that_is_asked_for(stack: Stack) -> None:  # REP-2
    remote = make_remote(stack.remotes)
    git("branch", "develop", "main", cwd=remote)
    work = stack.remotes / f"{remote.stem}-work"
    git("clone", "--quiet", "--branch=develop", str(remote), str(work))
    git("-c", "user.name=T", "-c", "user.email=t@localhost", "commit", "--quiet", "--allow-empty", "-m", "D", cwd=work)
    git("push", "--quiet", cwd=work)

    choice = BranchChoice(new_branch="mine", base="develop")
    task = await stack.ready_task(await stack.add_repository(remote), branch=choice)

    tip = await execute(stack.client, task.id, "git", "rev-parse", "HEAD")
    assert task.branch == "mine"
    assert tip.stdout.strip() == git("rev-parse", "develop", cwd=remote) != git("rev-parse", "main", cwd=remote)


async def test_a_task_that_is_only_asked_about_is_checked_and_takes_nothing(stack: Stack) -> None:  # TSK-2
    repository_id = await stack.add_repository()
    choice = BranchChoice(new_branch="mine")

    asked = await stack.create_task(repository_id, "Fix it", branch=choice, validate_only=True)
    made = await stack.create_task(repository_id, "Fix it", branch=choice, hold_prompt=True)
    taken = await failure(stack.create_task(repository_id, branch=choice, validate_only=True))
    listed = await stack.client.tasks.ListTasks(
        tasks_pb2.ListTasksRequest(
            organization_id=stack.organization_id, filter=tasks_pb2.TaskFilter(repository_ids=[repository_id])
        )
    )

    assert (asked.id, asked.title, asked.branch) == ("", "Fix it", "mine")
    assert taken.reason == "BRANCH_TAKEN"
    assert [task.id for task in listed.tasks] == [made.id]


@pytest.mark.parametrize(
    ("choice", "field"),
    [
        (BranchChoice(new_branch="a..b"), "branch.new_branch"),
        (BranchChoice(new_branch="-x"), "branch.new_branch"),
        (BranchChoice(existing_branch="a b"), "branch.existing_branch"),
        (BranchChoice(new_branch="mine", base="a..b"), "branch.base"),
    ],
)
async def test_a_name_that_git_refuses_is_refused_by_its_field(stack: Stack, choice: BranchChoice, field: str) -> None:
    refused = await failure(stack.create_task(await stack.add_repository(), branch=choice))

    assert (refused.reason, refused.fields) == ("BRANCH_NAME_INVALID", [field])
