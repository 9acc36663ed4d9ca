"""How much of a repository is reported: a state must fit through every edge above. Pure."""

from collections.abc import Sequence
from typing import TypeVar

from branchline.v1.repositories_pb2 import Branch, PullRequest
from branchline_internal.github_data.v1.github_data_pb2 import GithubRepository

REPORT_BYTES = 512 * 1024
"""Most that branches and pull requests take; well below the 1 MiB at which batches, frames and pages end."""

_OVERHEAD_BYTES = 8

M = TypeVar("M", Branch, PullRequest)


def bounded(reported: GithubRepository) -> tuple[GithubRepository, int]:
    """Return a report that is small enough, and how many branches and pull requests it leaves out.

    Kept are the pull requests, up to half of it; then the default branch, the pull requests' branches, and the
    others in GitHub's order.
    """
    pulls = _first(reported.pull_requests, REPORT_BYTES // 2)
    needed = {reported.default_branch, *(pull.head_branch for pull in pulls)}
    ordered = sorted(reported.branches, key=lambda branch: branch.name not in needed)
    kept = _first(ordered, REPORT_BYTES - sum(map(_size, pulls)))
    left_out = len(reported.pull_requests) - len(pulls) + len(reported.branches) - len(kept)
    if not left_out:
        return reported, 0
    names = {branch.name for branch in kept}
    cut = GithubRepository()
    cut.CopyFrom(reported)
    del cut.branches[:], cut.pull_requests[:]
    cut.branches.extend(branch for branch in reported.branches if branch.name in names)
    cut.pull_requests.extend(pulls)
    return cut, left_out


def _first(messages: Sequence[M], most_bytes: int) -> Sequence[M]:
    size = 0
    for place, message in enumerate(messages):
        size += _size(message)
        if size > most_bytes:
            return messages[:place]
    return messages


def _size(message: Branch | PullRequest) -> int:
    return message.ByteSize() + _OVERHEAD_BYTES
