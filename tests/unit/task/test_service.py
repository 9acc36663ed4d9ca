"""The whole task service between its neighbours: durable work, deliveries, and the sweep."""

import asyncio
import sqlite3
from collections.abc import AsyncGenerator, Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from branchline.v1 import sessions_pb2, sessions_pb2_grpc, tasks_pb2, tasks_pb2_grpc
from branchline.v1.tasks_pb2 import Task
from branchline_internal.repository.v1 import repository_pb2_grpc
from branchline_internal.sandbox.v1 import sandbox_pb2, sandbox_pb2_grpc
from branchline_internal.sandbox.v1.sandbox_pb2 import AgentSession
from branchline_internal.spine.v1 import push_pb2, push_pb2_grpc
from branchline_internal.task.v1 import task_pb2 as internal
from branchline_internal.task.v1 import task_pb2_grpc
from google.protobuf.message import Message

from services.runtime.client import open_channel
from services.runtime.config import Secret
from services.runtime.principal import Signer
from services.runtime.service import Service
from services.runtime.spine.outbox import OutboxRow
from services.task.machine import Deadlines
from services.task.open_task import OpenTask
from services.task.service import TaskConfig, build
from services.task.status import Status
from services.task.sweep import Sweep
from tests.support.stack import eventually, failure
from tests.unit.task.neighbours import Refusal, RepositoryNeighbour, SandboxNeighbour
from tests.unit.task.room import Room, birth, entry_of, new_database, new_id

KEY = "k" * 40
IDLE, RUNNING, ERROR = tasks_pb2.TASK_STATUS_IDLE, tasks_pb2.TASK_STATUS_RUNNING, tasks_pb2.TASK_STATUS_ERROR


@dataclass
class Installed:
    """A running task service with its neighbours."""

    room: Room
    sandbox: SandboxNeighbour
    repository: RepositoryNeighbour
    sweep: Sweep
    internal: Any
    tasks: Any
    sessions: Any
    pushes: Any
    folder: Path
    stuck: str
    """A task that was found in provisioning, without a workflow, when the service started."""

    async def create(self, **fields: Any) -> str:
        task_id = new_id("task")
        await self.internal.CreateTask(birth(task_id, **fields))
        return task_id

    async def until(self, task_id: str, status: Status, seconds: float = 30.0) -> OpenTask:
        async def look() -> OpenTask | None:
            found = await self.room.read(task_id)
            return found if found.task.status == status else None

        return await eventually(look, seconds)

    async def push(self, *states: Message) -> list[push_pb2.RejectedEntry]:
        """Push as the sandbox service does."""
        entries = [
            entry_of(one, one.session_id if isinstance(one, AgentSession) else one.id, one.revision)  # pyright: ignore
            for one in states
        ]

        async def batches() -> Any:
            yield push_pb2.PushRequest(batch=1, entries=entries)

        async for answer in self.pushes.Push(batches()):
            return list(answer.rejected)
        raise AssertionError("no answer")

    def of(self, task_id: str) -> str:
        return task_id.replace("task_", "ses_")

    async def send(self, task_id: str, **fields: Any) -> Any:
        given: dict[str, Any] = {"text": "go on", **fields}
        request = sessions_pb2.SendMessageRequest(
            request_id=new_id(), task_id=task_id, session_id=self.of(task_id), **given
        )
        return await self.sessions.SendMessage(request)


def sql(folder: Path, statement: str) -> None:
    """Do something to the service's database behind its back."""
    with closing(sqlite3.connect(folder / "task.sqlite", timeout=10)) as connection, connection:
        connection.execute(statement)


def sweep_of(service: Service) -> Sweep:
    """Return the sweep of a built service."""
    for loop in service.loops:
        work = getattr(getattr(loop, "__self__", None), "work", None)
        owner = getattr(work, "__self__", None)
        if isinstance(owner, Sweep):
            return owner
    raise AssertionError("the service has no sweep")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def installed(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Installed, None]:
    folder: Path = tmp_path_factory.mktemp("task")
    addresses = {name: f"unix:{folder}/{name}" for name in ("task", "sandbox", "repository")}
    sandbox, repository = SandboxNeighbour(), RepositoryNeighbour()
    servers = [grpc.aio.server(), grpc.aio.server()]
    sandbox_pb2_grpc.add_SandboxServiceServicer_to_server(sandbox, servers[0])
    repository_pb2_grpc.add_RepositoryServiceServicer_to_server(repository, servers[1])
    push_pb2_grpc.add_PushServiceServicer_to_server(repository, servers[1])
    for server, name in zip(servers, ("sandbox", "repository"), strict=True):
        server.add_insecure_port(addresses[name])
        await server.start()
    stuck = await _leave_stuck(folder)
    config = TaskConfig(
        addresses=addresses,
        data_dir=folder,
        signing_key=Secret(KEY),
        drain_seconds=0.2,
        deadlines=Deadlines(patience_seconds=0.5),
    )
    service = build(config)
    sweep = sweep_of(service)
    channel = open_channel(addresses["task"], Signer(KEY, "gateway"))
    room = Room(sweep.database)
    async with service.running():
        yield Installed(
            room,
            sandbox,
            repository,
            sweep,
            task_pb2_grpc.TaskServiceStub(channel),  # pyright: ignore
            tasks_pb2_grpc.TaskServiceStub(channel),  # pyright: ignore
            sessions_pb2_grpc.SessionServiceStub(channel),  # pyright: ignore
            push_pb2_grpc.PushServiceStub(channel),  # pyright: ignore
            folder,
            stuck,
        )
    await channel.close()
    for server in servers:
        await server.stop(0)


async def _leave_stuck(folder: Path) -> str:
    """Leave a task behind as a crash of a release before might have: provisioning, and nothing that does it."""
    database = new_database(folder)
    await database.start()
    room = Room(database)
    task_id = new_id("task")
    await database.write(room.store.create, birth(task_id, hold_prompt=True), "provision")

    def leave(task: OpenTask) -> None:
        task.move(tasks_pb2.TASK_STATUS_PROVISIONING)
        task.row.workflow_time = 1.0

    await room.change(task_id, leave)
    await database.close()
    sql(folder, "DELETE FROM outbox")
    return task_id


@pytest_asyncio.fixture(autouse=True)
async def well(installed: Installed) -> AsyncGenerator[None, None]:
    """Have the neighbours well again after each test."""
    yield
    installed.sandbox.refusals.clear()
    installed.sandbox.hanging.clear()
    installed.sandbox.output = ""
    installed.sandbox.exit_code = 0


async def test_a_task_is_provisioned_and_given_its_text(installed: Installed) -> None:
    task_id = await installed.create()

    await installed.until(task_id, RUNNING)

    async def started() -> list[Any]:
        return installed.sandbox.of(sandbox_pb2.StartTurnRequest, session_id=installed.of(task_id))

    assert [(one.turn, one.text) for one in await eventually(started)] == [(1, "do it")]


async def test_a_stuck_task_is_found_at_the_start_and_provisioned(installed: Installed) -> None:  # F4, issue item 4
    found = await installed.until(installed.stuck, IDLE)

    assert (found.row.workflow, found.row.provisioned) == ("", True)


async def test_the_branch_that_the_tree_stands_on_becomes_the_tasks_and_is_pushed_up(installed: Installed) -> None:
    # F12
    installed.sandbox.output = "feat/a-task-0a1b2c\n"

    task_id = await installed.create(derived_branch=True, hold_prompt=True)
    task = await installed.until(task_id, IDLE)

    async def pushed() -> list[str]:
        entries = [one for one in installed.repository.pushed if one.id == task_id]
        return [Task.FromString(one.state.value).branch for one in entries if b"0a1b2c" in one.state.value]

    assert await eventually(pushed)
    assert (task.task.branch, task.row.derived_branch) == ("feat/a-task-0a1b2c", False)
    execution = next(
        one for one in installed.sandbox.of(sandbox_pb2.ExecuteRequest) if one.environment["SUFFIX"] == task_id[-6:]
    )
    assert execution.timeout_seconds == 600


async def test_a_stage_that_fails_ends_in_error_with_the_outputs_tail_and_can_be_retried(
    installed: Installed,
) -> None:  # F4
    installed.sandbox.output, installed.sandbox.exit_code = "x" * 5000 + "no such remote", 1
    task_id = await installed.create(hold_prompt=True)
    failed = await installed.until(task_id, ERROR)
    installed.sandbox.output, installed.sandbox.exit_code = "", 0

    await installed.tasks.RetryTask(tasks_pb2.RetryTaskRequest(request_id=new_id(), task_id=task_id))

    assert failed.task.status_reason.startswith("the repository could not be checked out: …")
    assert failed.task.status_reason.endswith("no such remote")
    await installed.until(task_id, IDLE)


async def test_a_step_that_raises_again_and_again_ends_the_task_in_error(installed: Installed) -> None:  # F4
    task_id = new_id("task")
    sql(
        installed.folder,
        f"CREATE TRIGGER broken BEFORE INSERT ON transcript_entries WHEN NEW.task_id = '{task_id}' "
        "BEGIN SELECT RAISE(ABORT, 'the disk is haunted'); END",
    )

    await installed.internal.CreateTask(birth(task_id))
    failed = await installed.until(task_id, ERROR)
    sql(installed.folder, "DROP TRIGGER broken")

    assert failed.task.status_reason == "provisioning failed: the disk is haunted"
    assert failed.row.workflow == ""


async def test_a_turn_that_the_sandbox_refuses_ends_in_error_with_its_reason(installed: Installed) -> None:
    # issue item 4
    task_id = await installed.create(hold_prompt=True)
    await installed.until(task_id, IDLE)
    installed.sandbox.refusals["StartTurn"] = Refusal(grpc.StatusCode.FAILED_PRECONDITION, "the machine is gone")

    await installed.send(task_id)

    failed = await installed.until(task_id, ERROR)
    assert (failed.task.status_reason, failed.sessions[0].status_reason) == ("the machine is gone",) * 2


async def test_a_turn_whose_delivery_was_parked_ends_in_error_and_is_not_begun_later(installed: Installed) -> None:
    task_id = await installed.create(hold_prompt=True)
    await installed.until(task_id, IDLE)
    installed.sandbox.hanging.add(installed.of(task_id))
    await installed.send(task_id)
    parked = f"UPDATE outbox SET parked_reason = 'too slow' WHERE entity_id = '{installed.of(task_id)}'"
    sql(installed.folder, f"{parked} AND destination = 'sandbox'")

    await installed.sweep.end_refused_turns()

    failed = await installed.until(task_id, ERROR)
    assert failed.task.status_reason == "the sandbox did not take the message: too slow"
    begun = len(installed.sandbox.of(sandbox_pb2.StartTurnRequest, session_id=installed.of(task_id)))
    request = sandbox_pb2.StartTurnRequest(session_id=installed.of(task_id), turn=1)
    name = f"type.googleapis.com/{request.DESCRIPTOR.full_name}"
    row = OutboxRow(1, "sandbox", name, request.session_id, 1, deleted=False, payload=request.SerializeToString())
    await installed.sweep.downward.to_sandbox(row)
    assert len(installed.sandbox.of(sandbox_pb2.StartTurnRequest, session_id=installed.of(task_id))) == begun


async def test_one_session_whose_sandbox_hangs_holds_up_no_other(installed: Installed) -> None:  # F10, C2
    slow, quick = await installed.create(hold_prompt=True), await installed.create(hold_prompt=True)
    for task_id in (slow, quick):
        await installed.until(task_id, IDLE)
    installed.sandbox.hanging.add(installed.of(slow))
    await installed.send(slow)

    await installed.send(quick)

    async def begun() -> list[Any]:
        return installed.sandbox.of(sandbox_pb2.StartTurnRequest, session_id=installed.of(quick))

    assert await eventually(begun, seconds=5)


async def test_deliveries_act_for_the_service_and_for_nobody_else(installed: Installed) -> None:  # F29
    task_id = await installed.create(hold_prompt=True)
    await installed.until(task_id, IDLE)
    installed.sandbox.principals.clear()
    await installed.send(task_id)

    async def begun() -> list[Any]:
        return installed.sandbox.of(sandbox_pb2.StartTurnRequest, session_id=installed.of(task_id))

    await eventually(begun)
    signer = Signer(KEY, "test")
    assert {signer.verify(token).user_id for token in installed.sandbox.principals} == {""}
    assert {signer.verify(token).service for token in installed.sandbox.principals} == {"task"}


async def test_a_session_is_created_once_however_often_it_is_asked_for(installed: Installed) -> None:  # F11, C1
    task_id = await installed.create(hold_prompt=True)
    await installed.until(task_id, IDLE)
    request = sessions_pb2.CreateSessionRequest(request_id=new_id(), task_id=task_id, name="Second")

    first, second = await asyncio.gather(*(installed.sessions.CreateSession(request) for _ in range(2)))
    later = await installed.sessions.CreateSession(request)

    assert first == second == later
    assert len(installed.sandbox.of(sandbox_pb2.OpenSessionRequest, session_id=first.session.id)) == 1
    assert len((await installed.room.read(task_id)).sessions) == 2


async def test_a_retry_opens_every_session_and_an_agent_that_fails_fails_only_its_own(installed: Installed) -> None:
    task_id = await installed.create(hold_prompt=True)
    await installed.until(task_id, IDLE)
    request = sessions_pb2.CreateSessionRequest(request_id=new_id(), task_id=task_id)
    second = (await installed.sessions.CreateSession(request)).session
    installed.sandbox.refusals["StartTurn"] = Refusal(grpc.StatusCode.FAILED_PRECONDITION, "the machine is gone")
    await installed.send(task_id)
    await installed.until(task_id, ERROR)
    installed.sandbox.refusals["OpenSession"] = Refusal(
        grpc.StatusCode.FAILED_PRECONDITION, "no such agent", session_id=second.id
    )

    await installed.tasks.RetryTask(tasks_pb2.RetryTaskRequest(request_id=new_id(), task_id=task_id))

    task = await installed.until(task_id, IDLE)
    assert [one.status for one in task.sessions] == [
        sessions_pb2.SESSION_STATUS_IDLE,
        sessions_pb2.SESSION_STATUS_ERROR,
    ]
    assert task.sessions[1].status_reason == "no such agent"


async def test_a_kill_stops_the_agents_first_and_says_why_it_takes_long(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:  # F29
    monkeypatch.setattr("services.task.workflows._PAUSES_SECONDS", (1.0, 5.0))
    task_id = await installed.create()
    task = await installed.until(task_id, RUNNING)
    installed.sandbox.refusals["DestroySandbox"] = Refusal(grpc.StatusCode.INTERNAL, "the host is on fire", times=1)
    await installed.tasks.KillTask(tasks_pb2.KillTaskRequest(request_id=new_id(), task_id=task_id))

    async def said() -> bool:
        return "the host is on fire" in (await installed.room.read(task_id)).task.status_reason

    await eventually(said)
    killed = await installed.until(task_id, tasks_pb2.TASK_STATUS_KILLED)

    calls = [
        type(one).__name__
        for one in installed.sandbox.calls
        if getattr(one, "session_id", "") == installed.of(task_id)
        or getattr(one, "sandbox_id", "") == task.task.active_sandbox_id
    ]
    assert calls[-3:] == ["CloseSessionRequest", "DestroySandboxRequest", "DestroySandboxRequest"]
    assert (killed.row.workflow, killed.task.active_sandbox_id) == ("", "")


async def test_a_deleted_task_leaves_nothing_and_is_pushed_up_as_deleted(installed: Installed) -> None:
    task_id = await installed.create()
    task = await installed.until(task_id, RUNNING)

    for _ in range(2):
        await installed.internal.DeleteTask(internal.DeleteTaskRequest(task_id=task_id))

    async def tombstone() -> bool:
        return any(one.deleted and one.id == task_id for one in installed.repository.pushed)

    await eventually(tombstone)
    assert installed.sandbox.of(sandbox_pb2.DestroySandboxRequest, sandbox_id=task.task.active_sandbox_id)
    assert await installed.room.database.read(installed.room.store.find, task_id) is None
    gone = await failure(installed.internal.DeleteTask(internal.DeleteTaskRequest(task_id=task_id)))
    assert gone.code == grpc.StatusCode.NOT_FOUND


async def test_the_sweep_fails_a_provisioning_whose_workflow_died_and_ends_an_ending_anew(
    installed: Installed,
) -> None:  # F4, issue item 4
    provisioning, killing = await installed.create(hold_prompt=True), await installed.create(hold_prompt=True)
    for task_id in (provisioning, killing):
        await installed.until(task_id, IDLE)

    def leave(status: Status, workflow: str) -> Callable[[OpenTask], None]:
        def change(task: OpenTask) -> None:
            task.task.status = status
            task.row.workflow, task.row.workflow_time = workflow, 1.0
            task.change()

        return change

    await installed.room.change(provisioning, leave(tasks_pb2.TASK_STATUS_PROVISIONING, "provision"))
    await installed.room.change(killing, leave(tasks_pb2.TASK_STATUS_KILLING, "end"))

    await installed.sweep.run()

    failed = await installed.until(provisioning, ERROR)
    assert failed.task.status_reason == "provisioning failed: its workflow ended in SUCCESS"
    await installed.until(killing, tasks_pb2.TASK_STATUS_KILLED)


async def test_the_sweep_ends_a_turn_whose_end_was_lost_whatever_becomes_of_its_other_looks(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:  # issue item 4
    async def fail(_: Sweep) -> None:
        raise RuntimeError("the workflow engine is broken")

    monkeypatch.setattr(Sweep, "revive_workflows", fail)
    task_id = await installed.create()
    await installed.until(task_id, RUNNING)

    def long_ago(task: OpenTask) -> None:
        task.sessions[0].status_time.FromSeconds(1_000_000)
        task.change_session(task.sessions[0])

    await installed.room.change(task_id, long_ago)
    await installed.sweep.run()

    failed = await installed.until(task_id, ERROR)
    assert failed.task.status_reason == "nothing was heard of the turn for 4 hours"

    async def cancelled() -> list[Any]:
        return installed.sandbox.of(sandbox_pb2.CancelTurnRequest, session_id=installed.of(task_id))

    assert [one.turn for one in await eventually(cancelled)] == [1]


async def test_workflows_that_ended_a_week_ago_are_forgotten(installed: Installed) -> None:  # F17
    task_id = await installed.create(hold_prompt=True)
    await installed.until(task_id, IDLE)
    other = await installed.create(hold_prompt=True)
    await installed.until(other, IDLE)
    names = [f"provision/{one}/1" for one in (task_id, other)]

    async def over() -> bool:
        return not any(one.live for one in (await installed.sweep.engine.outcomes(names)).values())

    await eventually(over)
    with closing(sqlite3.connect(installed.folder / "workflows.sqlite", timeout=10)) as connection, connection:
        connection.execute("UPDATE workflow_status SET completed_at = 1000 WHERE workflow_uuid = ?", (names[0],))

    await installed.sweep.forget_old()

    assert list(await installed.sweep.engine.outcomes(names)) == [names[1]]


async def test_a_turn_is_followed_through_the_servers_to_the_next_message(installed: Installed) -> None:
    task_id = await installed.create()
    await installed.until(task_id, RUNNING)
    await installed.send(task_id, queue=True)

    end = AgentSession(
        session_id=installed.of(task_id),
        task_id=task_id,
        status=sessions_pb2.SESSION_STATUS_IDLE,
        turn=1,
        revision=1,
        head_commit="b" * 40,
    )
    assert await installed.push(end) == []

    async def turns() -> bool:
        begun = installed.sandbox.of(sandbox_pb2.StartTurnRequest, session_id=installed.of(task_id))
        return [one.turn for one in begun] == [1, 2]

    await eventually(turns)
    assert (await installed.room.read(task_id)).task.head_commit == "b" * 40
