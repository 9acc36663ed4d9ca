"""Folders that sandboxes may change are open to their group, also what others make in them later. SBX-2."""

import os
import subprocess
from pathlib import Path

import pytest

from services.sandbox.providers.sharing import share

USER, GROUP = 40_001, 40_000
STRANGER = 50_000

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root runs as others")


def attempt(command: str, user: int = USER, group: int = GROUP) -> bool:
    """Say whether a user can do something."""
    run = ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", "sh", "-c", command]
    return subprocess.run(run, check=False, capture_output=True).returncode == 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for above in (tmp_path, *tmp_path.parents):
        if above.stat().st_uid == os.geteuid() and above != Path("/"):
            above.chmod(above.stat().st_mode | 0o011)
    made = tmp_path / "shared"
    (made / "old").mkdir(parents=True)
    (made / "old" / "file").write_text("words\n")
    (made / "old" / "sealed").write_text("sealed\n")
    (made / "old" / "sealed").chmod(0o444)
    (made / "link").symlink_to("/etc/hostname")
    return made


@as_root
def test_the_group_may_change_what_is_there_and_what_is_made_later_and_strangers_may_not(folder: Path) -> None:
    assert not attempt(f"echo more >> {folder}/old/file")

    share((folder,), GROUP)
    (folder / "old" / "new").mkdir()
    (folder / "old" / "new" / "later").write_text("later\n")

    assert attempt(f"echo more >> {folder}/old/file && echo more >> {folder}/old/new/later && mkdir {folder}/mine")
    assert not attempt(f"echo more >> {folder}/old/sealed")
    assert attempt(f"cat {folder}/old/sealed")
    assert not attempt(f"echo more >> {folder}/old/file", STRANGER, STRANGER)
    assert (folder / "old" / "file").stat().st_uid == os.geteuid()


@as_root
def test_what_one_sandbox_makes_another_may_change(folder: Path) -> None:
    share((folder,), GROUP)

    assert attempt(f"mkdir -p {folder}/a/b && echo one > {folder}/a/b/c")
    assert attempt(f"echo two >> {folder}/a/b/c && touch {folder}/a/b/d", USER + 1)


@as_root
def test_a_repository_that_knows_nothing_of_sharing_takes_pushes_of_several_users(folder: Path, tmp_path: Path) -> None:
    remote = folder / "remote.git"
    subprocess.run(["git", "init", "--quiet", "--bare", "--initial-branch=main", str(remote)], check=True)
    share((folder,), GROUP)
    for user in (USER, USER + 1, USER):
        work = tmp_path / f"work-{user}-{len(list(tmp_path.iterdir()))}"
        work.mkdir(mode=0o777)
        work.chmod(0o777)
        name = f"branch-{work.name}"
        pushed = attempt(
            f"cd {work} && export HOME={work} && git config --global safe.directory '*' && git init --quiet . "
            f"&& date > {name} && git add . && git -c user.name=T -c user.email=t@localhost commit --quiet -m First "
            f"&& git push --quiet file://{remote} HEAD:refs/heads/{name}",
            user,
        )
        assert pushed


@as_root
@pytest.mark.parametrize("when", ["before", "later"])
def test_of_a_repository_only_what_a_push_changes_is_opened(folder: Path, when: str) -> None:
    remote = folder / "group" / "remote.git"
    if when == "later":
        share((folder,), GROUP)
    subprocess.run(["git", "init", "--quiet", "--bare", str(remote)], check=True)
    share((folder,), GROUP)
    inside = [path for path in remote.rglob("*") if not {"objects", "refs"} & {*path.relative_to(remote).parts}]

    assert {remote / "hooks", remote / "config"} < {*inside}
    for path in (remote, *inside):
        assert not attempt(f"test -w {path}"), path
        assert attempt(f"test -r {path}"), path
    assert not attempt(f"mv {remote} {remote}.away")
    for path in (remote / "objects", remote / "refs" / "heads"):
        assert attempt(f"touch {path}/x")


def test_a_folder_that_is_not_there_is_left_alone(tmp_path: Path) -> None:
    share((tmp_path / "missing",), GROUP)
