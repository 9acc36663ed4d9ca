"""The overview of branches. REP-6."""

from branchline.v1.repositories_pb2 import Branch, PullRequest, Repository

from services.repository.overview import overview


def test_the_default_branch_comes_first_then_tasks_then_names() -> None:
    repository = Repository(id="repo_1", default_branch="main")
    branches = [Branch(name=name) for name in ("b", "main", "a", "work")]

    lines = overview(
        repository, branches, [PullRequest(number=7, head_branch="b")], {"work": "task_1", "new": "task_2"}
    )

    assert [line.name for line in lines] == ["main", "new", "work", "a", "b"]
    assert lines[2].task_id == "task_1"
    assert lines[4].pull_request.number == 7
