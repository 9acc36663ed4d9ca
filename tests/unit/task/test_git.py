"""The checkout script, run by a real shell on real repositories. TSK-2."""

import os
import subprocess
from pathlib import Path

import pytest
from branchline.v1.repositories_pb2 import Repository
from branchline.v1.tasks_pb2 import Task

from services.task.git import CHECKOUT, checkout_environment, credentials_line
from tests.support.stack import git, make_remote


def check_out(
    home: Path, remote: Path, branch: str, base: str = "", *, derived: bool = False
) -> subprocess.CompletedProcess[str]:
    repository = Repository(remote_url=f"file://{remote}", default_branch=base)
    task = Task(id="task_0123456789abcdef", branch=branch)
    environment = checkout_environment(task, repository, "Ann", "ann@example.com", derived=derived)
    return subprocess.run(
        ["sh", "-c", CHECKOUT],
        env={**os.environ, "HOME": str(home), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def test_a_new_branch_begins_at_the_default_branch(home: Path, tmp_path: Path) -> None:
    remote = make_remote(tmp_path)

    result = check_out(home, remote, "feat/x")

    assert result.stdout == "feat/x\n"
    assert git("branch", "--show-current", cwd=home / "workspace") == "feat/x"
    assert git("rev-parse", "HEAD", cwd=home / "workspace") == git("rev-parse", "main", cwd=remote)


def test_doing_it_again_keeps_the_work(home: Path, tmp_path: Path) -> None:
    remote = make_remote(tmp_path)
    check_out(home, remote, "feat/x")
    (home / "workspace" / "new.txt").write_text("kept")

    again = check_out(home, remote, "feat/x")

    assert again.returncode == 0
    assert (home / "workspace" / "new.txt").read_text() == "kept"


def test_a_clone_that_was_cut_off_is_begun_again(home: Path, tmp_path: Path) -> None:
    remote = make_remote(tmp_path)
    (home / "workspace.part" / ".git").mkdir(parents=True)

    assert check_out(home, remote, "feat/x").returncode == 0


def test_a_base_that_is_not_there_is_named(home: Path, tmp_path: Path) -> None:
    result = check_out(home, make_remote(tmp_path), "feat/x", base="develop")

    assert result.returncode == 1
    assert "no branch develop" in result.stderr


def test_a_derived_branch_that_the_remote_has_gets_a_suffix(home: Path, tmp_path: Path) -> None:  # F12
    remote = make_remote(tmp_path)
    git("branch", "feat/x", "main", cwd=remote)

    first = check_out(home, remote, "feat/x", derived=True)
    again = check_out(home, remote, "feat/x", derived=True)

    assert (first.stdout, again.stdout) == ("feat/x-abcdef\n", "feat/x-abcdef\n")
    assert git("branch", "--show-current", cwd=home / "workspace") == "feat/x-abcdef"
    assert git("for-each-ref", "--format=%(upstream)", "refs/heads/feat", cwd=home / "workspace") == ""


def test_a_derived_branch_is_new_where_the_remote_has_none_and_kept_once_it_is_pushed(
    home: Path, tmp_path: Path
) -> None:  # F12
    remote = make_remote(tmp_path)

    first = check_out(home, remote, "feat/x", derived=True)
    git("push", "--quiet", "origin", "feat/x", cwd=home / "workspace")
    again = check_out(home, remote, "feat/x", derived=True)

    assert (first.stdout, again.stdout) == ("feat/x\n", "feat/x\n")


def test_a_derived_branch_that_is_the_remotes_default_gets_a_suffix(home: Path, tmp_path: Path) -> None:  # F12
    remote = make_remote(tmp_path)

    assert check_out(home, remote, "main", derived=True).stdout == "main-abcdef\n"


def test_an_explicit_branch_is_continued(home: Path, tmp_path: Path) -> None:  # REP-2
    remote = make_remote(tmp_path)
    git("branch", "topic", "main", cwd=remote)

    assert check_out(home, remote, "topic").stdout == "topic\n"
    assert git("rev-parse", "--abbrev-ref", "@{upstream}", cwd=home / "workspace") == "origin/topic"


def test_an_empty_repository_is_begun(home: Path, tmp_path: Path) -> None:  # TSK-2
    remote = tmp_path / "empty.git"
    git("init", "--quiet", "--bare", "--initial-branch=main", str(remote))

    assert check_out(home, remote, "start", derived=True).stdout == "start\n"


def test_credentials_are_quoted() -> None:
    line = credentials_line("https://host/x.git", "host", "a@b", "p:/ w")

    assert line == b"https://a%40b:p%3A%2F%20w@host\n"
