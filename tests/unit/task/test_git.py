"""The checkout script, run by a real shell on real repositories. TSK-2."""

import os
import subprocess
from pathlib import Path

import pytest
from branchline.v1 import common_pb2
from branchline.v1.repositories_pb2 import Repository
from branchline.v1.tasks_pb2 import BranchChoice, DerivedBranch, Task
from branchline_internal.sandbox.v1.sandbox_pb2 import ExecuteResponse

from services.task.git import (
    CHECKOUT,
    CONFLICT,
    DERIVED,
    EXISTING,
    NEW,
    OWN,
    checkout_environment,
    checkout_failure,
    choice_of,
    credentials_line,
)
from services.task.open_task import TaskRow
from tests.support.stack import git, make_remote


def row(remote_url: str, branch: str, choice: str, base: str = "", default_branch: str = "") -> TaskRow:
    return TaskRow(
        task=Task(id="task_0123456789abcdef", branch=branch),
        repository=Repository(remote_url=remote_url, default_branch=default_branch),
        git_name="Ann",
        git_email="ann@example.com",
        hold_prompt=False,
        branch_choice=choice,
        branch_base=base,
        provisioned=False,
        attempt=1,
        workflow="",
        workflow_time=0.0,
    )


def check_out(
    home: Path, remote: Path, branch: str, choice: str = OWN, *, base: str = "", default_branch: str = ""
) -> ExecuteResponse:
    environment = checkout_environment(row(f"file://{remote}", branch, choice, base, default_branch))
    ran = subprocess.run(
        ["sh", "-c", CHECKOUT],
        env={**os.environ, "HOME": str(home), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return ExecuteResponse(exit_code=ran.returncode, stdout=ran.stdout, stderr=ran.stderr)


def remote_with(folder: Path, *branches: str) -> Path:
    remote = make_remote(folder)
    for branch in branches:
        git("branch", branch, "main", cwd=remote)
    return remote


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.mark.parametrize("choice", [DERIVED, NEW, OWN])
def test_a_branch_that_is_made_begins_at_the_default_branch(home: Path, tmp_path: Path, choice: str) -> None:
    remote = make_remote(tmp_path)

    result = check_out(home, remote, "feat/x", choice)

    assert result.stdout == "feat/x\n"
    assert git("branch", "--show-current", cwd=home / "workspace") == "feat/x"
    assert git("rev-parse", "HEAD", cwd=home / "workspace") == git("rev-parse", "main", cwd=remote)
    assert git("for-each-ref", "--format=%(upstream)", "refs/heads/feat", cwd=home / "workspace") == ""


@pytest.mark.parametrize("choice", [DERIVED, NEW])
def test_a_branch_that_is_made_begins_at_the_base_that_was_asked_for(home: Path, tmp_path: Path, choice: str) -> None:
    remote = remote_with(tmp_path, "develop")
    other = tmp_path / "other"
    git("clone", "--quiet", "--branch", "develop", str(remote), str(other))
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--allow-empty", "-m", "on", cwd=other)
    git("push", "--quiet", "origin", "develop", cwd=other)

    check_out(home, remote, "feat/x", choice, base="develop", default_branch="main")

    assert git("rev-parse", "HEAD", cwd=home / "workspace") == git("rev-parse", "develop", cwd=remote)


@pytest.mark.parametrize("choice", [DERIVED, NEW, EXISTING])
def test_doing_it_again_keeps_the_work_and_the_branch(home: Path, tmp_path: Path, choice: str) -> None:
    remote = remote_with(tmp_path, "topic")
    branch = "topic" if choice == EXISTING else "feat/x"
    first = check_out(home, remote, branch, choice)
    (home / "workspace" / "new.txt").write_text("kept")
    git("push", "--quiet", "origin", branch, cwd=home / "workspace")

    again = check_out(home, remote, branch, choice)

    assert (again.exit_code, again.stdout) == (0, first.stdout)
    assert (home / "workspace" / "new.txt").read_text() == "kept"


def test_a_clone_that_was_cut_off_is_begun_again(home: Path, tmp_path: Path) -> None:
    remote = make_remote(tmp_path)
    (home / "workspace.part" / ".git").mkdir(parents=True)

    assert check_out(home, remote, "feat/x").exit_code == 0


def test_a_base_that_is_not_there_is_named(home: Path, tmp_path: Path) -> None:
    result = check_out(home, make_remote(tmp_path), "feat/x", NEW, base="develop")

    assert result.exit_code == CONFLICT
    assert "no branch develop" in result.stderr


@pytest.mark.parametrize(
    ("there", "wanted", "gets"),
    [
        (["feat/x"], "feat/x", "feat/x-2"),  # F12
        (["feat/x", "feat/x-2"], "feat/x", "feat/x-3"),
        (["feat/x/y"], "feat/x", "feat/x-2"),
        (["feat"], "feat/x", "feat-x"),
        (["feat", "feat-x"], "feat/x", "feat-x-2"),
        ([], "main", "main-2"),  # F12
    ],
)
def test_a_derived_branch_that_the_remote_has_gets_a_number(
    home: Path, tmp_path: Path, there: list[str], wanted: str, gets: str
) -> None:
    remote = remote_with(tmp_path, *there)

    first = check_out(home, remote, wanted, DERIVED)
    again = check_out(home, remote, wanted, DERIVED)

    assert (first.stdout, again.stdout) == (f"{gets}\n", f"{gets}\n")
    assert git("branch", "--show-current", cwd=home / "workspace") == gets
    git("push", "--quiet", "origin", gets, cwd=home / "workspace")


@pytest.mark.parametrize(
    ("there", "wanted", "words"),
    [
        (["topic"], "topic", "has a branch topic already"),
        ([], "main", "has a branch main already"),
        (["feat"], "feat/x", "has a branch feat, so there can be no feat/x"),
        (["feat/x"], "feat", "has branches below feat/"),
    ],
)
def test_a_new_branch_that_the_remote_cannot_take_is_a_conflict_however_often(
    home: Path, tmp_path: Path, there: list[str], wanted: str, words: str
) -> None:
    remote = remote_with(tmp_path, *there)

    for _ in range(2):
        result = check_out(home, remote, wanted, NEW)
        failure = checkout_failure(result, 600)

        assert failure is not None
        assert (failure.reason, failure.retryable) == (common_pb2.FAILURE_REASON_BRANCH_CONFLICT, False)
        assert words in failure.message


def test_an_existing_branch_is_continued(home: Path, tmp_path: Path) -> None:  # REP-2
    remote = remote_with(tmp_path, "topic")

    assert check_out(home, remote, "topic", EXISTING).stdout == "topic\n"
    assert git("rev-parse", "--abbrev-ref", "@{upstream}", cwd=home / "workspace") == "origin/topic"


def test_the_default_branch_is_continued_too(home: Path, tmp_path: Path) -> None:
    assert check_out(home, make_remote(tmp_path), "main", EXISTING).stdout == "main\n"


def test_an_existing_branch_that_the_remote_lacks_is_a_conflict(home: Path, tmp_path: Path) -> None:
    failure = checkout_failure(check_out(home, make_remote(tmp_path), "topic", EXISTING), 600)

    assert failure is not None
    assert failure.reason == common_pb2.FAILURE_REASON_BRANCH_CONFLICT
    assert failure.message.endswith("the remote has no branch topic")


def test_a_branch_that_is_the_tasks_own_is_made_again_where_it_is_lost(home: Path, tmp_path: Path) -> None:
    assert check_out(home, make_remote(tmp_path), "feat/x", OWN).stdout == "feat/x\n"


@pytest.mark.parametrize("choice", [DERIVED, NEW])
def test_an_empty_repository_is_begun(home: Path, tmp_path: Path, choice: str) -> None:  # TSK-2
    remote = tmp_path / "empty.git"
    git("init", "--quiet", "--bare", "--initial-branch=main", str(remote))

    assert check_out(home, remote, "start", choice).stdout == "start\n"


def test_a_remote_that_is_not_there_is_a_clone_that_failed(home: Path, tmp_path: Path) -> None:
    failure = checkout_failure(check_out(home, tmp_path / "none.git", "x", NEW), 600)

    assert failure is not None
    assert (failure.reason, failure.retryable) == (common_pb2.FAILURE_REASON_CLONE_FAILED, True)
    assert "none.git" in failure.output_tail


@pytest.mark.parametrize(
    "words",
    [
        "fatal: Authentication failed for 'https://host/x.git/'",
        "fatal: could not read Username for 'https://host': terminal prompts disabled",
        "fatal: unable to access 'https://host/x.git/': The requested URL returned error: 403",
        "git@host: Permission denied (publickey).",
    ],
)
def test_credentials_that_are_refused_are_told_as_such(words: str) -> None:
    failure = checkout_failure(ExecuteResponse(exit_code=128, stderr=f"hint\n{words}\n"), 600)

    assert failure is not None
    assert (failure.reason, failure.retryable) == (common_pb2.FAILURE_REASON_GIT_CREDENTIALS_REFUSED, False)
    assert failure.message.endswith(words)


def test_a_checkout_that_takes_too_long_says_so(home: Path) -> None:
    failure = checkout_failure(ExecuteResponse(exit_code=-1, timed_out=True, stdout="at 3 %"), 600)

    assert failure is not None
    assert (failure.reason, failure.output_tail) == (common_pb2.FAILURE_REASON_TIMED_OUT, "at 3 %")
    assert "600 s" in failure.message


def test_a_choice_of_a_branch_is_kept_as_a_word() -> None:
    choices = [
        BranchChoice(),
        BranchChoice(derived=DerivedBranch()),
        BranchChoice(new_branch="x"),
        BranchChoice(existing_branch="x"),
        BranchChoice(pull_request_number=7),
    ]

    assert [choice_of(one) for one in choices] == [DERIVED, DERIVED, NEW, EXISTING, EXISTING]


def test_credentials_are_quoted() -> None:
    line = credentials_line("https://host/x.git", "host", "a@b", "p:/ w")

    assert line == b"https://a%40b:p%3A%2F%20w@host\n"
