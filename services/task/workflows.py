"""Durable multi-step work: provisioning a task, ending it, deleting it.

Each step can be repeated, and is tried several times. A service that is killed in a step does that step again after
the restart. A workflow that was overtaken, by a retry or by the task's end, stops at its next step.
"""

from branchline.v1 import common_pb2, sessions_pb2, tasks_pb2
from branchline.v1.common_pb2 import Failure
from branchline.v1.history_pb2 import EVENT_KIND_BRANCH_MOVED, EVENT_KIND_TASK_FAILED
from branchline_internal.sandbox.v1.sandbox_pb2 import CloseSessionRequest
from branchline_internal.task.v1.task_pb2 import StartWorkflow
from dbos import DBOS, DBOSConfiguredInstance, SetWorkflowID

from services.runtime.database import Reader, Tx
from services.runtime.failures import failed
from services.runtime.principal import Principal, bind_principal
from services.runtime.remote import host_of
from services.runtime.service import Chassis
from services.runtime.workflows import durable_step, failure_of
from services.task import failures
from services.task.deletion import Deletion
from services.task.destinations import TO_SANDBOX
from services.task.git import CHECKOUT, OWN, checkout_environment, checkout_failure, credentials_line
from services.task.lifecycle import END, PROVISION
from services.task.machine import Machine
from services.task.open_task import OpenTask
from services.task.standing import ENDED, FAILED, IDLE, PROVISIONING, UNBORN
from services.task.store import DELETE, SANDBOXES_OF_TASK, TaskStore
from services.task.turns import Turns

_WHAT = {
    tasks_pb2.PROVISIONING_STAGE_SANDBOX: (
        "the sandbox could not be created",
        common_pb2.FAILURE_REASON_SANDBOX_FAILED,
    ),
    tasks_pb2.PROVISIONING_STAGE_REPOSITORY: (
        "the repository could not be checked out",
        common_pb2.FAILURE_REASON_INTERNAL,
    ),
    tasks_pb2.PROVISIONING_STAGE_SESSION: (
        "the agent could not be started",
        common_pb2.FAILURE_REASON_AGENT_NOT_STARTED,
    ),
}
"""What fails where a stage does, and why, unless more is known."""

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
        """Bring a task from being queued to its first turn; whatever fails makes it FAILED with what failed."""
        try:
            failure = await self._provision(task_id, attempt)
        except Exception as error:  # noqa: BLE001 - the task must say it and offer a retry
            failure = broken(failure_of(error))
        if failure is not None:
            await self.fail(task_id, attempt, failure)

    async def _provision(self, task_id: str, attempt: int) -> Failure | None:
        for stage in _WHAT:
            if not await self.enter(task_id, attempt, stage):
                return None
            failure = await self.perform(task_id, attempt, stage)
            if failure is not None:
                return failure
        await self.finish(task_id, attempt)
        return None

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
            if failure is None:
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
            if task is None or task.row.attempt != attempt or task.standing not in UNBORN:
                return False
            if not task.task.active_sandbox_id:
                task.task.active_sandbox_id = self._clock.new_id("sbx")
            task.move(PROVISIONING)
            task.task.stage = stage
            task.change()
            return True

    @durable_step
    async def perform(self, task_id: str, attempt: int, stage: Stage) -> Failure | None:
        """Do what the stage is for; return what went wrong, or None."""
        task = await self._read(task_id)
        try:
            match stage:
                case tasks_pb2.PROVISIONING_STAGE_SANDBOX:
                    await self._machine.create(task.task, task.row.repository.remote_url)
                case tasks_pb2.PROVISIONING_STAGE_REPOSITORY:
                    return await self._check_out(task, attempt)
                case _:
                    await self._open_sessions(task, attempt)
        except Exception as error:  # noqa: BLE001 - whatever it is, the task must say it and offer a retry
            what, otherwise = _WHAT[stage]
            return failures.failure_of(error, otherwise, what)
        return None

    async def _check_out(self, task: OpenTask, attempt: int) -> Failure | None:
        remote, sandbox_id = task.row.repository.remote_url, task.task.active_sandbox_id
        credential = await self._machine.credential(task.task.id)
        content = credentials_line(remote, host_of(remote), credential.username, credential.secret)
        await self._machine.put_credentials(sandbox_id, content)
        seconds = self._machine.deadlines.clone_seconds
        environment = checkout_environment(task.row)
        result = await self._machine.run(sandbox_id, ("sh", "-c", CHECKOUT), "", environment, seconds)
        failure = checkout_failure(result, seconds)
        if failure is None:
            await self._database.write(self._take_branch, task.task.id, attempt, result.stdout.strip())
        return failure

    def _take_branch(self, tx: Tx, task_id: str, attempt: int, branch: str) -> None:
        """Take the branch that the tree stands on: from now on it is the task's own, on the remote too."""
        with self._store.open(tx, task_id) as task:
            if task.row.attempt != attempt or task.row.branch_choice == OWN:
                return
            task.row.branch_choice, task.row.touched = OWN, True
            if branch and branch != task.task.branch:
                words = f"the remote has {task.task.branch}; the task's branch is {branch}"
                task.task.branch = branch
                task.change()
                task.tell(EVENT_KIND_BRANCH_MOVED, words)

    async def _open_sessions(self, task: OpenTask, attempt: int) -> None:
        """Start the agents of all sessions. Where that of the first fails, the stage does."""
        first = task.first_session
        what, otherwise = _WHAT[tasks_pb2.PROVISIONING_STAGE_SESSION]
        for session in task.sessions:
            if session.state == sessions_pb2.SESSION_STATE_CLOSED:
                continue
            failure = None
            try:
                await self._machine.open_session(task.task.active_sandbox_id, session)
            except Exception as error:
                if session is first:
                    raise
                failure = failures.failure_of(error, otherwise, what)
            await self._database.write(self._session_opened, task.task.id, attempt, session.id, failure)

    def _session_opened(self, tx: Tx, task_id: str, attempt: int, session_id: str, failure: Failure | None) -> None:
        with self._store.open(tx, task_id) as task:
            session = task.session(session_id)
            if task.row.attempt != attempt:
                return
            if session.state == sessions_pb2.SESSION_STATE_CLOSED:  # meanwhile, which the sandbox was told before
                task.send(TO_SANDBOX, session.id, session.turn, CloseSessionRequest(session_id=session.id))
            elif failure is None:
                self._turns.opened(task, session)
            else:
                task.stand(session, sessions_pb2.SESSION_STATE_FAILED, failure)

    @durable_step
    async def fail(self, task_id: str, attempt: int, failure: Failure) -> None:
        """Say that the task could not be provisioned."""
        await self._database.write(self.fail_provisioning, task_id, attempt, failure)

    def fail_provisioning(self, tx: Tx, task_id: str, attempt: int, failure: Failure) -> None:
        """End the provisioning of a task in failure, unless it was overtaken."""
        with self._store.open_all(tx, [task_id]) as opened:
            task = opened.get(task_id)
            if task is None or task.row.attempt != attempt or task.standing not in UNBORN:
                return
            task.move(FAILED, failure)
            task.tell(EVENT_KIND_TASK_FAILED, failure.message)
            task.arrive()

    @durable_step
    async def finish(self, task_id: str, attempt: int) -> None:
        """Make the task ready, and send its prompt, or else what was queued meanwhile."""
        await self._database.write(self._finish, task_id, attempt)

    def _finish(self, tx: Tx, task_id: str, attempt: int) -> None:
        with self._store.open_all(tx, [task_id]) as opened:
            task = opened.get(task_id)
            if task is None or task.row.attempt != attempt or task.standing not in UNBORN:
                return
            prompted = any(session.turn for session in task.sessions)
            session = task.first_session
            task.row.provisioned = True
            task.arrive()
            task.move(IDLE)
            if session is None or task.row.hold_prompt or prompted:
                self._turns.begin_next(tx, [task])
                return
            first_id = f"ent_{task_id.removeprefix('task_')}_0"
            self._turns.begin(task, session, task.task.prompt, task.task.creator, first_id)

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
    async def release(self, task_id: str, attempt: int) -> Failure | None:
        """Destroy the sandboxes; return what went wrong, or None."""
        if not await self._is_current(task_id, attempt):
            return None
        task = await self._read(task_id)
        held = await self._database.read(lambda tx: SANDBOXES_OF_TASK(tx, task_id=task_id))
        try:
            for sandbox_id in sorted({*(one.id for one in held), task.task.active_sandbox_id} - {""}):
                await self._machine.destroy(sandbox_id)
        except Exception as error:  # noqa: BLE001 - the workflow tries again, and says why
            what = "the sandbox could not be destroyed, and it is tried again"
            return failures.failure_of(error, common_pb2.FAILURE_REASON_SANDBOX_FAILED, what)
        return None

    @durable_step
    async def note(self, task_id: str, attempt: int, failure: Failure) -> None:
        """Say why the task has not ended yet."""
        await self._database.write(self._note, task_id, attempt, failure)

    def _note(self, tx: Tx, task_id: str, attempt: int, failure: Failure) -> None:
        with self._store.open(tx, task_id) as task:
            if task.row.attempt == attempt:
                task.move(task.standing, failure)

    @durable_step
    async def close(self, task_id: str, attempt: int) -> None:
        """Say that the task is archived or killed."""
        await self._database.write(self._end, task_id, attempt)

    def _end(self, tx: Tx, task_id: str, attempt: int) -> None:
        with self._store.open_all(tx, [task_id]) as opened:
            task = opened.get(task_id)
            if task is None or task.row.attempt != attempt or task.standing not in ENDED:
                return
            task.move(ENDED[task.standing])
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


def broken(words: str) -> Failure:
    """Return the failure of a provisioning that broke off where nothing says more."""
    return failed(common_pb2.FAILURE_REASON_INTERNAL, f"provisioning failed: {words}")
