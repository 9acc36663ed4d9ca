"""Titles and branch names. REP-3."""

import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.repository.naming import (
    BRANCH_LENGTH,
    TITLE_LENGTH,
    derive_branch,
    derive_title,
    unique_branch,
)
from services.runtime.branches import check_branch
from services.runtime.errors import InvalidArgument


@pytest.mark.parametrize(
    ("title", "branch"),
    [
        ("Add a shop window", "feat/add-a-shop-window"),
        ("Fix the login loop", "fix/fix-the-login-loop"),
        ("Update the README", "docs/update-the-readme"),
        ("Rename the module", "refactor/rename-the-module"),
        ("Ünïcode – naïve", "feat/unicode-naive"),
        ("日本語", "feat/task"),
    ],
)
def test_a_branch_says_what_the_title_says(title: str, branch: str) -> None:
    assert derive_branch(title) == branch


def test_a_long_title_is_cut_at_a_word() -> None:
    title = derive_title("word " * 40)

    assert len(title) <= TITLE_LENGTH
    assert title.endswith("word…")


@given(st.text(min_size=1, max_size=200))
def test_derived_names_are_within_limits_and_git_takes_them(text: str) -> None:
    title = derive_title(text)
    branch = derive_branch(title)

    assert 0 < len(title) <= TITLE_LENGTH
    assert len(branch) <= BRANCH_LENGTH
    check_branch(branch)


@given(st.sets(st.integers(2, 30)))
def test_a_unique_name_is_free_and_short(numbers: set[int]) -> None:
    wanted = "feat/" + "x" * (BRANCH_LENGTH - 5)
    taken = {wanted} | {wanted[: BRANCH_LENGTH - len(f"-{number}")] + f"-{number}" for number in numbers}

    name = unique_branch(wanted, taken)

    assert name not in taken
    assert len(name) <= BRANCH_LENGTH


@settings(deadline=None)
@given(st.text(alphabet="ab./-~^: @{\\*[?_\x7f", min_size=1, max_size=8))
def test_we_refuse_every_name_that_git_refuses(name: str) -> None:
    git = subprocess.run(["git", "check-ref-format", "--branch", name], capture_output=True, check=False)
    try:
        check_branch(name)
    except InvalidArgument:
        return
    assert git.returncode == 0


@pytest.mark.parametrize(
    ("taken", "name"),
    [
        ({"feat"}, "feat-window"),
        ({"feat/window/left"}, "feat/window-2"),
        ({"feat/window", "feat/window-2/x"}, "feat/window-3"),
        ({"feat", "feat-window"}, "feat-window-2"),
    ],
)
def test_a_derived_name_is_nobodys_folder_and_has_none_above(taken: set[str], name: str) -> None:
    assert unique_branch("feat/window", taken) == name


@pytest.mark.parametrize("name", ["x" * 201, "ä" * 101, "ok/" + "y" * 198])
def test_a_name_that_is_too_long_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgument, match="at most 200 bytes"):
        check_branch(name)


def test_a_name_may_have_200_bytes() -> None:
    check_branch("x" * 200)
