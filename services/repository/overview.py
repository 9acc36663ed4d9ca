"""The overview of a repository's branches. Pure."""

from collections.abc import Iterable, Mapping

from branchline.v1.repositories_pb2 import Branch, BranchOverview, PullRequest, Repository


def overview(
    repository: Repository,
    branches: Iterable[Branch],
    pull_requests: Iterable[PullRequest],
    holders: Mapping[str, str],
) -> list[BranchOverview]:
    """Put branches, tasks and pull requests together.

    `holders` gives the live task of each branch. The default branch comes first, then branches with tasks, then
    the others, each by name. A task's branch that GitHub has not reported yet is there all the same.
    """
    by_name = {branch.name: branch for branch in branches}
    for name in holders:
        by_name.setdefault(name, Branch(repository_id=repository.id, name=name))
    pulls = {pull.head_branch: pull for pull in pull_requests}
    lines = [
        BranchOverview(
            branch=branch,
            is_default=name == repository.default_branch,
            task_id=holders.get(name, ""),
            pull_request=pulls.get(name),
        )
        for name, branch in by_name.items()
    ]
    return sorted(lines, key=lambda line: (not line.is_default, not line.task_id, line.branch.name))
