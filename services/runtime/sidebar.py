"""What a task is chosen by, for lists of a database and for watches of a replica alike. Pure."""

from branchline.v1.tasks_pb2 import TaskSummary


def search_text(task: TaskSummary) -> str:
    """Return what TaskFilter.query is looked for in: the title and the branch, each whole, in no case."""
    return folded(f"{task.title}\n{task.branch}")


def folded(text: str) -> str:
    """Return a text in no case. Databases do not agree on letters beyond ASCII, so none of them is asked."""
    return text.casefold()


def has_pull_request(task: TaskSummary) -> bool:
    """Say what TaskFilter.has_pull_request means: a summary names an open pull request alone."""
    return task.HasField("pull_request")
