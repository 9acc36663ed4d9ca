"""How much of a repository is reported. F22."""

from branchline.v1.repositories_pb2 import Branch, PullRequest
from branchline_internal.github_data.v1.github_data_pb2 import GithubRepository

from services.github_data.bounds import REPORT_BYTES, bounded


def branch(name: str) -> Branch:
    return Branch(name=name, head_commit="a" * 40)


def test_a_small_repository_is_reported_whole() -> None:
    whole = GithubRepository(branches=[branch("main")], pull_requests=[PullRequest(number=1, head_branch="x")])

    assert bounded(whole) == (whole, 0)


def test_a_large_one_keeps_what_matters_and_says_how_much_is_left_out() -> None:
    names = [f"b{number:06}" for number in range(20_000)]
    pulls = [PullRequest(number=n, head_branch=names[-n], title="t" * 100) for n in range(1, 4000)]
    large = GithubRepository(
        full_name="acme/shop",
        default_branch=names[15_000],
        branches=map(branch, names),
        pull_requests=pulls,
    )

    cut, left_out = bounded(large)

    assert cut.ByteSize() <= REPORT_BYTES + 1000
    assert cut.ByteSize() > REPORT_BYTES * 0.9
    kept = {one.name for one in cut.branches}
    assert names[15_000] in kept
    assert {pull.head_branch for pull in cut.pull_requests} <= kept
    assert len(kept) + len(cut.pull_requests) + left_out == len(names) + len(pulls)
    assert [one.name for one in cut.branches] == sorted(kept)
