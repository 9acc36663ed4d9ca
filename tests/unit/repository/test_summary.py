"""What of a task goes up. C11."""

from branchline.v1 import tasks_pb2
from branchline.v1.sessions_pb2 import SessionSummary
from branchline.v1.tasks_pb2 import Task, TaskSummary

from services.repository.summary import MOST_SESSIONS, REASON_LENGTH, summary_of


def test_a_summary_is_short_however_long_the_task_is() -> None:
    sessions = [SessionSummary(id=f"ses_{number}") for number in range(20)]

    summary = summary_of(Task(id="task_1", text="x" * 60_000, status_reason="y" * 5000, sessions=sessions))

    assert len(summary.status_reason) == REASON_LENGTH
    assert [one.id for one in summary.sessions] == [f"ses_{number}" for number in range(MOST_SESSIONS)]
    assert summary.ByteSize() < 1024


def test_a_summary_has_every_field_that_a_task_has_under_the_same_name() -> None:
    task = Task(status=tasks_pb2.TASK_STATUS_IDLE, stage=tasks_pb2.PROVISIONING_STAGE_SANDBOX, revision=3)
    for field in Task.DESCRIPTOR.fields:
        if field.type == field.TYPE_STRING:
            setattr(task, field.name, field.name)
    task.pull_request.number = 7
    for name in ("status_time", "create_time", "update_time"):
        getattr(task, name).seconds = 5

    summary = summary_of(task)

    for field in TaskSummary.DESCRIPTOR.fields:
        assert getattr(summary, field.name) == getattr(task, field.name), field.name
