"""How a task is retried, put away, killed and deleted: the rules, up to the workflow that does it."""

from dataclasses import dataclass

from branchline.v1 import sandboxes_pb2, sessions_pb2, tasks_pb2
from branchline_internal.sandbox.v1.sandbox_pb2 import DestroySandboxRequest

from services.runtime.database import Tx
from services.runtime.statuses import ENDING
from services.task.destinations import TO_SANDBOX
from services.task.open_task import OpenTask
from services.task.status import ENDED, SESSION_WORKING, Status, refused, status_name
from services.task.store import DELETE, SANDBOXES
from services.task.turns import Turns

PROVISION = "provision"
END = "end"

_GONE = frozenset({sandboxes_pb2.SANDBOX_STATUS_DESTROYING, sandboxes_pb2.SANDBOX_STATUS_DESTROYED})


@dataclass(frozen=True, slots=True)
class Lifecycle:
    """Begins what takes several steps."""

    turns: Turns

    def retry(self, tx: Tx, task: OpenTask, agent: str, model: str) -> None:
        """Provision a task in error again. Raise FailedPrecondition for any other."""
        status = task.task.status
        if status != tasks_pb2.TASK_STATUS_ERROR:
            raise refused(status, f"only a task in error can be retried; this one is {status_name(status)}")
        session = task.first_session
        if session is not None and (agent or model):
            session.agent = agent or session.agent
            session.model = model or session.model
            task.change_session(session)
        self._leave_dead_sandbox(tx, task)
        task.row.provisioned = False
        task.move(tasks_pb2.TASK_STATUS_PENDING, "retried")
        task.start(PROVISION)

    def _leave_dead_sandbox(self, tx: Tx, task: OpenTask) -> None:
        """Have another sandbox made if the old one is gone, or failed before anybody worked in it."""
        sandbox_id = task.task.active_sandbox_id
        sandbox = SANDBOXES.find(tx, sandbox_id) if sandbox_id else None
        if sandbox is None:
            return
        unused = not any(session.turn for session in task.sessions)
        failed = sandbox.status == sandboxes_pb2.SANDBOX_STATUS_ERROR
        if sandbox.status in _GONE or (failed and unused):
            task.task.active_sandbox_id = ""
            task.change()
            task.send(TO_SANDBOX, sandbox_id, 1, DestroySandboxRequest(sandbox_id=sandbox_id))

    def end(self, tx: Tx, task: OpenTask, status: Status) -> None:
        """Archive or kill a task, once."""
        if task.task.status in (status, ENDED[status]):
            return
        if task.task.status == tasks_pb2.TASK_STATUS_ARCHIVED:
            task.move(ENDED[status])
            return
        task.move(status)
        self._settle(tx, task, f"the task is {status_name(status)}")
        task.start(END)

    def delete(self, tx: Tx, task: OpenTask) -> None:
        """Have nothing left of a task."""
        if task.row.workflow == DELETE:
            return
        if task.task.status not in ENDING:
            task.move(tasks_pb2.TASK_STATUS_KILLING, "the task is being deleted")
        self._settle(tx, task, "the task is being deleted")
        task.start(DELETE)

    def _settle(self, tx: Tx, task: OpenTask, reason: str) -> None:
        """Close what works, and settle what waits: nobody will send or answer it."""
        for session in task.sessions:
            if session.status in SESSION_WORKING or session.status == sessions_pb2.SESSION_STATUS_PENDING:
                task.stand(session, sessions_pb2.SESSION_STATUS_CLOSED, reason)
        self.turns.drop_queued(tx, task)
