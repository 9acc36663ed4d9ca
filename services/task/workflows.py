"""Durable multi-step work: provisioning a task, ending it, deleting it.

Each step can be repeated, and is tried several times. A service that is killed in a step does that step again after
the restart. A workflow that was overtaken, by a retry or by the task's end, stops at its next step.
"""

from branchline.v1 import sessions_pb2, tasks_pb2
from branchline.v1.sessions_pb2 import Session, TranscriptEntry
from branchline.v1.vocabulary_pb2 import EVENT_KIND_BRANCH_MOVED, EVENT_KIND_TASK_FAILED
from branchline_internal.task.v1.task_pb2 import StartWorkflow
from dbos import DBOS, DBOSConfiguredInstance, SetWorkflowID

from services.runtime.database import Reader, Tx
from services.runtime.errors import reason_of
from services.runtime.principal import Principal, bind_principal
from services.runtime.remote import host_of
from services.runtime.service import Chassis
from services.runtime.workflows import durable_step, failure_of
from services.task.deletion import Deletion
from services.task.git import CHECKOUT, checkout_environment, credentials_line
from services.task.lifecycle import END, PROVISION
from services.task.machine import Machine
from services.task.open_task import OpenTask
from services.task.status import ENDED, PROVISIONING
from services.task.store import DELETE, SANDBOXES_OF_TASK, TaskStore
from services.task.turns import Turns

_WHAT = {
    tasks_pb2.PROVISIONING_STAGE_SANDBOX: "the sandbox could not be created",
    tasks_pb2.PROVISIONING_STAGE_REPOSITORY: "the repository could not be checked out",
    tasks_pb2.PROVISIONING_STAGE_SESSION: "the agent could not be started",
}
_PAUSES_SECONDS = (5.0, 30.0, 120.0, 600.0, 1800.0)
"""Between attempts to destroy a machine. After the last the sweep begins anew."""

Stage = tasks_pb2.ProvisioningStage.ValueType


def workflow_id(task: OpenTask) -> str:
    """Return the id of the workflow that a task waits for."""
    return f"{task.row.workflow}/{task.task.id}/{task.row.attempt}"


@DBOS.dbos_class()
class TaskWorkflows(DBOSConfiguredInstance):
    """The workflows of the task service."""

    def __init__(self, chassis: Chassis, store: TaskStore, turns: Turns, machine: Machine) -> None:
        super().__init__("task")
        self._clock = chassis.clock
        self._database = chassis.database
        self._store = store
        self._turns = turns
        self._machine = machine
        self._deletion = Deletion(store)

    async def start(self, wanted: StartWorkflow) -> None:
        """Start a workflow; one that was started before is left alone."""
        workflow = {PROVISION: self.provision, END: self.end, DELETE: self.delete}[wanted.workflow]
        with SetWorkflowID(f"{wanted.workflow}/{wanted.task_id}/{wanted.attempt}"):
            await DBOS.start_workflow_async(workflow, wanted.task_id, wanted.attempt)

    @DBOS.workflow(name="task.provision")
    async def provision(self, task_id: str, attempt: int) -> None:
        """Bring a task from pending to its first turn; whatever fails ends it in `error` with what failed."""
        try:
            failure = await self._provision(task_id, attempt)
        except Exception as error:  # noqa: BLE001 - the task must say it and offer a retry
            failure = f"provisioning failed: {failure_of(error)}"
        if failure:
            await self.fail(task_id, attempt, failure)

    async def _provision(self, task_id: str, attempt: int) -> str:
        for stage, what in _WHAT.items():
            if not await self.enter(task_id, attempt, stage):
                return ""
            failure = await self.perform(task_id, attempt, stage)
            if failure:
                return f"{what}: {failure}"
        await self.finish(task_id, attempt)
        return ""

    @DBOS.workflow(name="task.end")
    async def end(self, task_id: str, attempt: int) -> None:
        """Stop the agents and destroy the sandbox of a task that is archived or killed, then say that it is."""
        if await self._release_patiently(task_id, attempt):
            await self.close(task_id, attempt)

    @DBOS.workflow(name="task.delete")
    async def delete(self, task_id: str, attempt: int) -> None:
        """Stop the agents and destroy the sandboxes of a task, then remove it."""
        if await self._release_patiently(task_id, attempt):
            await self.remove(task_id, attempt)

    async def _release_patiently(self, task_id: str, attempt: int) -> bool:
        await self.stop_agents(task_id, attempt)
        for pause_seconds in _PAUSES_SECONDS:
            failure = await self.release(task_id, attempt)
            if not failure:
                return True
            await self.note(task_id, attempt, failure)
            await DBOS.sleep_async(pause_seconds)
        return False

    @durable_step
    async def enter(self, task_id: str, attempt: int, stage: Stage) -> bool:
        """Show the stage; return False if the task has ended or is being provisioned anew meanwhile."""
        return await self._database.write(self._enter, task_id, attempt, stage)

    def _enter(self, tx: Tx, task_id: str, attempt: int, stage: Stage) -> bool:
        with self._store.open_all(tx, [task_id]) as opened:
            task = opened.get(task_id)
            if task is None or task.row.attempt != attempt or task.task.status not in PROVISIONING:
                return False
            if not task.task.active_sandbox_id:
                task.task.active_sandbox_id = self._clock.new_id("sbx")
            task.move(tasks_pb2.TASK_STATUS_PROVISIONING)
            task.task.stage = stage
            task.change()
            return True

    @durable_step
    async def perform(self, task_id: str, attempt: int, stage: Stage) -> str:
        """Do what the stage is for; return what went wrong, or nothing."""
        task = await self._read(task_id)
        try:
            match stage:
                case tasks_pb2.PROVISIONING_STAGE_SANDBOX:
                    await self._machine.create(task.task)
                case tasks_pb2.PROVISIONING_STAGE_REPOSITORY:
                    branch = await self._check_out(task)
                    await self._database.write(self._take_branch, task_id, attempt, branch)
                case _:
                    await self._open_sessions(task, attempt)
        except Exception as error:  # noqa: BLE001 - whatever it is, the task must say it and offer a retry
            return reason_of(error)
        return ""

    async def _check_out(self, task: OpenTask) -> str:
        row, remote, sandbox_id = task.row, task.row.repository.remote_url, task.task.active_sandbox_id
        credential = await self._machine.credential(task.task.id)
        content = credentials_line(remote, host_of(remote), credential.username, credential.secret)
        await self._machine.put_credentials(sandbox_id, content)
        environment = checkout_environment(
            task.task, row.repository, row.git_name, row.git_email, derived=row.derived_branch
        )
        output = await self._machine.run(
            sandbox_id, ("sh", "-c", CHECKOUT), "", environment, self._machine.deadlines.clone_seconds
        )
        return output.strip()

    def _take_branch(self, tx: Tx, task_id: str, attempt: int, branch: str) -> None:
        """Take the branch that the tree stands on: from now on it is the task's own, on the remote too."""
        with self._store.open(tx, task_id) as task:
            if task.row.attempt != attempt or not task.row.derived_branch:
                return
            task.row.derived_branch, task.row.touched = False, True
            if branch and branch != task.task.branch:
                words = f"the remote has {task.task.branch}; the task's branch is {branch}"
                task.task.branch = branch
                task.change()
                task.tell(EVENT_KIND_BRANCH_MOVED, words)

    async def _open_sessions(self, task: OpenTask, attempt: int) -> None:
        """Start the agents of all sessions. Where that of the first fails, the stage does."""
        first = task.first_session
        for session in task.sessions:
            if session.status == sessions_pb2.SESSION_STATUS_CLOSED:
                continue
            try:
                await self._machine.open_session(task.task.active_sandbox_id, session)
            except Exception as error:
                if session is first:
                    raise
                await self._database.write(self._session_failed, task.task.id, attempt, session.id, reason_of(error))

    def _session_failed(self, tx: Tx, task_id: str, attempt: int, session_id: str, reason: str) -> None:
        with self._store.open(tx, task_id) as task:
            if task.row.attempt == attempt:
                task.stand(task.session(session_id), sessions_pb2.SESSION_STATUS_ERROR, reason)

    @durable_step
    async def fail(self, task_id: str, attempt: int, reason: str) -> None:
        """Put the task into error."""
        await self._database.write(self.fail_provisioning, task_id, attempt, reason)

    def fail_provisioning(self, tx: Tx, task_id: str, attempt: int, reason: str) -> None:
        """End the provisioning of a task in error, unless it was overtaken."""
        with self._store.open_all(tx, [task_id]) as opened:
            task = opened.get(task_id)
            if task is None or task.row.attempt != attempt or task.task.status not in PROVISIONING:
                return
            task.move(tasks_pb2.TASK_STATUS_ERROR, reason)
            task.tell(EVENT_KIND_TASK_FAILED, reason)
            task.arrive()

    @durable_step
    async def finish(self, task_id: str, attempt: int) -> None:
        """Make the task ready, and send its text, or else what was queued meanwhile."""
        await self._database.write(self._finish, task_id, attempt)

    def _finish(self, tx: Tx, task_id: str, attempt: int) -> None:
        with self._store.open_all(tx, [task_id]) as opened:
            task = opened.get(task_id)
            if task is None or task.row.attempt != attempt or task.task.status not in PROVISIONING:
                return
            prompted = any(session.turn for session in task.sessions)
            session = task.first_session
            task.row.provisioned = True
            task.arrive()
            task.move(tasks_pb2.TASK_STATUS_IDLE)
            if session is not None and session.status != sessions_pb2.SESSION_STATUS_IDLE:
                task.stand(session, sessions_pb2.SESSION_STATUS_IDLE)
            if session is None or task.row.hold_prompt or prompted:
                self._turns.begin_next(tx, [task])
            else:
                self._turns.begin(task, session, self._first_message(task, session))

    def _first_message(self, task: OpenTask, session: Session) -> TranscriptEntry:
        return TranscriptEntry(
            id=f"ent_{task.task.id.removeprefix('task_')}_0",
            session_id=session.id,
            task_id=task.task.id,
            kind=sessions_pb2.TRANSCRIPT_ENTRY_KIND_USER_MESSAGE,
            text=task.task.text,
            user_id=task.task.owner_user_id,
            create_time=self._clock.timestamp(),
        )

    @durable_step
    async def stop_agents(self, task_id: str, attempt: int) -> None:
        """Have the agents stopped before their machine goes; one that cannot be told goes with it."""
        if not await self._is_current(task_id, attempt):
            return
        task = await self._read(task_id)
        for session in task.sessions:
            try:
                await self._machine.close_session(session.id)
            except Exception:  # noqa: BLE001 - the machine's end is the agents' end
                return

    @durable_step
    async def release(self, task_id: str, attempt: int) -> str:
        """Destroy the sandboxes; return what went wrong, or nothing."""
        if not await self._is_current(task_id, attempt):
            return ""
        task = await self._read(task_id)
        held = await self._database.read(lambda tx: SANDBOXES_OF_TASK(tx, task_id=task_id))
        try:
            for sandbox_id in sorted({*(one.id for one in held), task.task.active_sandbox_id} - {""}):
                await self._machine.destroy(sandbox_id)
        except Exception as error:  # noqa: BLE001 - the workflow tries again, and says why
            return f"the sandbox could not be destroyed: {reason_of(error)}"
        return ""

    @durable_step
    async def note(self, task_id: str, attempt: int, reason: str) -> None:
        """Say why the task has not ended yet."""
        await self._database.write(self._note, task_id, attempt, reason)

    def _note(self, tx: Tx, task_id: str, attempt: int, reason: str) -> None:
        with self._store.open(tx, task_id) as task:
            if task.row.attempt == attempt:
                task.move(task.task.status, f"{reason}; it is tried again")

    @durable_step
    async def close(self, task_id: str, attempt: int) -> None:
        """Say that the task is archived or killed."""
        await self._database.write(self._end, task_id, attempt)

    def _end(self, tx: Tx, task_id: str, attempt: int) -> None:
        with self._store.open_all(tx, [task_id]) as opened:
            task = opened.get(task_id)
            if task is None or task.row.attempt != attempt or task.task.status not in ENDED:
                return
            task.move(ENDED[task.task.status])
            task.task.active_sandbox_id = ""
            task.arrive()

    @durable_step
    async def remove(self, task_id: str, attempt: int) -> None:
        """Remove the task's rows, and say that it is deleted."""
        await self._deletion.run(self._database, task_id, attempt)

    async def _is_current(self, task_id: str, attempt: int) -> bool:
        def look(tx: Reader) -> bool:
            opened = self._store.find(tx, task_id)
            return opened is not None and opened.row.attempt == attempt

        return await self._database.read(look)

    async def _read(self, task_id: str) -> OpenTask:
        """Return the task, and act for its organization from here on."""
        task = await self._database.read(self._store.read, task_id)
        bind_principal(Principal(service="task", organization_id=task.task.organization_id))
        return task
