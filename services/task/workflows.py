"""Durable multi-step work: provisioning a task, and ending it.

Each step can be repeated. A step says what failed instead of raising, so that the workflow's record is plain data.
A service that is killed in a step does that step again after the restart.
"""

from branchline.resource.v1 import session_pb2, task_pb2
from branchline.resource.v1.session_pb2 import TranscriptEntry
from dbos import DBOS, DBOSConfiguredInstance

from services.runtime.errors import reason_of
from services.runtime.principal import Principal, bind_principal
from services.runtime.remote import host_of
from services.runtime.service import Chassis
from services.task.git import CHECKOUT, CLONE_SECONDS, checkout_environment, credentials_line
from services.task.machine import Machine
from services.task.status import ENDING
from services.task.store import TaskRecord, TaskStore
from services.task.turns import Turns

PROVISION = "provision"
END = "end"

_WHAT = {
    task_pb2.PROVISIONING_STAGE_SANDBOX: "the sandbox could not be created",
    task_pb2.PROVISIONING_STAGE_REPOSITORY: "the repository could not be checked out",
    task_pb2.PROVISIONING_STAGE_SESSION: "the agent could not be started",
}


@DBOS.dbos_class()
class TaskWorkflows(DBOSConfiguredInstance):
    """The workflows of the task service."""

    def __init__(self, chassis: Chassis, store: TaskStore, turns: Turns, machine: Machine) -> None:
        super().__init__("task")
        self._chassis = chassis
        self._store = store
        self._turns = turns
        self._machine = machine

    @DBOS.workflow(name="task.provision")
    async def provision(self, task_id: str, attempt: int) -> None:
        """Bring a task from pending to its first turn; end in `error` with what failed."""
        for stage, what in _WHAT.items():
            if not await self.enter(task_id, attempt, stage):
                return
            failure = await self.perform(task_id, stage)
            if failure:
                await self.fail(task_id, attempt, f"{what}: {failure}")
                return
        await self.finish(task_id, attempt)

    @DBOS.workflow(name="task.end")
    async def end(self, task_id: str) -> None:
        """Destroy the sandbox of a task that is being archived or killed, then say that it is."""
        while await self.release(task_id):
            await DBOS.sleep_async(5)
        await self.close(task_id)

    @DBOS.step()
    async def enter(self, task_id: str, attempt: int, stage: task_pb2.ProvisioningStage.ValueType) -> bool:
        """Show the stage; return False if the task has ended or is being provisioned anew meanwhile."""
        async with self._chassis.database.transaction() as tx:
            record = await self._store.get(tx, task_id)
            if _overtaken(record, attempt):
                return False
            task = record.task
            if not task.active_sandbox_id:
                task.active_sandbox_id = self._chassis.clock.new_id("sbx")
            await self._store.change_status(tx, record, task_pb2.TASK_STATUS_PROVISIONING)
            task.stage = stage
            await self._store.save(tx, record)
        return True

    @DBOS.step()
    async def perform(self, task_id: str, stage: task_pb2.ProvisioningStage.ValueType) -> str:
        """Do what the stage is for; return what went wrong, or nothing."""
        record = await self._read(task_id)
        try:
            match stage:
                case task_pb2.PROVISIONING_STAGE_SANDBOX:
                    await self._machine.create(record.task)
                case task_pb2.PROVISIONING_STAGE_REPOSITORY:
                    await self._check_out(record)
                case _:
                    await self._open_first_session(record)
        except Exception as error:  # noqa: BLE001 - whatever it is, the task must say it and offer a retry
            return reason_of(error) or type(error).__name__
        return ""

    @DBOS.step()
    async def fail(self, task_id: str, attempt: int, reason: str) -> None:
        """Put the task into error."""
        async with self._chassis.database.transaction() as tx:
            record = await self._store.get(tx, task_id)
            if _overtaken(record, attempt):
                return
            await self._store.change_status(tx, record, task_pb2.TASK_STATUS_ERROR, reason)
            await self._store.record_event(tx, record.task, "task.failed", reason)
            await self._store.save(tx, record)

    @DBOS.step()
    async def finish(self, task_id: str, attempt: int) -> None:
        """Make the task ready, and send its text, or else what was queued meanwhile."""
        async with self._chassis.database.transaction() as tx:
            record = await self._store.get(tx, task_id)
            if _overtaken(record, attempt) or record.task.status != task_pb2.TASK_STATUS_PROVISIONING:
                return
            session = (await self._store.sessions(tx, task_id))[0]
            prompted = session.turn > 0
            session.status = session_pb2.SESSION_STATUS_IDLE
            session.status_reason = ""
            session.status_time.CopyFrom(self._chassis.clock.timestamp())
            record.provisioned = True
            await self._store.change_status(tx, record, task_pb2.TASK_STATUS_IDLE, session_id=session.id)
            await self._store.save_session(tx, record, session)
            await self._store.save(tx, record)
            if record.hold_prompt or prompted:
                await self._turns.send_next(tx, record)
                return
            entry = TranscriptEntry(
                id=f"ent_{task_id.removeprefix('task_')}_0",
                session_id=session.id,
                task_id=task_id,
                kind=session_pb2.TRANSCRIPT_ENTRY_KIND_USER_MESSAGE,
                text=record.task.text,
                user_id=record.task.owner_user_id,
                create_time=self._chassis.clock.timestamp(),
            )
            await self._turns.send(tx, record, session, entry)

    @DBOS.step()
    async def release(self, task_id: str) -> str:
        """Destroy the sandbox; return what went wrong, or nothing."""
        record = await self._read(task_id)
        if not record.task.active_sandbox_id:
            return ""
        try:
            await self._machine.destroy(record.task.active_sandbox_id)
        except Exception as error:  # noqa: BLE001 - the workflow tries again until the sandbox is gone
            return reason_of(error) or type(error).__name__
        return ""

    @DBOS.step()
    async def close(self, task_id: str) -> None:
        """Say that the task is archived or killed."""
        async with self._chassis.database.transaction() as tx:
            record = await self._store.get(tx, task_id)
            status = record.task.status
            if status == task_pb2.TASK_STATUS_ARCHIVING:
                await self._store.change_status(tx, record, task_pb2.TASK_STATUS_ARCHIVED)
            elif status == task_pb2.TASK_STATUS_KILLING:
                await self._store.change_status(tx, record, task_pb2.TASK_STATUS_KILLED)
            record.task.active_sandbox_id = ""
            await self._store.save(tx, record)

    async def _read(self, task_id: str) -> TaskRecord:
        async with self._chassis.database.read() as connection:
            record = await self._store.get(connection, task_id)
        bind_principal(Principal(service="task", organization_id=record.task.organization_id))
        return record

    async def _check_out(self, record: TaskRecord) -> None:
        task, remote = record.task, record.repository.remote_url
        credential = await self._machine.credential(task.id)
        content = credentials_line(remote, host_of(remote), credential.username, credential.secret)
        await self._machine.put_credentials(task.active_sandbox_id, content)
        environment = checkout_environment(task, record.repository, record.git_name, record.git_email)
        script = ("sh", "-c", CHECKOUT)
        await self._machine.run(task.active_sandbox_id, script, "", environment, CLONE_SECONDS)

    async def _open_first_session(self, record: TaskRecord) -> None:
        async with self._chassis.database.read() as connection:
            session = (await self._store.sessions(connection, record.task.id))[0]
        await self._machine.open_session(record.task.active_sandbox_id, session)


def _overtaken(record: TaskRecord, attempt: int) -> bool:
    return record.attempt != attempt or record.task.status in ENDING
