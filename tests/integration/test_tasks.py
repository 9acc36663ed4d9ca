"""A task from its creation to its end, through the gateway alone."""

import asyncio
from collections import Counter

import grpc
from branchline.v1 import (
    agents_pb2,
    files_pb2,
    history_pb2,
    processes_pb2,
    repositories_pb2,
    sandboxes_pb2,
    sessions_pb2,
    tasks_pb2,
    transcripts_pb2,
    users_pb2,
)
from branchline.v1.common_pb2 import FAILURE_REASON_PROGRAM_NOT_FOUND, Prompt
from branchline.v1.history_pb2 import HistoryFilter
from branchline.v1.tasks_pb2 import BranchChoice
from branchline.v1.users_pb2 import UserPreferences
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from tests.support.databases import look_into
from tests.support.processes import execute
from tests.support.stack import Stack, eventually, failure, git, make_remote, request_id

IDLE = tasks_pb2.TASK_ACTIVITY_IDLE

_OF_A_TASK = {"sandboxes": "id", "agent_sessions": "session_id"}
"""Tables of the sandbox service that name the task, with their keys."""


async def test_an_agent_changes_a_file_commits_and_pushes(stack: Stack) -> None:  # TSK-2, SES-3, SES-4, SBX-2
    remote = make_remote(stack.remotes)
    repository_id = await stack.add_repository(remote)
    task = await stack.create_task(repository_id, "write a.txt: alpha\nrun cat a.txt\ncommit Add a\npush")

    await stack.until(task.id, activity=IDLE, turn=1)

    async def with_commit():
        row = await stack.task(task.id)
        return row if row.head_commit else None

    row = await eventually(with_commit)
    assert git("ls-remote", str(remote), f"refs/heads/{task.branch}").split()[0] == row.head_commit
    assert git("show", f"{task.branch}:a.txt", cwd=remote) == "alpha"
    entries = await stack.transcript(row)
    assert [entry.position for entry in entries] == list(range(1, len(entries) + 1))
    assert entries[0].WhichOneof("content") == "user_message"
    tools = [entry.tool_call for entry in entries if entry.HasField("tool_call")]
    assert tools[1].outputs[0].text.strip() == "alpha"
    assert {tool.state for tool in tools} == {transcripts_pb2.TOOL_CALL_STATE_SUCCEEDED}
    assert entries[-1].turn_end.reason == transcripts_pb2.STOP_REASON_END_TURN
    assert entries[-1].turn_end.head_commit == row.head_commit
    assert all(entry.HasField("end_time") for entry in entries)


async def test_a_task_continues_a_branch_that_the_remote_has(stack: Stack) -> None:  # REP-2
    remote = make_remote(stack.remotes)
    git("branch", "topic", "main", cwd=remote)
    task = await stack.ready_task(await stack.add_repository(remote), branch=BranchChoice(existing_branch="topic"))

    answer = await execute(stack.client, task.id, "git", "status", "-sb")

    assert answer.stdout.startswith("## topic...origin/topic")


async def test_a_task_starts_on_an_empty_repository(stack: Stack) -> None:  # TSK-2
    remote = stack.remotes / "empty.git"
    git("init", "--quiet", "--bare", "--initial-branch=main", str(remote))
    task = await stack.ready_task(await stack.add_repository(remote), branch=BranchChoice(new_branch="start"))

    await stack.send(task, "write a.txt: first\ncommit First\npush")
    await stack.until(task.id, activity=IDLE, turn=1)

    assert git("show", "start:a.txt", cwd=remote) == "first"


async def test_title_and_branch_are_derived_and_made_unique(stack: Stack) -> None:  # REP-3
    repository_id = await stack.add_repository()
    first = await stack.create_task(repository_id, "Fix the login loop", hold_prompt=True)
    second = await stack.create_task(repository_id, "Fix the login loop", hold_prompt=True)

    assert (first.title, first.branch) == ("Fix the login loop", "fix/fix-the-login-loop")
    assert second.branch == "fix/fix-the-login-loop-2"


async def test_one_live_task_holds_a_branch_under_concurrency(stack: Stack) -> None:  # REP-4
    repository_id = await stack.add_repository()

    async def create():
        return await stack.create_task(repository_id, branch=BranchChoice(new_branch="same"), hold_prompt=True)

    outcomes = await asyncio.gather(*(create() for _ in range(8)), return_exceptions=True)

    made = [outcome for outcome in outcomes if isinstance(outcome, tasks_pb2.Task)]
    refused = [outcome for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError)]
    assert len(made) == 1
    assert {error.code() for error in refused} == {grpc.StatusCode.ALREADY_EXISTS}


async def test_a_taken_branch_names_its_holder_and_is_free_after_a_kill(stack: Stack) -> None:  # REP-3, TSK-7
    repository_id = await stack.add_repository()
    holder = await stack.ready_task(repository_id, branch=BranchChoice(new_branch="mine"))

    refused = await failure(stack.create_task(repository_id, branch=BranchChoice(new_branch="mine")))
    await stack.client.tasks.KillTask(tasks_pb2.KillTaskRequest(request_id=request_id(), task_id=holder.id))
    await stack.until(holder.id, state=tasks_pb2.TASK_STATE_KILLED)
    again = await stack.create_task(repository_id, branch=BranchChoice(new_branch="mine"), hold_prompt=True)

    assert (refused.code, refused.reason) == (grpc.StatusCode.ALREADY_EXISTS, "BRANCH_TAKEN")
    assert refused.resource == refused.metadata["task_id"] == holder.id
    assert again.id != holder.id


async def test_a_killed_task_leaves_no_sandbox(stack: Stack) -> None:  # TSK-7, SBX-1
    task = await stack.ready_task()

    await stack.client.tasks.KillTask(tasks_pb2.KillTaskRequest(request_id=request_id(), task_id=task.id))
    await stack.until(task.id, state=tasks_pb2.TASK_STATE_KILLED)

    async def destroyed():
        answer = await stack.client.tasks.ListSandboxes(tasks_pb2.ListSandboxesRequest(task_id=task.id))
        return [one.state for one in answer.sandboxes] == [sandboxes_pb2.SANDBOX_STATE_DESTROYED]

    assert await eventually(destroyed)
    assert not (stack.installation.settings.data_dir / "sandbox/local" / task.active_sandbox_id).exists()


async def test_an_archived_task_is_hidden_and_cannot_be_spoken_to(stack: Stack) -> None:  # REP-8, TSK-1
    task = await stack.ready_task()

    await stack.client.tasks.ArchiveTask(tasks_pb2.ArchiveTaskRequest(request_id=request_id(), task_id=task.id))
    await stack.until(task.id, state=tasks_pb2.TASK_STATE_ARCHIVED)
    refused = await failure(stack.send(task, "say hello"))
    listed = await stack.client.tasks.ListTasks(
        tasks_pb2.ListTasksRequest(
            organization_id=stack.organization_id, filter=tasks_pb2.TaskFilter(repository_ids=[task.repository_id])
        )
    )

    assert (refused.code, refused.metadata["state"]) == (grpc.StatusCode.FAILED_PRECONDITION, "archived")
    assert not listed.tasks


async def test_commands_and_files_work_in_the_sandbox(stack: Stack) -> None:  # SBX-6
    task = await stack.ready_task()
    box = stack.client.files

    await box.WriteFile(files_pb2.WriteFileRequest(task_id=task.id, path="d/n.txt", content=b"one\n"))
    read = await box.ReadFile(files_pb2.ReadFileRequest(task_id=task.id, path="d/n.txt"))
    listed = await box.ListFiles(files_pb2.ListFilesRequest(task_id=task.id, path="d"))
    failed = await execute(stack.client, task.id, "sh", "-c", "echo out; echo err >&2; exit 3")
    slow = await execute(stack.client, task.id, "sleep", "30", timeout=Duration(seconds=1))
    await box.DeleteFile(files_pb2.DeleteFileRequest(task_id=task.id, path="d/n.txt"))
    gone = await failure(box.ReadFile(files_pb2.ReadFileRequest(task_id=task.id, path="d/n.txt")))
    outside = await failure(box.ReadFile(files_pb2.ReadFileRequest(task_id=task.id, path="../.git-credentials")))

    assert read.content == b"one\n"
    assert [(file.path, file.size_bytes) for file in listed.files] == [("d/n.txt", 4)]
    assert (failed.end.exit_code, failed.stdout, failed.stderr) == (3, "out\n", "err\n")
    assert slow.end.timed_out
    assert gone.code == grpc.StatusCode.NOT_FOUND
    assert (outside.code, outside.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["path"])


async def test_files_are_looked_at_and_moved(stack: Stack) -> None:  # SBX-6
    task = await stack.ready_task()
    box = stack.client.files
    for path in ("a.txt", "b.txt"):
        await box.WriteFile(files_pb2.WriteFileRequest(task_id=task.id, path=path, content=path.encode()))

    known = await box.GetFile(files_pb2.GetFileRequest(task_id=task.id, path="a.txt"))
    await box.MoveFile(files_pb2.MoveFileRequest(task_id=task.id, path="a.txt", new_path="c.txt"))
    moved = await box.ReadFile(files_pb2.ReadFileRequest(task_id=task.id, path="c.txt"))
    gone = await failure(box.GetFile(files_pb2.GetFileRequest(task_id=task.id, path="a.txt")))
    missing = await failure(box.MoveFile(files_pb2.MoveFileRequest(task_id=task.id, path="a.txt", new_path="d.txt")))
    taken = await failure(box.MoveFile(files_pb2.MoveFileRequest(task_id=task.id, path="c.txt", new_path="b.txt")))
    outside = await failure(box.MoveFile(files_pb2.MoveFileRequest(task_id=task.id, path="c.txt", new_path="../c.txt")))

    assert (known.file.path, known.file.size_bytes, known.file.kind) == ("a.txt", 5, files_pb2.FILE_KIND_FILE)
    assert moved.content == b"a.txt"
    assert (gone.code, missing.code) == (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.NOT_FOUND)
    assert (taken.code, taken.reason) == (grpc.StatusCode.ALREADY_EXISTS, "FILE_EXISTS")
    assert (outside.code, outside.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["new_path"])


async def test_files_of_any_time_are_listed_and_a_directory_is_not_read(stack: Stack) -> None:  # SBX-6
    task, box = await stack.ready_task(), stack.client.files
    script = "mkdir d; touch -d '2020-01-01 00:00:00 UTC' d/whole; touch -d @400000000000 d/far"
    await execute(stack.client, task.id, "sh", "-c", script)

    listed = await box.ListFiles(files_pb2.ListFilesRequest(task_id=task.id, path="d"))
    known = await box.GetFile(files_pb2.GetFileRequest(task_id=task.id, path="d/whole"))
    refused = await failure(box.ReadFile(files_pb2.ReadFileRequest(task_id=task.id, path="d")))

    assert {"d/far", "d/whole"} <= {file.path for file in listed.files}
    assert known.file.modify_time.seconds == 1_577_836_800
    assert (refused.code, refused.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["path"])


async def test_a_commands_output_comes_while_it_runs(stack: Stack) -> None:  # SBX-6
    task, processes = await stack.ready_task(), stack.client.processes
    script = "echo first; echo wrong >&2; until [ -e go ]; do sleep 0.05; done; echo last; exit 4"
    spec = processes_pb2.ProcessSpec(command=["sh", "-c", script])
    started = await processes.StartProcess(processes_pb2.StartProcessRequest(task_id=task.id, spec=spec))
    answers = processes.WatchProcess(processes_pb2.WatchProcessRequest(task_id=task.id, process_id=started.process.id))

    early = [await anext(aiter(answers)), await anext(aiter(answers))]
    await stack.client.files.WriteFile(files_pb2.WriteFileRequest(task_id=task.id, path="go", content=b"1"))
    late = [answer async for answer in answers]

    assert {answer.output.stream: answer.output.data for answer in early} == {
        processes_pb2.OUTPUT_STREAM_STDOUT: b"first\n",
        processes_pb2.OUTPUT_STREAM_STDERR: b"wrong\n",
    }
    assert late[0].output.data == b"last\n"
    assert (late[-1].end.exit_code, late[-1].end.timed_out) == (4, False)


async def test_a_process_that_stops_when_nobody_watches_is_stopped_with_its_children(stack: Stack) -> None:  # SBX-6
    task, processes = await stack.ready_task(), stack.client.processes
    spec = processes_pb2.ProcessSpec(
        command=["sh", "-c", "(while :; do date +%N > beat; sleep 0.05; done) & echo up; wait"],
        detach_behavior=processes_pb2.DETACH_BEHAVIOR_STOP,
    )
    started = await processes.StartProcess(processes_pb2.StartProcessRequest(task_id=task.id, spec=spec))
    answers = processes.WatchProcess(processes_pb2.WatchProcessRequest(task_id=task.id, process_id=started.process.id))
    assert (await anext(aiter(answers))).output.data == b"up\n"

    async def beat() -> bytes:
        return (await stack.client.files.ReadFile(files_pb2.ReadFileRequest(task_id=task.id, path="beat"))).content

    answers.cancel()

    async def still() -> bool:
        before = await beat()
        await asyncio.sleep(0.3)
        return await beat() == before

    assert await eventually(still)


async def test_a_command_that_cannot_start_says_so(stack: Stack) -> None:  # SBX-6
    missing = await execute(stack.client, (await stack.ready_task()).id, "nonesuch")

    assert missing.end.failure.reason == FAILURE_REASON_PROGRAM_NOT_FOUND


async def test_the_agents_of_an_organization_are_known_once_a_sandbox_told_them(stack: Stack) -> None:  # SBX-7
    await stack.ready_task()

    async def known() -> set[str]:
        request = agents_pb2.ListAgentsRequest(organization_id=stack.organization_id)
        return {agent.id for agent in (await stack.client.agents.ListAgents(request)).agents}

    assert {"claude", "codex", "mock"} <= await eventually(known)


async def test_nothing_that_is_told_of_a_task_shows_where_the_server_keeps_it(stack: Stack) -> None:
    task = await stack.ready_task()
    await stack.send(task, "write a.txt: one\nsay done")
    await stack.until(task.id, activity=IDLE, turn=1)
    listing = tasks_pb2.ListSandboxesRequest(task_id=task.id)
    entries = await stack.transcript(task)

    for entry in entries:
        if entry.HasField("tool_call"):
            entry.tool_call.ClearField("input")  # told as the agent gave it
    told: list[Message] = [
        await stack.task(task.id),
        *(await stack.client.tasks.ListSandboxes(listing)).sandboxes,
        *await stack.sessions(task.id),
        *entries,
    ]

    assert {one.DESCRIPTOR.name for one in told} == {"Task", "Sandbox", "Session", "TranscriptEntry"}
    assert any(entry.tool_call.locations for entry in entries)
    assert not [one for one in told if str(stack.installation.settings.data_dir).encode() in one.SerializeToString()]


async def test_a_sandbox_sees_neither_the_backend_nor_its_secrets(stack: Stack) -> None:  # SBX-2
    task = await stack.ready_task()
    data = stack.installation.settings.data_dir.absolute()
    command = ["sh", "-c", f"ls {data}/task {data}/signing.key; env | grep -i signing"]

    answer = await execute(stack.client, task.id, *command)
    listed = await stack.client.tasks.ListSandboxes(tasks_pb2.ListSandboxesRequest(task_id=task.id))

    assert listed.sandboxes[0].isolation == "bubblewrap"
    assert answer.stdout == ""


async def test_every_command_and_status_change_is_in_the_history_once(stack: Stack) -> None:  # HIS-1, HIS-2, HIS-3
    task = await stack.ready_task()
    await stack.send(task, "say hello")
    await stack.until(task.id, activity=IDLE, turn=1)

    async def feed():
        answer = await stack.client.history.ListHistoryEvents(
            history_pb2.ListHistoryEventsRequest(
                organization_id=stack.organization_id,
                filter=HistoryFilter(task_ids=[task.id]),
                order_by="sequence",
                page_size=1000,
            )
        )
        return answer.events if len(answer.events) >= 8 else None

    events = await eventually(feed)
    assert events[0].kind == history_pb2.EVENT_KIND_TASK_CREATED
    assert Counter(event.kind for event in events) == {
        history_pb2.EVENT_KIND_TASK_CREATED: 1,
        history_pb2.EVENT_KIND_TASK_STATE_CHANGED: 4,
        history_pb2.EVENT_KIND_MESSAGE_SENT: 1,
        history_pb2.EVENT_KIND_AGENT_FINISHED: 1,
        history_pb2.EVENT_KIND_BRANCH_MOVED: 1,
    }
    changes = [(event.details["from"], event.details["to"]) for event in events if "from" in event.details]
    assert changes == [("queued", "provisioning"), ("provisioning", "idle"), ("idle", "running"), ("running", "idle")]
    sequences = [event.sequence for event in events]
    assert sequences == sorted(set(sequences))


async def test_history_pages_both_ways(stack: Stack) -> None:  # HIS-3
    await stack.ready_task()

    async def pages(*, oldest_first: bool) -> list[int]:
        found: list[int] = []
        token = ""
        while True:
            answer = await stack.client.history.ListHistoryEvents(
                history_pb2.ListHistoryEventsRequest(
                    organization_id=stack.organization_id,
                    order_by="sequence" if oldest_first else "sequence desc",
                    page_size=2,
                    page_token=token,
                )
            )
            found += [event.sequence for event in answer.events]
            token = answer.next_page_token
            if not token or len(found) > 20:
                return found

    forward = await pages(oldest_first=True)
    backward = await pages(oldest_first=False)

    assert forward == sorted(set(forward))
    assert backward == sorted(set(backward), reverse=True)


async def test_sessions_are_created_renamed_closed_and_reopened(stack: Stack) -> None:  # SES-1
    task = await stack.ready_task()
    sessions = stack.client.sessions

    made = await sessions.CreateSession(
        sessions_pb2.CreateSessionRequest(
            request_id=request_id(), task_id=task.id, options=sessions_pb2.SessionOptions(model="swift")
        )
    )
    session_id = made.session.id
    renamed = await sessions.UpdateSession(
        sessions_pb2.UpdateSessionRequest(
            request_id=request_id(),
            session=sessions_pb2.Session(id=session_id, task_id=task.id, display_name="Review"),
            update_mask=FieldMask(paths=["display_name"]),
        )
    )
    await sessions.CloseSession(
        sessions_pb2.CloseSessionRequest(request_id=request_id(), task_id=task.id, session_id=session_id)
    )
    refused = await failure(stack.send(task, "say no", session_id=session_id))
    await sessions.ReopenSession(
        sessions_pb2.ReopenSessionRequest(request_id=request_id(), task_id=task.id, session_id=session_id)
    )
    await stack.send(task, "say yes", session_id=session_id)
    await stack.until(task.id, activity=IDLE)

    async def answered():
        return [entry for entry in await stack.transcript(task, session_id) if "yes" in entry.agent_message.text]

    assert await eventually(answered)
    assert (made.session.display_name, renamed.session.display_name) == ("Session 2", "Review")
    assert refused.reason == "SESSION_CLOSED"


async def test_the_next_call_goes_by_the_preferences_that_were_just_changed(stack: Stack) -> None:  # F29
    repository_id = await stack.add_repository()
    client, _ = await stack.new_member()
    async with client:
        for agent in ("mock", "claude", "mock", "codex"):
            wanted = UserPreferences(default_agent=agent)
            await client.users.GetCurrentUser(
                users_pb2.GetCurrentUserRequest()
            )  # the gateway knows the caller as before
            await client.users.UpdateUser(
                users_pb2.UpdateUserRequest(request_id=request_id(), user=users_pb2.User(preferences=wanted))
            )
            seen = await client.users.GetCurrentUser(users_pb2.GetCurrentUserRequest())
            made = await client.tasks.CreateTask(
                tasks_pb2.CreateTaskRequest(
                    request_id=request_id(),
                    repository_id=repository_id,
                    prompt=Prompt(text="x"),
                    validate_only=True,
                )
            )
            assert seen.user.preferences == wanted
            assert made.task.sessions[0].agent == agent


async def test_a_deleted_task_leaves_nothing_in_the_sandbox_service(stack: Stack) -> None:
    repository_id = await stack.add_repository()
    task = await stack.ready_task(repository_id)
    await stack.send(task, "write a.txt: x")
    await stack.until(task.id, activity=IDLE, turn=1)
    folder = stack.installation.settings.data_dir / "sandbox"
    held = [row for table in _OF_A_TASK for row in _rows_of(stack, table, task.id)]
    assert len(held) == len(_OF_A_TASK)

    await stack.client.repositories.DeleteRepository(
        repositories_pb2.DeleteRepositoryRequest(request_id=request_id(), repository_id=repository_id)
    )

    async def gone() -> bool:
        return not any(_rows_of(stack, table, task.id) for table in _OF_A_TASK)

    assert await eventually(gone)
    assert not (folder / "local" / held[0]).exists()


def _rows_of(stack: Stack, table: str, task_id: str) -> list[str]:
    query = f"SELECT {_OF_A_TASK[table]} FROM {table} WHERE task_id = :id"
    return [str(row[0]) for row in look_into(stack.database("sandbox"), query, id=task_id)]
