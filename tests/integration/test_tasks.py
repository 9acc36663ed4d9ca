"""A task from its creation to its end, through the gateway alone."""

import asyncio
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path

import grpc
from branchline.v1 import history_pb2, repositories_pb2, sandboxes_pb2, sessions_pb2, tasks_pb2, users_pb2
from branchline.v1 import vocabulary_pb2 as words
from branchline.v1.users_pb2 import UserPreferences

from tests.support.stack import Stack, eventually, failure, git, make_remote, request_id

IDLE, ERROR = tasks_pb2.TASK_STATUS_IDLE, tasks_pb2.TASK_STATUS_ERROR

_OF_A_TASK = {"sandboxes": "id", "agent_sessions": "session_id"}
"""Tables of the sandbox service that name the task, with their keys."""


async def test_an_agent_changes_a_file_commits_and_pushes(stack: Stack) -> None:  # TSK-2, SES-3, SES-4, SBX-2
    remote = make_remote(stack.remotes)
    repository_id = await stack.add_repository(remote)
    task = await stack.create_task(repository_id, "write a.txt: alpha\nrun cat a.txt\ncommit Add a\npush")

    await stack.until(task.id, IDLE, turn=1)

    async def with_commit():
        row = await stack.task(task.id)
        return row if row.head_commit else None

    row = await eventually(with_commit)
    assert git("ls-remote", str(remote), f"refs/heads/{task.branch}").split()[0] == row.head_commit
    assert git("show", f"{task.branch}:a.txt", cwd=remote) == "alpha"
    entries = await stack.transcript(row)
    assert [entry.position for entry in entries] == list(range(1, len(entries) + 1))
    assert entries[0].kind == sessions_pb2.TRANSCRIPT_ENTRY_KIND_USER_MESSAGE
    tools = [entry for entry in entries if entry.kind == sessions_pb2.TRANSCRIPT_ENTRY_KIND_TOOL_CALL]
    assert tools[1].output.strip() == "alpha"
    assert {entry.state for entry in tools} == {"completed"}
    assert not any(entry.streaming for entry in entries)


async def test_a_task_continues_a_branch_that_the_remote_has(stack: Stack) -> None:  # REP-2
    remote = make_remote(stack.remotes)
    git("branch", "topic", "main", cwd=remote)
    task = await stack.ready_task(await stack.add_repository(remote), branch="topic")

    answer = await stack.client.sandboxes.RunCommand(
        sandboxes_pb2.RunCommandRequest(task_id=task.id, command=["git", "status", "-sb"])
    )

    assert answer.stdout.startswith("## topic...origin/topic")


async def test_a_task_starts_on_an_empty_repository(stack: Stack) -> None:  # TSK-2
    remote = stack.remotes / "empty.git"
    git("init", "--quiet", "--bare", "--initial-branch=main", str(remote))
    task = await stack.ready_task(await stack.add_repository(remote), branch="start")

    await stack.send(task, "write a.txt: first\ncommit First\npush")
    await stack.until(task.id, IDLE, turn=1)

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
        return await stack.create_task(repository_id, branch="same", hold_prompt=True)

    outcomes = await asyncio.gather(*(create() for _ in range(8)), return_exceptions=True)

    made = [outcome for outcome in outcomes if isinstance(outcome, tasks_pb2.Task)]
    refused = [outcome for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError)]
    assert len(made) == 1
    assert {error.code() for error in refused} == {grpc.StatusCode.ALREADY_EXISTS}


async def test_a_taken_branch_names_its_holder_and_is_free_after_a_kill(stack: Stack) -> None:  # REP-3, TSK-7
    repository_id = await stack.add_repository()
    holder = await stack.ready_task(repository_id, branch="mine")

    refused = await failure(stack.create_task(repository_id, branch="mine"))
    await stack.client.tasks.KillTask(tasks_pb2.KillTaskRequest(request_id=request_id(), task_id=holder.id))
    await stack.until(holder.id, tasks_pb2.TASK_STATUS_KILLED)
    again = await stack.create_task(repository_id, branch="mine", hold_prompt=True)

    assert (refused.code, refused.reason) == (grpc.StatusCode.ALREADY_EXISTS, "BRANCH_TAKEN")
    assert refused.resource == refused.metadata["task_id"] == holder.id
    assert again.id != holder.id


async def test_a_killed_task_leaves_no_sandbox(stack: Stack) -> None:  # TSK-7, SBX-1
    task = await stack.ready_task()

    await stack.client.tasks.KillTask(tasks_pb2.KillTaskRequest(request_id=request_id(), task_id=task.id))
    await stack.until(task.id, tasks_pb2.TASK_STATUS_KILLED)

    async def destroyed():
        answer = await stack.client.tasks.GetTask(tasks_pb2.GetTaskRequest(task_id=task.id))
        return [one.status for one in answer.sandboxes] == [sandboxes_pb2.SANDBOX_STATUS_DESTROYED]

    assert await eventually(destroyed)
    assert not (stack.installation.settings.data_dir / "sandbox/local" / task.active_sandbox_id).exists()


async def test_an_archived_task_is_hidden_and_cannot_be_spoken_to(stack: Stack) -> None:  # REP-8, TSK-1
    task = await stack.ready_task()

    await stack.client.tasks.ArchiveTask(tasks_pb2.ArchiveTaskRequest(request_id=request_id(), task_id=task.id))
    await stack.until(task.id, tasks_pb2.TASK_STATUS_ARCHIVED)
    refused = await failure(stack.send(task, "say hello"))
    listed = await stack.client.tasks.ListTasks(
        tasks_pb2.ListTasksRequest(organization_id=stack.organization_id, repository_id=task.repository_id)
    )

    assert (refused.code, refused.metadata["status"]) == (grpc.StatusCode.FAILED_PRECONDITION, "archived")
    assert not listed.tasks


async def test_commands_and_files_work_in_the_sandbox(stack: Stack) -> None:  # SBX-6
    task = await stack.ready_task()
    box = stack.client.sandboxes

    await box.WriteFile(sandboxes_pb2.WriteFileRequest(task_id=task.id, path="d/n.txt", content=b"one\n"))
    read = await box.ReadFile(sandboxes_pb2.ReadFileRequest(task_id=task.id, path="d/n.txt"))
    listed = await box.ListFiles(sandboxes_pb2.ListFilesRequest(task_id=task.id, path="d"))
    failed = await box.RunCommand(
        sandboxes_pb2.RunCommandRequest(task_id=task.id, command=["sh", "-c", "echo out; echo err >&2; exit 3"])
    )
    slow = await box.RunCommand(
        sandboxes_pb2.RunCommandRequest(task_id=task.id, command=["sleep", "30"], timeout_seconds=1)
    )
    await box.DeleteFile(sandboxes_pb2.DeleteFileRequest(task_id=task.id, path="d/n.txt"))
    gone = await failure(box.ReadFile(sandboxes_pb2.ReadFileRequest(task_id=task.id, path="d/n.txt")))
    outside = await failure(box.ReadFile(sandboxes_pb2.ReadFileRequest(task_id=task.id, path="../.git-credentials")))

    assert read.content == b"one\n"
    assert [(file.name, file.size_bytes) for file in listed.files] == [("n.txt", 4)]
    assert (failed.exit_code, failed.stdout, failed.stderr) == (3, "out\n", "err\n")
    assert slow.timed_out
    assert gone.code == grpc.StatusCode.NOT_FOUND
    assert (outside.code, outside.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["path"])


async def test_files_are_looked_at_and_moved(stack: Stack) -> None:  # SBX-6
    task = await stack.ready_task()
    box = stack.client.sandboxes
    for path in ("a.txt", "b.txt"):
        await box.WriteFile(sandboxes_pb2.WriteFileRequest(task_id=task.id, path=path, content=path.encode()))

    known = await box.StatFile(sandboxes_pb2.StatFileRequest(task_id=task.id, path="a.txt"))
    await box.MoveFile(sandboxes_pb2.MoveFileRequest(task_id=task.id, path="a.txt", new_path="c.txt"))
    moved = await box.ReadFile(sandboxes_pb2.ReadFileRequest(task_id=task.id, path="c.txt"))
    gone = await failure(box.StatFile(sandboxes_pb2.StatFileRequest(task_id=task.id, path="a.txt")))
    missing = await failure(
        box.MoveFile(sandboxes_pb2.MoveFileRequest(task_id=task.id, path="a.txt", new_path="d.txt"))
    )
    taken = await failure(box.MoveFile(sandboxes_pb2.MoveFileRequest(task_id=task.id, path="c.txt", new_path="b.txt")))
    outside = await failure(
        box.MoveFile(sandboxes_pb2.MoveFileRequest(task_id=task.id, path="c.txt", new_path="../c.txt"))
    )

    assert (known.file.name, known.file.size_bytes, known.file.directory) == ("a.txt", 5, False)
    assert moved.content == b"a.txt"
    assert (gone.code, missing.code) == (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.NOT_FOUND)
    assert taken.code == grpc.StatusCode.INVALID_ARGUMENT
    assert (outside.code, outside.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["new_path"])


async def test_files_of_any_time_are_listed_and_a_directory_is_not_read(stack: Stack) -> None:  # SBX-6
    task, box = await stack.ready_task(), stack.client.sandboxes
    script = "mkdir d; touch -d '2020-01-01 00:00:00 UTC' d/whole; touch -d @400000000000 d/far"
    await box.RunCommand(sandboxes_pb2.RunCommandRequest(task_id=task.id, command=["sh", "-c", script]))

    listed = await box.ListFiles(sandboxes_pb2.ListFilesRequest(task_id=task.id, path="d"))
    known = await box.StatFile(sandboxes_pb2.StatFileRequest(task_id=task.id, path="d/whole"))
    refused = await failure(box.ReadFile(sandboxes_pb2.ReadFileRequest(task_id=task.id, path="d")))

    assert {"far", "whole"} <= {file.name for file in listed.files}
    assert known.file.modify_time.seconds == 1_577_836_800
    assert (refused.code, refused.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["path"])


async def test_a_commands_output_comes_while_it_runs(stack: Stack) -> None:  # SBX-6
    task = await stack.ready_task()
    script = "echo first; echo wrong >&2; until [ -e go ]; do sleep 0.05; done; echo last; exit 4"
    answers = stack.client.sandboxes.StreamCommand(
        sandboxes_pb2.StreamCommandRequest(task_id=task.id, command=["sh", "-c", script])
    )

    early = [await anext(aiter(answers)), await anext(aiter(answers))]
    await stack.client.sandboxes.WriteFile(sandboxes_pb2.WriteFileRequest(task_id=task.id, path="go", content=b"1"))
    late = [answer async for answer in answers]

    assert {answer.WhichOneof("event"): answer.stdout or answer.stderr for answer in early} == {
        "stdout": b"first\n",
        "stderr": b"wrong\n",
    }
    assert late[0].stdout == b"last\n"
    assert (late[-1].end.exit_code, late[-1].end.timed_out) == (4, False)


async def test_a_command_that_nobody_listens_to_is_stopped_with_its_children(stack: Stack) -> None:  # SBX-6
    task = await stack.ready_task()
    script = "(while :; do date +%N > beat; sleep 0.05; done) & echo up; wait"
    answers = stack.client.sandboxes.StreamCommand(
        sandboxes_pb2.StreamCommandRequest(task_id=task.id, command=["sh", "-c", script])
    )
    assert (await anext(aiter(answers))).stdout == b"up\n"

    async def beat() -> bytes:
        return (
            await stack.client.sandboxes.ReadFile(sandboxes_pb2.ReadFileRequest(task_id=task.id, path="beat"))
        ).content

    answers.cancel()

    async def still() -> bool:
        before = await beat()
        await asyncio.sleep(0.3)
        return await beat() == before

    assert await eventually(still)


async def test_a_command_that_cannot_start_says_so(stack: Stack) -> None:  # SBX-6
    task = await stack.ready_task()

    missing = await failure(
        stack.client.sandboxes.RunCommand(sandboxes_pb2.RunCommandRequest(task_id=task.id, command=["nonesuch"]))
    )

    assert (missing.code, missing.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "COMMAND_NOT_STARTED")


async def test_a_sandbox_says_which_agents_it_knows(stack: Stack) -> None:  # SBX-7
    task = await stack.ready_task()

    answer = await stack.client.sandboxes.ListAgents(sandboxes_pb2.ListAgentsRequest(task_id=task.id))

    by_name = {agent.name: agent for agent in answer.agents}
    assert {"claude", "codex", "mock"} <= by_name.keys()
    assert "permissions" in by_name["claude"].capabilities


async def test_a_sandbox_sees_neither_the_backend_nor_its_secrets(stack: Stack) -> None:  # SBX-2
    task = await stack.ready_task()
    data = stack.installation.settings.data_dir.absolute()
    command = ["sh", "-c", f"ls {data}/task {data}/signing.key; env | grep -i signing"]

    answer = await stack.client.sandboxes.RunCommand(sandboxes_pb2.RunCommandRequest(task_id=task.id, command=command))
    workbench = await stack.client.tasks.GetTask(tasks_pb2.GetTaskRequest(task_id=task.id))

    assert workbench.sandboxes[0].isolation == "bubblewrap"
    assert answer.stdout == ""


async def test_every_command_and_status_change_is_in_the_history_once(stack: Stack) -> None:  # HIS-1, HIS-2, HIS-3
    task = await stack.ready_task()
    await stack.send(task, "say hello")
    await stack.until(task.id, IDLE, turn=1)

    async def feed():
        answer = await stack.client.history.ListHistory(
            history_pb2.ListHistoryRequest(
                organization_id=stack.organization_id, task_id=task.id, oldest_first=True, page_size=1000
            )
        )
        return answer.events if len(answer.events) >= 8 else None

    events = await eventually(feed)
    assert events[0].kind == words.EVENT_KIND_TASK_CREATED
    assert Counter(event.kind for event in events) == {
        words.EVENT_KIND_TASK_CREATED: 1,
        words.EVENT_KIND_TASK_STATUS_CHANGED: 4,
        words.EVENT_KIND_MESSAGE_SENT: 1,
        words.EVENT_KIND_AGENT_FINISHED: 1,
        words.EVENT_KIND_BRANCH_MOVED: 1,
    }
    changes = [(event.details["from"], event.details["to"]) for event in events if event.details]
    assert changes == [("pending", "provisioning"), ("provisioning", "idle"), ("idle", "running"), ("running", "idle")]
    sequences = [event.sequence for event in events]
    assert sequences == sorted(set(sequences))


async def test_history_pages_both_ways(stack: Stack) -> None:  # HIS-3
    await stack.ready_task()

    async def pages(*, oldest_first: bool) -> list[int]:
        found: list[int] = []
        token = ""
        while True:
            answer = await stack.client.history.ListHistory(
                history_pb2.ListHistoryRequest(
                    organization_id=stack.organization_id, oldest_first=oldest_first, page_size=2, page_token=token
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
        sessions_pb2.CreateSessionRequest(request_id=request_id(), task_id=task.id, model="swift")
    )
    session_id = made.session.id
    renamed = await sessions.RenameSession(
        sessions_pb2.RenameSessionRequest(
            request_id=request_id(), task_id=task.id, session_id=session_id, name="Review"
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
    await stack.until(task.id, IDLE)

    async def answered():
        entries = await stack.transcript(task, session_id)
        return [entry for entry in entries if "yes" in entry.text and not entry.user_id]

    assert await eventually(answered)
    assert (made.session.name, renamed.session.name) == ("Session 2", "Review")
    assert refused.reason == "SESSION_CLOSED"


async def test_a_session_whose_caller_gave_up_waiting_is_made_once_when_it_is_asked_for_again(stack: Stack) -> None:
    task = await stack.ready_task()
    request = sessions_pb2.CreateSessionRequest(request_id=request_id(), task_id=task.id, name="Second")
    given_up: list[str] = []

    for seconds in (0.1, 0.2, 0.3, 0.4):
        try:
            await stack.client.sessions.CreateSession(request, timeout=seconds)
        except grpc.aio.AioRpcError as error:
            given_up.append(error.code().name)
    made = await stack.client.sessions.CreateSession(request)
    await stack.send(task, "say yes", session_id=made.session.id)

    async def answered() -> bool:
        return any("yes" in entry.text and not entry.user_id for entry in await stack.transcript(task, made.session.id))

    await eventually(answered)
    assert set(given_up) == {"DEADLINE_EXCEEDED"}
    assert len((await stack.task(task.id)).sessions) == 2


async def test_the_next_call_goes_by_the_preferences_that_were_just_changed(stack: Stack) -> None:  # F29
    repository_id = await stack.add_repository()
    client, _ = await stack.new_member()
    async with client:
        for agent in ("mock", "other", "mock", "another"):
            wanted = UserPreferences(default_agent=agent)
            await client.users.WhoAmI(users_pb2.WhoAmIRequest())  # the gateway knows the caller as before
            await client.users.UpdatePreferences(
                users_pb2.UpdatePreferencesRequest(request_id=request_id(), preferences=wanted)
            )
            seen = await client.users.WhoAmI(users_pb2.WhoAmIRequest())
            made = await client.tasks.CreateTask(
                tasks_pb2.CreateTaskRequest(
                    request_id=request_id(), repository_id=repository_id, text="x", sandbox_provider="nowhere"
                )
            )
            assert seen.user.preferences == wanted
            assert made.task.sessions[0].agent == agent


async def test_a_deleted_task_leaves_nothing_in_the_sandbox_service(stack: Stack) -> None:
    repository_id = await stack.add_repository()
    task = await stack.ready_task(repository_id)
    await stack.send(task, "write a.txt: x")
    await stack.until(task.id, IDLE, turn=1)
    folder = stack.installation.settings.data_dir / "sandbox"
    held = [row for table in _OF_A_TASK for row in _rows_of(folder / "sandbox.sqlite", table, task.id)]
    assert len(held) == len(_OF_A_TASK)

    await stack.client.repositories.DeleteRepository(
        repositories_pb2.DeleteRepositoryRequest(request_id=request_id(), repository_id=repository_id)
    )

    async def gone() -> bool:
        return not any(_rows_of(folder / "sandbox.sqlite", table, task.id) for table in _OF_A_TASK)

    assert await eventually(gone)
    assert not (folder / "local" / held[0]).exists()


def _rows_of(path: Path, table: str, task_id: str) -> list[str]:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        query = f"SELECT {_OF_A_TASK[table]} FROM {table} WHERE task_id = ?"
        return [str(row[0]) for row in database.execute(query, (task_id,))]
