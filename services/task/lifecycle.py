"""How a task is provisioned again, put away, killed and deleted: the rules, up to the workflow that does it."""

from branchline.v1 import sandboxes_pb2, sessions_pb2
from branchline.v1.sessions_pb2 import SessionOptions
from branchline_internal.sandbox.v1.sandbox_pb2 import DestroySandboxRequest

from services.runtime.database import Tx
from services.runtime.states import ENDING
from services.task import message_queue
from services.task.destinations import TO_SANDBOX
from services.task.open_task import OpenTask
from services.task.standing import ARCHIVED, ENDED, FAILED, KILLING, QUEUED, SESSION_UNDER_WAY, Standing, refused
from services.task.store import DELETE, SANDBOXES

PROVISION = "provision"
END = "end"

_GONE = frozenset({sandboxes_pb2.SANDBOX_STATE_DESTROYING, sandboxes_pb2.SANDBOX_STATE_DESTROYED})


class Lifecycle:
    """Begins what takes several steps."""

    def retry(self, tx: Tx, task: OpenTask, wanted: SessionOptions) -> None:
        """Provision a task that has no sandbox that works again. Raise FailedPrecondition for any other."""
        held = task.standing
        if held != FAILED:
            words = f"only a task that failed can be provisioned again; this one is {held.name}"
            raise refused(held, words, FAILED)
        self._choose(task, wanted)
        self._leave_dead_sandbox(tx, task)
        task.row.provisioned = False
        task.move(QUEUED)
        task.start(PROVISION)

    def _choose(self, task: OpenTask, wanted: SessionOptions) -> None:
        """Take what is wanted of the first session. Another agent begins with its own model and mode."""
        session = task.first_session
        if session is None or not wanted.ByteSize():
            return
        if wanted.agent and wanted.agent != session.agent:
            session.agent, session.model, session.mode = wanted.agent, "", ""
        session.model = wanted.model or session.model
        session.mode = wanted.mode or session.mode
        task.change_session(session)

    def _leave_dead_sandbox(self, tx: Tx, task: OpenTask) -> None:
        """Have another sandbox made if the old one is gone, or failed before anybody worked in it."""
        sandbox_id = task.task.active_sandbox_id
        sandbox = SANDBOXES.find(tx, sandbox_id) if sandbox_id else None
        if sandbox is None:
            return
        unused = not any(session.turn for session in task.sessions)
        failed = sandbox.state == sandboxes_pb2.SANDBOX_STATE_FAILED
        if sandbox.state in _GONE or (failed and unused):
            task.task.active_sandbox_id = ""
            task.change()
            task.send(TO_SANDBOX, sandbox_id, 1, DestroySandboxRequest(sandbox_id=sandbox_id))

    def end(self, tx: Tx, task: OpenTask, standing: Standing) -> None:
        """Archive or kill a task, once."""
        if task.standing in (standing, ENDED[standing]):
            return
        if task.standing == ARCHIVED:
            task.move(ENDED[standing])
            return
        task.move(standing)
        self._settle(tx, task)
        task.start(END)

    def delete(self, tx: Tx, task: OpenTask) -> None:
        """Have nothing left of a task."""
        if task.row.workflow == DELETE:
            return
        if task.task.state not in ENDING:
            task.move(KILLING)
        self._settle(tx, task)
        task.start(DELETE)

    def _settle(self, tx: Tx, task: OpenTask) -> None:
        """Close what works or never began, and drop what waits: nobody will send or answer it."""
        for session in task.sessions:
            if session.state in SESSION_UNDER_WAY:
                task.stand(session, sessions_pb2.SESSION_STATE_CLOSED)
        message_queue.drop(tx, task)
