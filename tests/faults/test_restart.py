"""What a kill leaves: nothing lost, nothing doubled, nothing stuck."""

import asyncio
import uuid
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc
import pytest
from branchline.v1 import history_pb2, repositories_pb2, sessions_pb2, tasks_pb2
from branchline.v1.common_pb2 import FAILURE_REASON_SANDBOX_LOST, Prompt
from branchline.v1.history_pb2 import EventKind
from branchline.v1.sessions_pb2 import Session
from branchline.v1.tasks_pb2 import Task
from branchline.v1.transcripts_pb2 import TranscriptEntry

from tests.support.client import Client
from tests.support.databases import empty
from tests.support.process import SERVICES, Processes, one_process, own_processes
from tests.support.stack import eventually, git, make_remote

IDLE, FAILED = tasks_pb2.TASK_ACTIVITY_IDLE, tasks_pb2.TASK_ACTIVITY_FAILED
COUNT = "\n".join(f"say word{number}\nwait 0.2" for number in range(1, 16))
COUNTED = "".join(f"word{number}\n" for number in range(1, 16)) + "Done.\n"


@asynccontextmanager
async def up(folder: Path) -> AsyncGenerator[Processes, None]:
    processes = one_process(folder)
    await processes.start("up", "up")
    try:
        yield processes
    finally:
        await processes.stop()


async def create_task(client: Client, organization_id: str, folder: Path, text: str, *, hold: bool = True) -> Task:
    remote = make_remote(folder / "remotes")
    added = await client.repositories.CreateRepository(
        repositories_pb2.CreateRepositoryRequest(
            request_id=str(uuid.uuid4()), organization_id=organization_id, remote_url=f"file://{remote}"
        )
    )
    made = await client.tasks.CreateTask(
        tasks_pb2.CreateTaskRequest(
            request_id=str(uuid.uuid4()),
            repository_id=added.repository.id,
            prompt=Prompt(text=text),
            hold_prompt=hold,
        )
    )
    return made.task


async def first_session(client: Client, task_id: str) -> Session:
    answer = await client.sessions.ListSessions(sessions_pb2.ListSessionsRequest(task_id=task_id), timeout=5)
    return answer.sessions[0]


async def until(
    client: Client,
    task_id: str,
    activity: tasks_pb2.TaskActivity.ValueType,
    *,
    turn: int = 0,
    seconds: float = 60,
) -> Task:
    """Wait until a task is active so, and its first session is so many turns old."""

    async def look() -> Task | None:
        try:
            answer = await client.tasks.GetTask(tasks_pb2.GetTaskRequest(task_id=task_id), timeout=5)
            reached = answer.task.activity == activity and (await first_session(client, task_id)).turn >= turn
        except grpc.aio.AioRpcError:
            return None
        return answer.task if reached else None

    return await eventually(look, seconds)


async def send(client: Client, task: Task, text: str) -> None:
    session = await first_session(client, task.id)
    await client.sessions.SendMessage(
        sessions_pb2.SendMessageRequest(
            request_id=str(uuid.uuid4()), task_id=task.id, session_id=session.id, prompt=Prompt(text=text)
        )
    )


async def transcript(client: Client, task: Task) -> list[TranscriptEntry]:
    """Return the transcript of a task's first session."""
    session = await first_session(client, task.id)
    answer = await client.sessions.ListTranscriptEntries(
        sessions_pb2.ListTranscriptEntriesRequest(task_id=task.id, session_id=session.id, page_size=1000)
    )
    return list(answer.entries)


async def said(client: Client, task: Task) -> str:
    """Return all that the agent of a task's first session has said."""
    return "".join(entry.agent_message.text for entry in await transcript(client, task))


async def some_words(client: Client, task: Task) -> bool:
    return "word2" in await said(client, task)


async def history_kinds(client: Client, organization_id: str, task: Task) -> list[str]:
    answer = await client.history.ListHistoryEvents(
        history_pb2.ListHistoryEventsRequest(
            organization_id=organization_id,
            filter=history_pb2.HistoryFilter(task_ids=[task.id]),
            order_by="sequence",
            page_size=1000,
        )
    )
    sequences = [event.sequence for event in answer.events]
    assert sequences == sorted(set(sequences))
    return [EventKind.Name(event.kind) for event in answer.events]


async def test_a_kill_in_mid_turn_loses_and_doubles_no_word(tmp_path: Path) -> None:  # OPS-3, SES-7
    async with up(tmp_path) as processes, AsyncExitStack() as stack:
        client, organization_id = await processes.client(stack)
        task = await until(client, (await create_task(client, organization_id, tmp_path, "go")).id, IDLE)
        await send(client, task, COUNT)
        await eventually(lambda: some_words(client, task))

        await processes.kill("up")
        await processes.start("up", "up")
        client, organization_id = await processes.client(stack)
        await until(client, task.id, IDLE, turn=1)

        assert await said(client, task) == COUNTED

        async def finished() -> bool:
            return (await history_kinds(client, organization_id, task)).count("EVENT_KIND_AGENT_FINISHED") == 1

        assert await eventually(finished)


async def test_a_kill_of_agents_too_ends_the_turn_with_a_reason_and_a_way_on(tmp_path: Path) -> None:  # OPS-3, SES-8
    async with up(tmp_path) as processes, AsyncExitStack() as stack:
        client, organization_id = await processes.client(stack)
        task = await until(client, (await create_task(client, organization_id, tmp_path, "go")).id, IDLE)
        await send(client, task, f"write kept.txt: kept\n{COUNT}")
        await eventually(lambda: some_words(client, task))

        await processes.kill("up")
        processes.kill_sandboxes()
        await processes.start("up", "up")
        client, _ = await processes.client(stack)
        failed = await until(client, task.id, FAILED)
        await send(client, task, "run cat kept.txt\ncommit Keep\npush")
        await until(client, task.id, IDLE, turn=2)

        assert failed.failure.reason == FAILURE_REASON_SANDBOX_LOST
        assert "send a message to go on" in failed.failure.message
        entries = await transcript(client, task)
        assert any(output.text.strip() == "kept" for entry in entries for output in entry.tool_call.outputs)
        assert all(entry.HasField("end_time") for entry in entries)
        assert [entry.position for entry in entries] == list(range(1, len(entries) + 1))


@pytest.mark.parametrize("delay", [0.0, 0.3, 0.8])
async def test_a_kill_while_provisioning_leaves_no_task_stuck_and_no_second_sandbox(
    tmp_path: Path, delay: float
) -> None:  # TSK-2, TSK-8, SBX-5
    async with up(tmp_path) as processes, AsyncExitStack() as stack:
        client, organization_id = await processes.client(stack)
        task = await create_task(client, organization_id, tmp_path, "write a.txt: a\ncommit A\npush", hold=False)
        await asyncio.sleep(delay)

        await processes.kill("up")
        await processes.start("up", "up")
        client, _ = await processes.client(stack)
        await until(client, task.id, IDLE, turn=1)

        answer = await client.tasks.ListSandboxes(tasks_pb2.ListSandboxesRequest(task_id=task.id))
        assert len(answer.sandboxes) == 1
        assert git("show", f"{task.branch}:a.txt", cwd=next((tmp_path / "remotes").glob("*.git"))) == "a"
        prompts = [entry.user_message.text for entry in await transcript(client, task)]
        assert prompts.count("write a.txt: a\ncommit A\npush") == 1


async def test_an_orphaned_sandbox_is_stopped_at_the_next_start_and_its_files_are_kept(tmp_path: Path) -> None:  # SBX-5
    async with up(tmp_path) as processes, AsyncExitStack() as stack:
        client, organization_id = await processes.client(stack)
        task = await create_task(client, organization_id, tmp_path, "write work.txt: done", hold=False)
        await until(client, task.id, IDLE, turn=1)
        await processes.kill("up")
        empty(processes.database("sandbox"))  # the service has forgotten its sandboxes
        assert processes.sandbox_processes()

        await processes.start("up", "up")
        await processes.client(stack)

        assert not processes.sandbox_processes()
        assert [file.read_text() for file in (tmp_path / "data" / "sandbox").rglob("work.txt")] == ["done\n"]
        assert "sandbox unknown to the database" in (tmp_path / "up.log").read_text()


async def test_services_that_run_apart_are_killed_one_by_one_under_work(tmp_path: Path) -> None:  # OPS-2, OPS-3
    processes = own_processes(tmp_path)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(processes.stop)
        for name in SERVICES:
            await processes.start(name, "serve", name)
        await processes.start("bootstrap", "bootstrap", "--agent", "mock")
        client, organization_id = await processes.client(stack)
        task = await until(client, (await create_task(client, organization_id, tmp_path, "go")).id, IDLE)
        await send(client, task, COUNT)

        for name in SERVICES:
            await processes.kill(name)
            await processes.start(name, "serve", name)
        client, organization_id = await processes.client(stack)
        await until(client, task.id, IDLE, turn=1)

        async def told() -> bool:
            return await said(client, task) == COUNTED

        assert await eventually(told)

        async def recorded() -> bool:
            return (await history_kinds(client, organization_id, task)).count("EVENT_KIND_AGENT_FINISHED") == 1

        assert await eventually(recorded)


async def test_a_command_waits_for_a_coordinator_that_is_being_born(tmp_path: Path) -> None:  # ORG-2, OPS-3
    processes = own_processes(tmp_path)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(processes.stop)
        for name in SERVICES:
            await processes.start(name, "serve", name)
        await processes.start("bootstrap", "bootstrap", "--agent", "mock")
        client, organization_id = await processes.client(stack)
        await processes.kill("repository")
        remote = make_remote(tmp_path / "remotes")
        added = await client.repositories.CreateRepository(
            repositories_pb2.CreateRepositoryRequest(
                request_id=str(uuid.uuid4()), organization_id=organization_id, remote_url=f"file://{remote}"
            )
        )
        creating = asyncio.ensure_future(
            client.tasks.CreateTask(
                tasks_pb2.CreateTaskRequest(
                    request_id=str(uuid.uuid4()),
                    repository_id=added.repository.id,
                    prompt=Prompt(text="go"),
                    hold_prompt=True,
                )
            )
        )
        await processes.start("repository", "serve", "repository")

        assert (await creating).task.repository_id == added.repository.id
