"""A repository's branches with what hangs on them. Pure."""

from collections.abc import Iterable, Mapping, Sequence

from branchline.v1.repositories_pb2 import Branch, PullRequest, Repository

Place = tuple[int, int, str]
"""What branches are sorted by: others than the default branch, then those without a task, then the name."""


def overview(
    repository: Repository,
    branches: Iterable[Branch],
    pull_requests: Iterable[PullRequest],
    holders: Mapping[str, str],
) -> Sequence[Branch]:
    """Put branches, tasks and pull requests together.

    `holders` gives the live task of each branch. The default branch comes first, then branches with tasks, then
    the others, each by name. A task's branch that GitHub has not reported yet is there all the same.
    """
    by_name = {branch.name: branch for branch in branches}
    for name in holders:
        by_name.setdefault(name, Branch(repository_id=repository.id, name=name))
    pulls = {pull.head_branch: pull for pull in pull_requests}
    for name, branch in by_name.items():
        branch.is_default = name == repository.default_branch
        branch.task_id = holders.get(name, "")
        if name in pulls:
            branch.pull_request.CopyFrom(pulls[name])
    return sorted(by_name.values(), key=place)


def place(branch: Branch) -> Place:
    """Return where a branch stands among others."""
    return (int(not branch.is_default), int(not branch.task_id), branch.name)
