"""What of a task goes on to the organization, for the sidebar. Pure."""

from branchline.v1.tasks_pb2 import Task, TaskSummary

REASON_LENGTH = 200
MOST_SESSIONS = 8


def summary_of(task: Task) -> TaskSummary:
    """Return a task without its text and its long words."""
    reason = task.status_reason
    summary = TaskSummary(
        id=task.id,
        organization_id=task.organization_id,
        repository_id=task.repository_id,
        title=task.title,
        branch=task.branch,
        status=task.status,
        status_reason=reason if len(reason) <= REASON_LENGTH else reason[: REASON_LENGTH - 1] + "…",
        stage=task.stage,
        owner_user_id=task.owner_user_id,
        sessions=task.sessions[:MOST_SESSIONS],
        active_sandbox_id=task.active_sandbox_id,
        head_commit=task.head_commit,
        revision=task.revision,
    )
    for field in ("status_time", "pull_request", "create_time", "update_time"):
        if task.HasField(field):
            getattr(summary, field).CopyFrom(getattr(task, field))
    return summary
