"""What of a task goes on to the organization, for the sidebar. Pure."""

from collections.abc import Sequence

from branchline.v1.repositories_pb2 import PullRequestSummary
from branchline.v1.sessions_pb2 import SessionSummary
from branchline.v1.tasks_pb2 import Task, TaskSummary

from services.runtime.limits import SUMMARY_SESSIONS_BYTES
from services.runtime.spine.chunks import parts

MOST_SESSIONS = 8
_AROUND_BYTES = 3  # tag and length of one session within the summary


def summary_of(task: Task) -> TaskSummary:
    """Return a task in brief: without its prompt and its long words."""
    summary = TaskSummary(
        id=task.id,
        organization_id=task.organization_id,
        repository_id=task.repository_id,
        title=task.title,
        branch=task.branch,
        state=task.state,
        activity=task.activity,
        failure_reason=task.failure.reason,
        owner_user_id=task.owner_user_id,
        sessions=_first(task.sessions),
        session_count=len(task.sessions),
        pending_input_count=task.pending_input_count,
        create_time=task.create_time,
        update_time=task.update_time,
        stage=task.stage,
        head_commit=task.head_commit,
        revision=task.revision,
    )
    if task.HasField("pull_request"):
        pull = task.pull_request
        summary.pull_request.CopyFrom(PullRequestSummary(number=pull.number, state=pull.state, draft=pull.draft))
    return summary


def _first(sessions: Sequence[SessionSummary]) -> list[SessionSummary]:
    """Return the first sessions that fit a summary."""
    fitting = parts(sessions, lambda one: one.ByteSize() + _AROUND_BYTES, MOST_SESSIONS, SUMMARY_SESSIONS_BYTES)
    return next(fitting, list[SessionSummary]())
