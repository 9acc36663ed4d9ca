"""The whole task service between its neighbours: durable work, deliveries, and the sweep."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from branchline.v1 import common_pb2, errors_pb2, sessions_pb2, sessions_pb2_grpc, tasks_pb2, tasks_pb2_grpc
from branchline.v1.common_pb2 import Attachment, BlobReference, Failure, Prompt
from branchline.v1.sessions_pb2 import WHEN_BUSY_QUEUE, QueuedMessage
from branchline.v1.tasks_pb2 import BranchChoice, Task
from branchline.v1.transcripts_pb2 import TranscriptEntry
from branchline_internal.repository.v1 import repository_pb2, repository_pb2_grpc
from branchline_internal.sandbox.v1 import sandbox_pb2, sandbox_pb2_grpc
from branchline_internal.sandbox.v1.sandbox_pb2 import AgentSession
from branchline_internal.spine.v1 import push_pb2, push_pb2_grpc
from branchline_internal.task.v1 import task_pb2 as internal
from branchline_internal.task.v1 import task_pb2_grpc
from google.protobuf.message import Message

from services.runtime.client import open_channel
from services.runtime.config import Secret
from services.runtime.database import open_database
from services.runtime.principal import Signer
from services.runtime.service import Service
from services.runtime.spine.outbox import OutboxRow
from services.task.git import CONFLICT, OWN
from services.task.machine import Deadlines
from services.task.open_task import OpenTask
from services.task.service import TaskConfig, build
from services.task.standing import FAILED, IDLE, KILLED, KILLING, PROVISIONING, RUNNING, TURN_FAILED, Standing
from services.task.sweep import Sweep
from services.task.workflows import workflow_id
from tests.support.databases import break_inserts, mend_inserts, migrated, tamper_with
from tests.support.stack import eventually, failure
from tests.unit.task.neighbours import Refusal, RepositoryNeighbour, SandboxNeighbour
from tests.unit.task.room import Room, birth, entry_of, new_id, request_id, sandbox_of

KEY = "k" * 40
PENDING, AT_REST, BROKEN = (
    sessions_pb2.SESSION_STATE_PENDING,
    sessions_pb2.SESSION_STATE_IDLE,
    sessions_pb2.SESSION_STATE_FAILED,
)


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
    url: str
    stuck: str
    """A task that was found in provisioning, without a workflow, when the service started."""

    async def create(self, **fields: Any) -> str:
        task_id = new_id("task")
        await self.internal.CreateTask(birth(task_id, **fields))
        return task_id

    async def until(self, task_id: str, standing: Standing, seconds: float = 30.0) -> OpenTask:
        async def look() -> OpenTask | None:
            found = await self.room.read(task_id)
            return found if found.standing == standing else None

        return await eventually(look, seconds)

    async def opened(self, task_id: str, session_id: str, state: int = AT_REST) -> sessions_pb2.Session:
        """Wait until a session stands somewhere."""

        async def look() -> sessions_pb2.Session | None:
            session = (await self.room.read(task_id)).session(session_id)
            return session if session.state == state else None

        return await eventually(look)

    async def begun(self, session_id: str, most: int = 0) -> list[Any]:
        """Wait until more than so many turns were given to the sandbox."""

        async def look() -> list[Any] | None:
            found = self.sandbox.of(sandbox_pb2.StartTurnRequest, session_id=session_id)
            return found if len(found) > most else None

        return await eventually(look)

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
        given: dict[str, Any] = {"prompt": Prompt(text="go on"), "session_id": self.of(task_id), **fields}
        request = sessions_pb2.SendMessageRequest(request_id=request_id(), task_id=task_id, **given)
        return await self.sessions.SendMessage(request)


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
    url = migrated("task", folder, lasts=True)
    stuck = await _leave_stuck(url)
    config = TaskConfig(
        addresses=addresses,
        data_dir=folder,
        database_url=Secret(url),
        signing_key=Secret(KEY),
        drain_seconds=0.2,
        deadlines=Deadlines(patience_seconds=0.5),
    )
    service = build(config)
    sweep = sweep_of(service)
    channel = open_channel("task", addresses["task"], Signer(KEY, "gateway"))
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
            url,
            stuck,
        )
    await channel.close()
    for server in servers:
        await server.stop(0)


async def _leave_stuck(url: str) -> str:
    """Leave a task behind as a crash of a release before might have: provisioning, and nothing that does it."""
    database = open_database(url)
    await database.start()
    room = Room(database)
    task_id = new_id("task")
    await database.write(room.store.create, birth(task_id, hold_prompt=True), "provision")

    def leave(task: OpenTask) -> None:
        task.move(PROVISIONING)
        task.row.workflow_time = 1.0

    await room.change(task_id, leave)
    await database.close()
    tamper_with(url, "DELETE FROM outbox")
    return task_id


@pytest_asyncio.fixture(autouse=True)
async def well(installed: Installed) -> AsyncGenerator[None, None]:
    """Have the neighbours well again after each test."""
    yield
    installed.sandbox.refusals.clear()
    installed.sandbox.hanging.clear()
    installed.sandbox.output = installed.sandbox.errors = ""
    installed.sandbox.exit_code = 0


async def test_a_task_is_provisioned_and_given_its_prompt(installed: Installed) -> None:
    task_id = await installed.create()

    await installed.until(task_id, RUNNING)

    begun = await installed.begun(installed.of(task_id))
    assert [(one.turn, one.prompt.text) for one in begun] == [(1, "do it")]

    async def said() -> TranscriptEntry | None:
        found = [one for one in installed.repository.pushed if one.id == f"ent_{task_id.removeprefix('task_')}_0"]
        return TranscriptEntry.FromString(found[0].state.value) if found else None

    entry = await eventually(said)
    assert (entry.user_message.text, entry.actor.user_id, entry.position) == ("do it", "usr_ann", 1)


async def test_a_stuck_task_is_found_at_the_start_and_provisioned(installed: Installed) -> None:  # F4, issue item 4
    found = await installed.until(installed.stuck, IDLE)

    assert (found.row.workflow, found.row.provisioned) == ("", True)


async def test_the_branch_that_the_tree_stands_on_becomes_the_tasks_and_is_pushed_up(installed: Installed) -> None:
    # F12
    installed.sandbox.output = "feat/a-task-7\n"

    task_id = await installed.create(hold_prompt=True, branch=BranchChoice(base="develop"))
    task = await installed.until(task_id, IDLE)

    async def pushed() -> list[str]:
        entries = [one for one in installed.repository.pushed if one.id == task_id]
        return [Task.FromString(one.state.value).branch for one in entries if b"a-task-7" in one.state.value]

    assert await eventually(pushed)
    assert (task.task.branch, task.row.branch_choice) == ("feat/a-task-7", OWN)
    sandbox_id = task.task.active_sandbox_id
    (execution,) = installed.sandbox.of(sandbox_pb2.ExecuteRequest, sandbox_id=sandbox_id)
    assert (execution.environment["CHOICE"], execution.environment["BASE"]) == ("derived", "develop")
    assert execution.timeout_seconds == 600


@pytest.mark.parametrize(
    ("choice", "word"),
    [(BranchChoice(new_branch="feat/a-task"), "new"), (BranchChoice(existing_branch="feat/a-task"), "existing")],
)
async def test_a_branch_that_is_not_what_the_remote_has_ends_before_the_agent_runs(
    installed: Installed, choice: BranchChoice, word: str
) -> None:
    installed.sandbox.errors, installed.sandbox.exit_code = "the remote says no", CONFLICT

    task_id = await installed.create(branch=choice)

    task = await installed.until(task_id, FAILED)
    why = task.task.failure
    assert (why.reason, why.retryable) == (common_pb2.FAILURE_REASON_BRANCH_CONFLICT, False)
    (execution,) = installed.sandbox.of(sandbox_pb2.ExecuteRequest, sandbox_id=task.task.active_sandbox_id)
    assert execution.environment["CHOICE"] == word
    assert not installed.sandbox.of(sandbox_pb2.OpenSessionRequest, session_id=installed.of(task_id))
    assert task.sessions[0].state == PENDING


@pytest.mark.parametrize(
    ("method", "refusal", "reason", "retryable"),
    [
        (
            "CreateSandbox",
            Refusal(grpc.StatusCode.FAILED_PRECONDITION, "no", errors_pb2.ERROR_REASON_SANDBOX_NOT_STARTED),
            common_pb2.FAILURE_REASON_SANDBOX_FAILED,
            True,
        ),
        (
            "CreateSandbox",
            Refusal(grpc.StatusCode.INVALID_ARGUMENT, "no", errors_pb2.ERROR_REASON_PROVIDER_UNKNOWN),
            common_pb2.FAILURE_REASON_SANDBOX_FAILED,
            False,
        ),
        (
            "CreateSandbox",
            Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "no", errors_pb2.ERROR_REASON_QUOTA_EXCEEDED),
            common_pb2.FAILURE_REASON_PROVIDER_CAPACITY,
            True,
        ),
        ("PutFile", Refusal(grpc.StatusCode.INTERNAL, "no"), common_pb2.FAILURE_REASON_INTERNAL, True),
        ("Execute", Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, "no"), common_pb2.FAILURE_REASON_TIMED_OUT, True),
        (
            "OpenSession",
            Refusal(grpc.StatusCode.INVALID_ARGUMENT, "no", errors_pb2.ERROR_REASON_AGENT_UNKNOWN),
            common_pb2.FAILURE_REASON_AGENT_UNKNOWN,
            False,
        ),
        ("OpenSession", Refusal(grpc.StatusCode.INTERNAL, "no"), common_pb2.FAILURE_REASON_AGENT_NOT_STARTED, True),
    ],
)
async def test_whatever_fails_in_provisioning_the_task_says_why(
    installed: Installed, method: str, refusal: Refusal, reason: int, retryable: bool
) -> None:
    installed.sandbox.refusals[method] = refusal

    task_id = await installed.create(hold_prompt=True)

    task = await installed.until(task_id, FAILED)
    assert (task.task.failure.reason, task.task.failure.retryable) == (reason, retryable)
    assert task.task.failure.message.endswith(": no")
    assert (task.row.workflow, task.row.provisioned) == ("", False)


async def test_a_stage_that_fails_says_so_with_the_outputs_tail_and_can_be_retried(
    installed: Installed,
) -> None:  # F4
    installed.sandbox.output, installed.sandbox.exit_code = "x" * 9000 + "\nno such remote", 1
    task_id = await installed.create(hold_prompt=True)
    failed = await installed.until(task_id, FAILED)
    installed.sandbox.output, installed.sandbox.exit_code = "", 0

    await installed.tasks.RetryProvisioning(
        tasks_pb2.RetryProvisioningRequest(request_id=request_id(), task_id=task_id)
    )

    why = failed.task.failure
    assert why.message == "the repository could not be checked out: no such remote"
    assert why.output_tail.endswith("xx\nno such remote")
    assert len(why.output_tail) == 8192
    assert not (await installed.until(task_id, IDLE)).task.HasField("failure")


async def test_a_step_that_raises_again_and_again_fails_the_task(installed: Installed) -> None:  # F4
    task_id = new_id("task")
    break_inserts(installed.url, "transcript_entries", "task_id", task_id, "the disk is haunted")

    await installed.internal.CreateTask(birth(task_id))
    failed = await installed.until(task_id, FAILED)
    mend_inserts(installed.url)

    assert failed.task.failure.message.splitlines()[0] == "provisioning failed: the disk is haunted"
    assert failed.task.failure.reason == common_pb2.FAILURE_REASON_INTERNAL
    assert failed.row.workflow == ""


async def test_a_turn_that_the_sandbox_refuses_fails_with_its_reason(installed: Installed) -> None:
    # issue item 4
    task_id = await installed.create(hold_prompt=True)
    await installed.until(task_id, IDLE)
    installed.sandbox.refusals["StartTurn"] = Refusal(
        grpc.StatusCode.FAILED_PRECONDITION, "the machine is gone", errors_pb2.ERROR_REASON_SANDBOX_GONE
    )

    await installed.send(task_id)

    failed = await installed.until(task_id, TURN_FAILED)
    why = Failure(reason=common_pb2.FAILURE_REASON_SANDBOX_LOST, message="the machine is gone", retryable=True)
    assert (failed.task.failure, failed.sessions[0].failure) == (why, why)


async def test_a_turn_whose_delivery_was_parked_fails_and_is_not_begun_later(installed: Installed) -> None:
    task_id = await installed.create(hold_prompt=True)
    await installed.until(task_id, IDLE)
    installed.sandbox.hanging.add(installed.of(task_id))
    await installed.send(task_id)
    parked = f"UPDATE outbox SET parked_reason = 'too slow' WHERE entity_id = '{installed.of(task_id)}'"
    tamper_with(installed.url, f"{parked} AND destination = 'sandbox'")

    await installed.sweep.end_refused_turns()

    failed = await installed.until(task_id, TURN_FAILED)
    assert failed.task.failure.message == "the sandbox did not take the message: too slow"
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
    signer = Signer(KEY, "sandbox")
    assert {signer.verify(token).user_id for token in installed.sandbox.principals} == {""}
    assert {signer.verify(token).service for token in installed.sandbox.principals} == {"task"}


async def provisioned(installed: Installed) -> str:
    task_id = await installed.create(hold_prompt=True)
    await installed.until(task_id, IDLE)
    return task_id


async def create_session(installed: Installed, task_id: str) -> str:
    request = sessions_pb2.CreateSessionRequest(request_id=request_id(), task_id=task_id)
    return (await installed.sessions.CreateSession(request)).session.id


async def test_a_session_is_created_once_however_often_it_is_asked_for(installed: Installed) -> None:  # F11, C1
    task_id = await provisioned(installed)
    request = sessions_pb2.CreateSessionRequest(request_id=request_id(), task_id=task_id, display_name="Second")

    first, second = await asyncio.gather(*(installed.sessions.CreateSession(request) for _ in range(2)))
    later = await installed.sessions.CreateSession(request)

    assert first == second == later
    assert first.session.state == PENDING
    await installed.opened(task_id, first.session.id)
    assert len(installed.sandbox.of(sandbox_pb2.OpenSessionRequest, session_id=first.session.id)) == 1
    assert len((await installed.room.read(task_id)).sessions) == 2


@pytest.mark.parametrize(
    ("refusal", "reason"),
    [
        (
            Refusal(grpc.StatusCode.FAILED_PRECONDITION, "no key", errors_pb2.ERROR_REASON_AGENT_NOT_STARTED),
            common_pb2.FAILURE_REASON_AGENT_NOT_STARTED,
        ),
        (Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, "no key"), common_pb2.FAILURE_REASON_TIMED_OUT),
    ],
)
async def test_a_session_whose_agent_does_not_start_has_failed_and_says_why(
    installed: Installed, refusal: Refusal, reason: int
) -> None:
    task_id = await provisioned(installed)
    installed.sandbox.refusals["OpenSession"] = refusal

    session_id = await create_session(installed, task_id)

    failed = await installed.opened(task_id, session_id, BROKEN)
    assert (failed.failure.reason, failed.failure.message) == (reason, "the agent could not be started: no key")
    assert (await installed.room.read(task_id)).standing == IDLE


async def test_a_start_that_fails_in_passing_is_tried_again(installed: Installed) -> None:
    task_id = await provisioned(installed)
    installed.sandbox.refusals["OpenSession"] = Refusal(grpc.StatusCode.INTERNAL, "no luck", times=2)

    session_id = await create_session(installed, task_id)

    await installed.opened(task_id, session_id)
    assert len(installed.sandbox.of(sandbox_pb2.OpenSessionRequest, session_id=session_id)) == 3


async def test_a_message_that_comes_while_the_agent_starts_is_given_to_it_behind_that(installed: Installed) -> None:
    task_id = await provisioned(installed)
    installed.sandbox.refusals["OpenSession"] = Refusal(grpc.StatusCode.INTERNAL, "not yet", times=2)
    session_id = await create_session(installed, task_id)

    await installed.send(task_id, session_id=session_id)

    await installed.begun(session_id)
    calls = [type(one).__name__ for one in installed.sandbox.calls if getattr(one, "session_id", "") == session_id]
    assert calls == ["OpenSessionRequest"] * 3 + ["StartTurnRequest"]


async def test_a_session_that_the_sandbox_does_not_know_is_opened_by_its_next_message(installed: Installed) -> None:
    task_id = await provisioned(installed)
    session_id = await create_session(installed, task_id)
    await installed.opened(task_id, session_id)
    installed.sandbox.refusals["StartTurn"] = Refusal(grpc.StatusCode.NOT_FOUND, "there is no session", times=1)

    await installed.send(task_id, session_id=session_id)

    await installed.begun(session_id, most=1)
    calls = [type(one).__name__ for one in installed.sandbox.calls if getattr(one, "session_id", "") == session_id]
    assert calls == ["OpenSessionRequest", "StartTurnRequest", "OpenSessionRequest", "StartTurnRequest"]
    assert (await installed.room.read(task_id)).standing == RUNNING


async def test_a_session_whose_opening_was_parked_has_failed(installed: Installed) -> None:
    task_id = await provisioned(installed)
    installed.sandbox.refusals["OpenSession"] = Refusal(grpc.StatusCode.INTERNAL, "no luck")
    session_id = await create_session(installed, task_id)
    parked = f"UPDATE outbox SET parked_reason = 'no luck' WHERE entity_id = '{session_id}'"
    tamper_with(installed.url, f"{parked} AND destination = 'sandbox'")

    await installed.sweep.end_refused_turns()

    failed = await installed.opened(task_id, session_id, BROKEN)
    assert failed.failure.message == "the agent could not be started: no luck"


async def test_a_retry_opens_every_session_and_an_agent_that_fails_fails_only_its_own(installed: Installed) -> None:
    task_id = await provisioned(installed)
    second, third = await create_session(installed, task_id), await create_session(installed, task_id)
    for session_id in (second, third):
        await installed.opened(task_id, session_id)
    await installed.send(task_id)
    await installed.push(sandbox_of(await installed.room.read(task_id), 6, "power"))
    await installed.until(task_id, FAILED)
    installed.sandbox.refusals["OpenSession"] = Refusal(
        grpc.StatusCode.FAILED_PRECONDITION, "no such agent", session_id=second
    )

    await installed.tasks.RetryProvisioning(
        tasks_pb2.RetryProvisioningRequest(request_id=request_id(), task_id=task_id)
    )

    task = await installed.until(task_id, IDLE)
    assert [one.state for one in task.sessions] == [BROKEN, BROKEN, AT_REST]
    assert task.sessions[1].failure.message == "the agent could not be started: no such agent"
    # The first has its agent again; its turn that the sandbox's end cut off can be retried.
    retry = sessions_pb2.RetryTurnRequest(task_id=task_id, session_id=installed.of(task_id), turn=1)
    assert (await installed.sessions.RetryTurn(retry)).session.turn == 2


async def test_a_session_that_is_closed_while_a_retry_opens_it_stays_closed_and_keeps_no_agent(
    installed: Installed,
) -> None:
    task_id = await provisioned(installed)
    second = await create_session(installed, task_id)
    await installed.opened(task_id, second)
    await installed.push(sandbox_of(await installed.room.read(task_id), 6, "power"))
    await installed.until(task_id, FAILED)
    installed.sandbox.calls.clear()
    away = installed.sandbox.refusals["OpenSession"] = Refusal(grpc.StatusCode.UNAVAILABLE, "away", session_id=second)

    def told() -> list[str]:
        return [type(one).__name__ for one in installed.sandbox.calls if getattr(one, "session_id", "") == second]

    async def told_last(name: str) -> bool:
        return told()[-1:] == [name]

    await installed.tasks.RetryProvisioning(
        tasks_pb2.RetryProvisioningRequest(request_id=request_id(), task_id=task_id)
    )
    await eventually(lambda: told_last("OpenSessionRequest"))
    await installed.sessions.CloseSession(sessions_pb2.CloseSessionRequest(task_id=task_id, session_id=second))
    away.times = 0
    task = await installed.until(task_id, IDLE)

    assert [one.state for one in task.sessions] == [AT_REST, sessions_pb2.SESSION_STATE_CLOSED]
    assert await eventually(lambda: told_last("CloseSessionRequest"))


async def test_blobs_are_named_upward_before_a_message_is_sent(installed: Installed) -> None:
    task_id = await provisioned(installed)
    named = Prompt(text="look", attachments=[Attachment(blob=BlobReference(blob_id="blob_1"))])

    sent = await installed.send(task_id, prompt=named)

    blob = BlobReference(blob_id="blob_1", display_name="blob_1.png", size_bytes=3)
    assert sent.entry.user_message.attachments[0].blob == blob
    (begun,) = await installed.begun(installed.of(task_id))
    assert begun.prompt == sent.entry.user_message
    claims = [one for one in installed.repository.calls if isinstance(one, repository_pb2.ClaimBlobsRequest)]
    assert claims[-1] == repository_pb2.ClaimBlobsRequest(task_id=task_id, blob_ids=["blob_1"])
    gone = Prompt(text="look", attachments=[Attachment(blob=BlobReference(blob_id="blob_gone"))])
    refused = await failure(installed.send(task_id, prompt=gone, when_busy=WHEN_BUSY_QUEUE))
    assert refused.code == grpc.StatusCode.NOT_FOUND
    assert await installed.room.queued(task_id) == []


async def test_what_sandboxes_ask_about_blobs_goes_up(installed: Installed) -> None:
    task_id = await provisioned(installed)

    fetched = await installed.internal.FetchBlob(internal.FetchBlobRequest(task_id=task_id, blob_id="b", offset=1))
    stored = await installed.internal.StoreBlob(
        internal.StoreBlobRequest(
            task_id=task_id,
            display_name="a.txt",
            media_type="text/plain",
            size_bytes=4,
            sha256=hashlib.sha256(b"four").hexdigest(),
            data=b"four",
        )
    )

    assert fetched.data == b"bc"
    assert (stored.blob.blob_id, stored.blob.media_type, stored.blob.size_bytes) == ("blob_new", "text/plain", 4)
    unknown = await failure(installed.internal.FetchBlob(internal.FetchBlobRequest(task_id="task_none", blob_id="b")))
    assert unknown.code == grpc.StatusCode.NOT_FOUND


async def test_what_waited_in_provisioning_is_sent_where_the_prompt_is_held(installed: Installed) -> None:
    installed.sandbox.refusals["CreateSandbox"] = Refusal(grpc.StatusCode.INTERNAL, "not yet")
    task_id = await installed.create(hold_prompt=True)
    await installed.until(task_id, FAILED)
    queued = await installed.send(task_id, prompt=Prompt(text="later"), when_busy=WHEN_BUSY_QUEUE)
    installed.sandbox.refusals.clear()

    await installed.tasks.RetryProvisioning(tasks_pb2.RetryProvisioningRequest(task_id=task_id))

    await installed.until(task_id, RUNNING)
    assert [one.prompt.text for one in await installed.begun(installed.of(task_id))] == ["later"]

    async def left() -> bool:
        found = [one for one in installed.repository.pushed if one.id == queued.queued_message.id]
        return bool(found) and found[-1].deleted

    await eventually(left)
    last = [one for one in installed.repository.pushed if one.id == queued.queued_message.id][-1]
    assert QueuedMessage.FromString(last.state.value).session_id == installed.of(task_id)


async def test_a_kill_stops_the_agents_first_and_says_why_it_takes_long(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:  # F29
    monkeypatch.setattr("services.task.workflows._PAUSES_SECONDS", (1.0, 5.0))
    task_id = await installed.create()
    task = await installed.until(task_id, RUNNING)
    installed.sandbox.refusals["DestroySandbox"] = Refusal(grpc.StatusCode.INTERNAL, "the host is on fire", times=1)
    await installed.tasks.KillTask(tasks_pb2.KillTaskRequest(request_id=request_id(), task_id=task_id))

    async def said() -> bool:
        return "the host is on fire" in (await installed.room.read(task_id)).task.failure.message

    await eventually(said)
    killed = await installed.until(task_id, KILLED)

    calls = [
        type(one).__name__
        for one in installed.sandbox.calls
        if getattr(one, "session_id", "") == installed.of(task_id)
        or getattr(one, "sandbox_id", "") == task.task.active_sandbox_id
    ]
    assert calls[-3:] == ["CloseSessionRequest", "DestroySandboxRequest", "DestroySandboxRequest"]
    assert (killed.row.workflow, killed.task.active_sandbox_id) == ("", "")
    assert not killed.task.HasField("failure")


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

    def leave(standing: Standing, workflow: str) -> Callable[[OpenTask], None]:
        def change(task: OpenTask) -> None:
            task.task.state, task.task.activity = standing
            task.row.workflow, task.row.workflow_time = workflow, 1.0
            task.change()

        return change

    await installed.room.change(provisioning, leave(PROVISIONING, "provision"))
    await installed.room.change(killing, leave(KILLING, "end"))

    async def over() -> bool:
        ids = [workflow_id(await installed.room.read(one)) for one in (provisioning, killing)]
        return not any(one.live for one in (await installed.sweep.engine.outcomes(ids)).values())

    await eventually(over)  # a workflow has a last step after the one that tells how it went
    await installed.sweep.run()

    failed = await installed.until(provisioning, FAILED)
    assert failed.task.failure.message == "provisioning failed: its workflow ended in SUCCESS"
    await installed.until(killing, KILLED)


async def test_the_sweep_ends_a_turn_whose_end_was_lost_whatever_becomes_of_its_other_looks(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:  # issue item 4
    async def fail(_: Sweep) -> None:
        raise RuntimeError("the workflow engine is broken")

    monkeypatch.setattr(Sweep, "revive_workflows", fail)
    task_id = await installed.create()
    await installed.until(task_id, RUNNING)

    def long_ago(task: OpenTask) -> None:
        task.sessions[0].state_time.FromSeconds(1_000_000)
        task.change_session(task.sessions[0])

    await installed.room.change(task_id, long_ago)
    await installed.sweep.run()

    failed = await installed.until(task_id, TURN_FAILED)
    assert failed.task.failure.message == "nothing was heard of the turn for 4 hours"
    assert failed.task.failure.reason == common_pb2.FAILURE_REASON_TIMED_OUT

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
    change = "UPDATE {} SET completed_at = 1000 WHERE workflow_uuid = :name"
    if installed.url.startswith("sqlite:///"):
        beside = installed.url.replace("task.sqlite", "workflows.sqlite")
        tamper_with(beside, change.format("workflow_status"), name=names[0])
    else:
        tamper_with(installed.url, change.format("dbos.workflow_status"), name=names[0])

    await installed.sweep.forget_old()

    assert list(await installed.sweep.engine.outcomes(names)) == [names[1]]


async def test_a_turn_is_followed_through_the_servers_to_the_next_message(installed: Installed) -> None:
    task_id = await installed.create()
    await installed.until(task_id, RUNNING)
    await installed.send(task_id, when_busy=WHEN_BUSY_QUEUE)

    end = AgentSession(
        session_id=installed.of(task_id),
        task_id=task_id,
        state=sessions_pb2.SESSION_STATE_IDLE,
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
