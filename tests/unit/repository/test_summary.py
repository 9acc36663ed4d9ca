"""What of a task goes up. C11."""

from branchline.v1 import tasks_pb2
from branchline.v1.common_pb2 import FAILURE_REASON_TIMED_OUT, Failure, Prompt
from branchline.v1.sessions_pb2 import SESSION_STATE_IDLE, SessionSummary
from branchline.v1.tasks_pb2 import Task, TaskSummary

from services.repository.summary import MOST_SESSIONS, summary_of
from services.runtime.limits import SUMMARY_BYTES, SUMMARY_SESSIONS_BYTES
from services.runtime.validation import validate


def test_a_summary_is_short_however_long_the_task_is() -> None:
    sessions = [SessionSummary(id=f"ses_{number}") for number in range(20)]
    failure = Failure(reason=FAILURE_REASON_TIMED_OUT, message="y" * 2048)

    summary = summary_of(Task(id="task_1", prompt=Prompt(text="x" * 60_000), failure=failure, sessions=sessions))

    assert summary.failure_reason == FAILURE_REASON_TIMED_OUT
    assert [one.id for one in summary.sessions] == [f"ses_{number}" for number in range(MOST_SESSIONS)]
    assert summary.session_count == 20
    assert summary.ByteSize() < 1024


def test_sessions_with_the_longest_names_do_not_make_a_summary_too_large() -> None:
    sessions = [
        SessionSummary(id="s" * 64, display_name="\N{GRINNING FACE}" * 62, agent="a" * 64, state=SESSION_STATE_IDLE)
        for _ in range(64)
    ]
    task = Task(title="\N{GRINNING FACE}" * 62, branch="b" * 200, head_commit="c" * 40, sessions=sessions)
    for name in ("id", "organization_id", "repository_id", "owner_user_id"):
        setattr(task, name, "i" * 64)

    summary = summary_of(task)

    assert 0 < len(summary.sessions) < MOST_SESSIONS
    assert TaskSummary(sessions=summary.sessions).ByteSize() <= SUMMARY_SESSIONS_BYTES
    assert summary.ByteSize() <= SUMMARY_BYTES
    validate(summary)


def test_a_summary_has_every_field_that_a_task_has_under_the_same_name() -> None:
    task = Task(
        state=tasks_pb2.TASK_STATE_ACTIVE,
        activity=tasks_pb2.TASK_ACTIVITY_WAITING,
        stage=tasks_pb2.PROVISIONING_STAGE_SANDBOX,
        pending_input_count=2,
        revision=3,
    )
    for field in Task.DESCRIPTOR.fields:
        if field.type == field.TYPE_STRING:
            setattr(task, field.name, field.name)
    task.pull_request.number = 7
    for name in ("create_time", "update_time"):
        getattr(task, name).seconds = 5

    summary = summary_of(task)

    apart = {"failure_reason", "session_count", "pull_request"}
    for field in TaskSummary.DESCRIPTOR.fields:
        if field.name not in apart:
            assert getattr(summary, field.name) == getattr(task, field.name), field.name
    assert summary.pull_request.number == 7
