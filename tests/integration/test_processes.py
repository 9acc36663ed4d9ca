"""Processes and files of a task's sandbox, as clients of the gateway start, follow, write to and read them."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, cast

import grpc
import pytest
from branchline.v1 import files_pb2, organizations_pb2, processes_pb2, roles_pb2, sessions_pb2, tasks_pb2
from branchline.v1.common_pb2 import FAILURE_REASON_PROGRAM_NOT_FOUND, Consistency, Prompt
from branchline.v1.processes_pb2 import (
    PROCESS_STATE_ENDED,
    PROCESS_STATE_RUNNING,
    SIGNAL_INT,
    SIGNAL_KILL,
    Process,
    ProcessSpec,
    TerminalSize,
)
from branchline.v1.tasks_pb2 import Task
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from gateway.routes import ROUTES, SANDBOX
from tests.support.client import Client
from tests.support.processes import Seen, execute, follow, start
from tests.support.stack import Stack, eventually, failure, failure_of, request_id
from tests.support.views import View

TAIL_BYTES = 64 * 1024


async def known(client: Client, process: Process) -> Process:
    """Read a process from the index."""
    request = processes_pb2.GetProcessRequest(task_id=process.task_id, process_id=process.id)
    return (await client.processes.GetProcess(request)).process


async def until_known(client: Client, process: Process) -> Process:
    """Wait until the index knows that a process has ended."""

    async def look() -> Process | None:
        try:
            seen = await known(client, process)
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.NOT_FOUND:  # it is known a moment after it was started
                raise
            return None
        return seen if seen.state == PROCESS_STATE_ENDED else None

    return await eventually(look)


async def write(client: Client, process: Process, offset: int, data: bytes, *, close: bool = False) -> int:
    request = processes_pb2.WriteProcessInputRequest(
        task_id=process.task_id, process_id=process.id, offset=offset, data=data, close=close
    )
    return (await client.processes.WriteProcessInput(request)).offset


async def until_said(client: Client, process: Process, words: bytes) -> None:
    """Watch a process until it has said something."""
    request = processes_pb2.WatchProcessRequest(task_id=process.task_id, process_id=process.id)
    call, seen = client.processes.WatchProcess(request), Seen()
    async with asyncio.timeout(30):
        async for response in cast("Any", call):
            assert not seen.take(response), seen
            if words in seen.out:
                break
    call.cancel()


async def test_a_process_is_followed_from_any_offset_and_known_to_the_index_when_it_has_ended(stack: Stack) -> None:
    task = await stack.ready_task()
    script = "printf 0123456789; printf oh >&2; exit 3"

    process = await start(stack.client, task.id, "sh", "-c", script, environment={"SECRET": "hidden"})
    seen = await follow(stack.client, process)
    later = [await follow(stack.client, process, offset) for offset in (4, 12, -2)]
    kept = await until_known(stack.client, process)

    assert (seen.stdout, seen.stderr, seen.offset, seen.end.exit_code) == ("0123456789", "oh", 12, 3)
    assert [one.out + one.errors for one in later] == [b"456789oh", b"", b"oh"]
    assert all(one.end == seen.end for one in later)
    assert (kept.output_bytes, kept.kept_offset, kept.output_tail) == (12, 0, b"0123456789oh")
    assert kept.end == seen.end
    assert kept.creator.user_id == task.creator.user_id
    assert list(kept.spec.command) == ["sh", "-c", script]
    assert dict(kept.spec.environment) == {"SECRET": ""}


async def test_output_that_is_no_text_comes_byte_by_byte_as_it_was_written(stack: Stack) -> None:  # SBX-6
    task = await stack.ready_task()
    written = bytes(range(256)) + b"\xc3"  # ends within a character
    script = "printf '" + "".join(f"\\{one:03o}" for one in written) + "'"

    process = await start(stack.client, task.id, "sh", "-c", f"{script}; {script} >&2")
    seen = await follow(stack.client, process)
    kept = await until_known(stack.client, process)

    assert (seen.out, seen.errors) == (written, written)
    assert kept.output_tail == written * 2


async def test_a_process_runs_where_and_for_as_long_as_it_is_told_to(stack: Stack) -> None:
    task = await stack.ready_task()

    within = await execute(
        stack.client, task.id, "sh", "-c", "pwd; echo $WORD", directory=".git", environment={"WORD": "x"}
    )
    slow = await execute(stack.client, task.id, "sleep", "60", timeout=Duration(nanos=500_000_000))
    nowhere = await execute(stack.client, task.id, "nonesuch")

    assert within.stdout.endswith("/.git\nx\n")
    assert slow.end.timed_out
    assert slow.end.run_duration.seconds < 30
    assert nowhere.end.failure.reason == FAILURE_REASON_PROGRAM_NOT_FOUND


async def test_what_is_no_longer_kept_of_an_output_is_passed_over_with_a_gap(stack: Stack) -> None:
    task = await stack.ready_task()
    size = 3 * 1024 * 1024

    process = await start(stack.client, task.id, "sh", "-c", f"yes 0123456 | head -c {size}; printf end")
    kept = await until_known(stack.client, process)
    seen = await follow(stack.client, process)

    assert kept.output_bytes == size + 3
    assert kept.kept_offset > 0
    assert (len(kept.output_tail), kept.output_tail[-3:]) == (TAIL_BYTES, b"end")
    assert seen.gaps == [kept.kept_offset]
    assert (seen.offset, len(seen.out)) == (size + 3, size + 3 - kept.kept_offset)
    assert seen.out.endswith(kept.output_tail)


async def test_processes_are_listed_newest_first_page_by_page(stack: Stack) -> None:
    task = await stack.ready_task()
    started = [(await execute_known(stack, task, "sh", "-c", f"exit {code}")).id for code in range(3)]

    found: list[Process] = []
    request = processes_pb2.ListProcessesRequest(task_id=task.id, page_size=2)
    while True:
        page = await stack.client.processes.ListProcesses(request)
        found += page.processes
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token

    assert [one.id for one in found] == started[::-1]
    assert [one.end.exit_code for one in found] == [2, 1, 0]


async def execute_known(stack: Stack, task: Task, *command: str) -> Process:
    return await until_known(stack.client, await start(stack.client, task.id, *command))


async def test_who_starts_a_process_finds_it_at_once_with_the_token_of_the_answer(stack: Stack) -> None:
    task = await stack.ready_task()
    spec = ProcessSpec(command=["sleep", "60"])

    made = await stack.client.processes.StartProcess(
        processes_pb2.StartProcessRequest(request_id=request_id(), task_id=task.id, spec=spec)
    )
    fresh = Consistency(at_least_as_fresh=[made.consistency_token])
    read = await stack.client.processes.GetProcess(
        processes_pb2.GetProcessRequest(task_id=task.id, process_id=made.process.id, consistency=fresh)
    )
    listed = await stack.client.processes.ListProcesses(
        processes_pb2.ListProcessesRequest(task_id=task.id, consistency=fresh)
    )

    assert made.consistency_token
    assert read.process.id == made.process.id
    assert [one.id for one in listed.processes] == [made.process.id]


async def test_a_watch_of_the_task_shows_its_processes_from_the_start_to_the_end(stack: Stack) -> None:
    task = await stack.ready_task()
    before = await execute_known(stack, task, "true")
    view = View("a watcher", stack.client.watch_task(task.id)).open()
    try:
        process = await start(stack.client, task.id, "cat")

        async def runs() -> bool:
            held = view.of("process").get(process.id)
            return held is not None and held.state == PROCESS_STATE_RUNNING

        async def over() -> bool:
            return view.of("process")[process.id].state == PROCESS_STATE_ENDED

        assert await eventually(runs)
        await write(stack.client, process, 0, b"last words", close=True)
        assert await eventually(over)
        held = view.of("process")
        assert held[process.id].output_tail == b"last words"
        assert held[before.id] == before
    finally:
        await view.close()


async def test_input_is_taken_once_whoever_sends_it_again_and_a_gap_is_refused(stack: Stack) -> None:
    task = await stack.ready_task()
    process = await start(stack.client, task.id, "cat")

    assert await write(stack.client, process, 0, b"one ") == 4
    assert await write(stack.client, process, 0, b"one two ") == 8
    gap = await failure(write(stack.client, process, 9, b"lost"))
    assert await write(stack.client, process, 8, b"three", close=True) == 13
    seen = await follow(stack.client, process)
    late = await failure(write(stack.client, process, 13, b"late"))

    assert (gap.code, gap.reason) == (grpc.StatusCode.OUT_OF_RANGE, "OFFSET_GAP")
    assert (late.code, late.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "PROCESS_ENDED")
    assert (seen.stdout, seen.end.exit_code) == ("one two three", 0)


@pytest.mark.parametrize(("signal", "code"), [(SIGNAL_INT, 7), (SIGNAL_KILL, 0)])
async def test_a_signal_reaches_a_process_and_once_it_has_ended_changes_nothing(
    stack: Stack, signal: processes_pb2.Signal.ValueType, code: int
) -> None:
    task = await stack.ready_task()
    process = await start(
        stack.client, task.id, "sh", "-c", "trap 'exit 7' INT; echo ready; while :; do sleep 0.05; done"
    )
    await until_said(stack.client, process, b"ready")
    request = processes_pb2.SignalProcessRequest(task_id=task.id, process_id=process.id, signal=signal)

    await stack.client.processes.SignalProcess(request)
    seen = await follow(stack.client, process)
    again = await stack.client.processes.SignalProcess(request)

    assert (seen.end.exit_code, seen.end.signal) == (code, 0 if code else signal)
    assert again.process.end == seen.end


async def test_a_terminal_knows_its_size_echoes_and_ends_with_its_program(stack: Stack) -> None:
    task = await stack.ready_task()
    process = await start(
        stack.client, task.id, "sh", "-c", "stty size; read line; stty size", terminal=TerminalSize(rows=24, columns=80)
    )
    await until_said(stack.client, process, b"24 80")

    await stack.client.processes.ResizeTerminal(
        processes_pb2.ResizeTerminalRequest(
            task_id=task.id, process_id=process.id, size=TerminalSize(rows=50, columns=132)
        )
    )
    await write(stack.client, process, 0, b"typed\n")
    seen = await follow(stack.client, process)

    assert seen.stdout.split("\r\n") == ["24 80", "typed", "50 132", ""]
    assert seen.end.exit_code == 0


async def test_only_a_terminal_has_a_size(stack: Stack) -> None:
    task = await stack.ready_task()
    process = await start(stack.client, task.id, "cat")
    request = processes_pb2.ResizeTerminalRequest(
        task_id=task.id, process_id=process.id, size=TerminalSize(rows=50, columns=132)
    )

    refused = await failure(stack.client.processes.ResizeTerminal(request))

    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "STATE_FORBIDS")


def machine_calls(client: Client, process: Process) -> dict[str, Callable[[], Awaitable[Any]]]:
    """Return a call of every method that reaches into the machine, by the method's name."""
    which: dict[str, Any] = {"task_id": process.task_id, "process_id": process.id}
    task: dict[str, Any] = {"task_id": process.task_id}
    file: dict[str, Any] = {**task, "path": "README.md"}
    requests: list[Message] = [
        processes_pb2.StartProcessRequest(**task, spec=ProcessSpec(command=["true"])),
        processes_pb2.WatchProcessRequest(**which),
        processes_pb2.WriteProcessInputRequest(**which, data=b"x"),
        processes_pb2.ResizeTerminalRequest(**which, size=TerminalSize(rows=1, columns=1)),
        processes_pb2.SignalProcessRequest(**which, signal=SIGNAL_KILL),
        files_pb2.ListFilesRequest(**task),
        files_pb2.GetFileRequest(**file),
        files_pb2.ReadFileRequest(**file),
        files_pb2.WriteFileRequest(**file, content=b"x"),
        files_pb2.MoveFileRequest(**file, new_path="b"),
        files_pb2.DeleteFileRequest(**file),
    ]
    by_name = {type(request).__name__.removesuffix("Request"): request for request in requests}
    assert {*by_name} == {one.method.name for one in ROUTES.values() if one.owner == SANDBOX}
    return {name: partial(answer, client, name, request) for name, request in by_name.items()}


async def answer(client: Client, name: str, request: Message) -> Any:
    """Return what a method answers, or the first that it does."""
    method = getattr(client.processes if hasattr(client.processes, name) else client.files, name)
    call = method(request)
    return await (call.read() if hasattr(call, "read") else call)


async def test_a_viewer_reads_what_is_known_of_a_process_and_reaches_no_machine(stack: Stack) -> None:
    task = await stack.ready_task()
    process = await start(stack.client, task.id, "sleep", "60")
    viewer, _ = await stack.new_member(roles_pb2.ROLE_VIEWER)
    await eventually(lambda: seen_in(stack.client, process))

    read = await known(viewer, process)
    listed = await viewer.processes.ListProcesses(processes_pb2.ListProcessesRequest(task_id=task.id))
    refused = {name: await failure(call()) for name, call in machine_calls(viewer, process).items()}

    assert read.id == process.id
    assert [one.id for one in listed.processes] == [process.id]
    assert {(one.code, one.reason) for one in refused.values()} == {
        (grpc.StatusCode.PERMISSION_DENIED, "ROLE_REQUIRED")
    }
    assert (await known(stack.client, process)).state == PROCESS_STATE_RUNNING


async def seen_in(client: Client, process: Process) -> bool:
    request = processes_pb2.ListProcessesRequest(task_id=process.task_id)
    listed = await client.processes.ListProcesses(request)
    return any(one.id == process.id and one.state == PROCESS_STATE_RUNNING for one in listed.processes)


async def test_another_organizations_process_and_machine_do_not_exist(stack: Stack) -> None:
    task = await stack.ready_task()
    process = await start(stack.client, task.id, "sleep", "60")
    stranger, _ = await stack.new_member(roles_pb2.ROLE_OWNER, await stack.new_organization())

    calls = {
        **machine_calls(stranger, process),
        "GetProcess": partial(known, stranger, process),
        "ListProcesses": partial(
            answer, stranger, "ListProcesses", processes_pb2.ListProcessesRequest(task_id=task.id)
        ),
    }
    refused = {name: await failure(call()) for name, call in calls.items()}

    assert {(one.code, one.reason, one.resource) for one in refused.values()} == {
        (grpc.StatusCode.NOT_FOUND, "RESOURCE_NOT_FOUND", task.id)
    }


async def test_a_process_is_found_under_its_own_task_alone(stack: Stack) -> None:
    one, other = await asyncio.gather(stack.ready_task(), stack.ready_task())
    process = await start(stack.client, one.id, "sleep", "60")
    process.task_id = other.id

    named = ("WatchProcess", "WriteProcessInput", "ResizeTerminal", "SignalProcess")
    calls = machine_calls(stack.client, process)
    refused = [await failure(calls[name]()) for name in named] + [await failure(known(stack.client, process))]

    assert {(one.code, one.resource) for one in refused} == {(grpc.StatusCode.NOT_FOUND, process.id)}


async def test_files_are_written_by_what_the_caller_knows_of_them(stack: Stack) -> None:
    task, files = await stack.ready_task(), stack.client.files
    at: dict[str, Any] = {"task_id": task.id, "path": "deep/a.txt"}

    made = (await files.WriteFile(files_pb2.WriteFileRequest(**at, content=b"one", if_absent=True))).file
    exists = await failure(files.WriteFile(files_pb2.WriteFileRequest(**at, content=b"x", if_absent=True)))
    changed = (await files.WriteFile(files_pb2.WriteFileRequest(**at, content=b"two", if_etag=made.etag))).file
    stale = await failure(files.WriteFile(files_pb2.WriteFileRequest(**at, content=b"x", if_etag=made.etag)))
    await execute(stack.client, task.id, "sh", "-c", "printf three >> deep/a.txt")
    behind = await failure(files.WriteFile(files_pb2.WriteFileRequest(**at, content=b"x", if_etag=changed.etag)))
    read = await files.ReadFile(files_pb2.ReadFileRequest(**at, offset=1, length=4))
    whole = (await files.GetFile(files_pb2.GetFileRequest(**at))).file

    assert (exists.code, exists.reason) == (grpc.StatusCode.ALREADY_EXISTS, "FILE_EXISTS")
    assert {(one.code, one.reason) for one in (stale, behind)} == {(grpc.StatusCode.ABORTED, "ETAG_MISMATCH")}
    assert (read.content, read.file, whole.size_bytes) == (b"woth", whole, 8)
    assert len({made.etag, changed.etag, whole.etag}) == 3


async def test_of_many_who_write_a_file_on_what_they_know_one_does(stack: Stack) -> None:
    task, files = await stack.ready_task(), stack.client.files
    at: dict[str, Any] = {"task_id": task.id, "path": "a.txt"}
    made = (await files.WriteFile(files_pb2.WriteFileRequest(**at, content=b"one"))).file

    requests = [files_pb2.WriteFileRequest(**at, content=b"%d" % number, if_etag=made.etag) for number in range(8)]
    answers = await asyncio.gather(*(files.WriteFile(request) for request in requests), return_exceptions=True)
    read = await files.ReadFile(files_pb2.ReadFileRequest(**at))

    refused = [failure_of(one) for one in answers if isinstance(one, grpc.aio.AioRpcError)]
    assert [one.reason for one in refused] == ["ETAG_MISMATCH"] * 7
    [number] = [number for number, one in enumerate(answers) if isinstance(one, files_pb2.WriteFileResponse)]
    assert read.content == b"%d" % number


async def test_files_are_listed_moved_and_deleted(stack: Stack) -> None:
    task, files = await stack.ready_task(), stack.client.files
    for name in ("a", "b", "c"):
        await files.WriteFile(files_pb2.WriteFileRequest(task_id=task.id, path=f"d/{name}", content=name.encode()))

    taken = await failure(files.MoveFile(files_pb2.MoveFileRequest(task_id=task.id, path="d/a", new_path="d/b")))
    moved = await files.MoveFile(files_pb2.MoveFileRequest(task_id=task.id, path="d/a", new_path="d/b", overwrite=True))
    await files.DeleteFile(files_pb2.DeleteFileRequest(task_id=task.id, path="d/c"))
    gone = await failure(files.DeleteFile(files_pb2.DeleteFileRequest(task_id=task.id, path="d/c")))
    listed = await files.ListFiles(files_pb2.ListFilesRequest(task_id=task.id, path="d"))
    outside = await failure(files.ReadFile(files_pb2.ReadFileRequest(task_id=task.id, path="../../etc/passwd")))

    assert (taken.code, taken.reason) == (grpc.StatusCode.ALREADY_EXISTS, "FILE_EXISTS")
    assert [(one.path, one.size_bytes) for one in listed.files] == [("d/b", 1)]
    assert listed.files[0].etag in ("", moved.file.etag)
    assert (gone.code, gone.resource) == (grpc.StatusCode.NOT_FOUND, "d/c")
    assert (outside.code, outside.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["path"])


async def test_who_may_no_longer_reach_the_machine_sees_no_more_of_its_output(stack: Stack) -> None:
    task = await stack.ready_task()
    process = await start(stack.client, task.id, "sh", "-c", "while :; do echo tick; sleep 0.2; done")
    member, member_id = await stack.new_member()
    watching = member.processes.WatchProcess(processes_pb2.WatchProcessRequest(task_id=task.id, process_id=process.id))

    async def follow_on() -> None:
        async for _ in cast("Any", watching):
            pass

    following = asyncio.create_task(follow_on())
    await asyncio.sleep(1)
    await stack.client.organizations.RemoveMember(
        organizations_pb2.RemoveMemberRequest(
            request_id=request_id(), organization_id=stack.organization_id, user_id=member_id
        )
    )
    async with asyncio.timeout(20):
        refused = await failure(following)

    assert refused.code == grpc.StatusCode.NOT_FOUND
    await stack.client.processes.SignalProcess(
        processes_pb2.SignalProcessRequest(task_id=task.id, process_id=process.id, signal=SIGNAL_KILL)
    )


async def test_what_nobody_knows_in_a_request_is_not_kept(stack: Stack) -> None:
    task = await stack.ready_task()
    request = sessions_pb2.SendMessageRequest(
        request_id=request_id(),
        task_id=task.id,
        session_id=(await stack.session(task.id)).id,
        prompt=Prompt(text="say hi"),
    )
    known = request.prompt.SerializeToString()
    groups = b"\xa3\x06" * 90 + b"\xa4\x06" * 90  # field 100, a group in a group in a group
    prompt = known + groups + b"\xaa\x06\x80\x80\x40" + bytes(1024 * 1024)  # field 101
    request.ClearField("prompt")
    length = len(prompt)
    size = bytes((length & 0x7F | 0x80, length >> 7 & 0x7F | 0x80, length >> 14 & 0x7F | 0x80, length >> 21))
    data = request.SerializeToString() + b"\x22" + size + prompt
    async with grpc.aio.insecure_channel(stack.address) as channel:
        send = cast("Any", channel).unary_unary("/branchline.v1.SessionService/SendMessage")
        await send(data, metadata=(("authorization", f"Bearer {stack.token}"),))
    await stack.until(task.id, activity=tasks_pb2.TASK_ACTIVITY_IDLE, turn=1)

    entries = await stack.transcript(task)
    assert entries[0].user_message.SerializeToString() == known
