"""The sandbox service alone, with the real sandbox-agent: what its agents say, ask and are given, and files."""

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from branchline.v1 import files_pb2, sessions_pb2
from branchline.v1 import transcripts_pb2 as transcripts
from branchline.v1.common_pb2 import Attachment, FileExcerpt, Prompt
from branchline.v1.errors_pb2 import (
    ERROR_REASON_AGENT_UNKNOWN,
    ERROR_REASON_ETAG_MISMATCH,
    ERROR_REASON_FILE_EXISTS,
    ERROR_REASON_RESOURCE_NOT_FOUND,
)
from branchline.v1.files_pb2 import FILE_KIND_DIRECTORY, FILE_KIND_FILE, FILE_KIND_LINK, FILE_KIND_OTHER
from branchline.v1.transcripts_pb2 import Decline, InputAnswer
from branchline_internal.sandbox.v1 import sandbox_pb2
from google.protobuf.struct_pb2 import Struct
from google.rpc import error_details_pb2

from services.runtime.errors import detail_of, error_reason
from services.sandbox.structs import from_struct
from tests.support.sandbox import SANDBOX, TASK, Room, eventually, sandbox_room

IDLE = sessions_pb2.SESSION_STATE_IDLE
MIB = 1024 * 1024


@pytest_asyncio.fixture
async def room(tmp_path: Path) -> AsyncGenerator[Room, None]:
    async with sandbox_room(tmp_path) as made:
        await made.start()
        yield made


def notices(room: Room) -> list[int]:
    return [entry.notice.kind for entry in room.coordinator.shown("notice")]


async def test_what_an_agent_says_is_kept_whole(room: Room) -> None:
    await room.open()
    unknown = json.dumps({"sessionUpdate": "hologram", "frames": [1]})
    commands = json.dumps({"sessionUpdate": "available_commands_update", "availableCommands": []})
    script = [
        "think Hm",
        "plan high done Read; low doing Write",
        "write a.txt: hello",
        "run echo out; echo err >&2; exit 0",
        f"update {unknown}",
        f"update {commands}",
        "mode plan",
        "model steady",
        "usage 100 20",
        "stop max_tokens",
    ]

    ended = await room.turn(1, "\n".join(script))

    shown = room.coordinator
    assert (ended.state, ended.stop_reason) == (IDLE, transcripts.STOP_REASON_MAX_TOKENS)
    [thought] = shown.shown("reasoning")
    assert thought.reasoning.text == "Hm"
    [plan] = shown.shown("plan")
    assert [(step.text, step.priority) for step in plan.plan.steps] == [
        ("Read", transcripts.PLAN_STEP_PRIORITY_HIGH),
        ("Write", transcripts.PLAN_STEP_PRIORITY_LOW),
    ]
    edit, command = (entry.tool_call for entry in shown.shown("tool_call"))
    assert (edit.kind, edit.locations[0].path, edit.input["content"]) == (transcripts.TOOL_KIND_EDIT, "a.txt", "hello")
    assert (edit.outputs[0].diff.path, edit.outputs[0].diff.new_text) == ("a.txt", "hello\n")
    assert (command.kind, command.state) == (transcripts.TOOL_KIND_EXECUTE, transcripts.TOOL_CALL_STATE_SUCCEEDED)
    assert (command.outputs[0].text, command.raw_output["exit_code"]) == ("out\nerr\n", 0)
    assert notices(room) == [
        transcripts.NOTICE_KIND_UNKNOWN_UPDATE,
        transcripts.NOTICE_KIND_MODE_CHANGED,
        transcripts.NOTICE_KIND_MODEL_CHANGED,
    ]
    [end] = shown.shown("turn_end")
    assert (end.turn_end.usage.total_tokens, end.turn_end.reason) == (120, transcripts.STOP_REASON_MAX_TOKENS)
    assert all(entry.HasField("end_time") for entry in shown.entries.values())


async def test_what_is_too_long_for_a_transcript_is_stored_in_blobs(room: Room) -> None:
    await room.open()
    await room.turn(1, "run seq 1 20000\nimage 500")

    [call] = [entry.tool_call for entry in room.coordinator.shown("tool_call")]
    cut, whole = call.outputs
    assert cut.text.endswith("20000\n")
    _, data = room.coordinator.keeper.blobs[whole.blob.blob_id]
    assert data == "".join(f"{number}\n" for number in range(1, 20001)).encode()
    assert cut.omitted_bytes + len(cut.text) == len(data)
    pictures = [blob for entry in room.coordinator.shown("agent_message") for blob in entry.agent_message.blobs]
    assert [(blob.media_type, blob.size_bytes) for blob in pictures] == [("image/png", 500)]


async def test_a_store_that_refuses_fails_no_turn(room: Room) -> None:
    await room.open()
    room.coordinator.keeper.refusing = True
    assert (await room.turn(1, "run seq 1 20000\nimage 500\nsay done")).state == IDLE
    [call] = [entry.tool_call for entry in room.coordinator.shown("tool_call")]
    [cut] = call.outputs
    assert cut.omitted_bytes > 0
    assert "[image/png, 500 bytes]" in room.coordinator.said()


async def test_what_a_prompt_names_is_there_for_the_agent_to_read(room: Room) -> None:
    await room.open()
    keeper = room.coordinator.keeper
    picture = keeper.add(b"p" * 1000, "shot.png", "image/png")
    large = keeper.add(bytes(range(256)) * (5 * MIB // 512), "../large file.bin", "application/octet-stream")
    empty = keeper.add(b"", "empty.txt", "text/plain")
    excerpt = FileExcerpt(path="a.py", start_line=1, end_line=2, text="say excerpted")
    attachments = [Attachment(blob=blob) for blob in (picture, large, empty)]

    prompt = Prompt(text="say begun", attachments=[*attachments, Attachment(file_excerpt=excerpt)])
    await room.give(1, prompt)
    await room.ended(1)

    said = room.coordinator.said()
    assert "I see an image, image/png, 1000 bytes." in said
    assert f"I see the file ../large file.bin, {large.size_bytes} bytes." in said
    assert "I see the file empty.txt, 0 bytes." in said
    assert "excerpted\n" in said
    summed = await room.execute(f"sha256sum < 'attachments/{large.blob_id}/large file.bin'; ls attachments/*/")
    assert summed.stdout.startswith(hashlib.sha256(keeper.blobs[large.blob_id][1]).hexdigest())
    assert "shot.png\n" in summed.stdout


async def test_an_attachment_that_is_gone_fails_the_turn_before_it_begins(room: Room) -> None:
    await room.open()
    blob = room.coordinator.keeper.add(b"x", "x.txt", "text/plain")
    blob.size_bytes = 7
    await room.give(1, Prompt(text="append done.txt: done", attachments=[Attachment(blob=blob)]))
    ended = await room.ended(1)
    assert ended.state == sessions_pb2.SESSION_STATE_FAILED
    assert "attachment" in ended.failure.message
    assert not room.coordinator.said()


async def test_a_question_with_a_form_reaches_people_and_its_answer_the_agent(room: Room) -> None:
    await room.open()
    await room.prompt(1, "question Which colour?\nask May I?\nwrite forbidden.txt: x")
    asked = await room.question()
    assert asked.question.text == "Which colour?"
    assert from_struct(asked.question.schema)["required"] == ["answer"]
    form = Struct()
    form.update({"answer": "blue"})

    await room.answer_with(asked.id, InputAnswer(form=form))
    permission = await room.question(after=asked.id)
    kinds = [option.kind for option in permission.permission.options]
    assert kinds == [
        transcripts.PERMISSION_OPTION_KIND_ALLOW_ONCE,
        transcripts.PERMISSION_OPTION_KIND_ALLOW_ALWAYS,
        transcripts.PERMISSION_OPTION_KIND_REJECT_ONCE,
    ]
    assert permission.permission.tool_call.locations[0].path == "."
    await room.answer_with(permission.id, InputAnswer(decline=Decline(reason="no")))

    ended = await room.ended(1)
    assert ended.stop_reason == transcripts.STOP_REASON_REFUSAL
    assert "The answer is blue." in room.coordinator.said()
    assert (await room.execute("ls workspace/forbidden.txt")).exit_code != 0
    shown = [entry.input_request_id for entry in room.coordinator.shown("input_request_id")]
    assert shown == [asked.id, permission.id]


async def test_models_and_modes_are_told_and_set_when_a_session_is_opened(room: Room) -> None:
    await room.open(mode="plan")
    opened = await eventually(lambda: room.coordinator.sessions[-1] if room.coordinator.sessions else None)
    assert [(model.id, model.is_default) for model in opened.models] == [("steady", True), ("swift", False)]
    assert [mode.id for mode in opened.modes] == ["code", "plan"]
    report = await eventually(
        lambda: next((one for one in room.coordinator.reports if any(agent.models for agent in one.agents)), None)
    )
    mock = next(agent for agent in report.agents if agent.id == "mock")
    assert [model.id for model in mock.models] == ["steady", "swift"]
    assert mock.capabilities.images
    assert list(report.sandbox_providers) == ["local"]
    assert len(report.agents) > 1

    await room.turn(1, "say hello")
    assert not notices(room)  # it works in the mode that was asked for: that is no news


@pytest.mark.parametrize("wanted", [{"agent": "nonesuch"}, {"model": "nonesuch"}, {"mode": "nonesuch"}])
async def test_an_unknown_agent_model_or_mode_is_refused_with_those_known(room: Room, wanted: dict[str, str]) -> None:
    await room.stub.CreateSandbox(
        sandbox_pb2.CreateSandboxRequest(sandbox_id=SANDBOX, task_id=TASK, provider="local"), timeout=60
    )
    given = {"agent": "mock", **wanted}
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await room.stub.OpenSession(
            sandbox_pb2.OpenSessionRequest(sandbox_id=SANDBOX, session_id="ses_2", **given), timeout=60
        )
    assert error_reason(refused.value) == ERROR_REASON_AGENT_UNKNOWN
    assert ("mock" if "agent" in wanted else "swift" if "model" in wanted else "plan") in (
        refused.value.details() or ""
    )


async def refused(call: Any) -> int:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error_reason(error.value)


async def test_files_are_written_read_and_moved_by_what_the_caller_knows(room: Room) -> None:
    await room.open()
    files = room.files
    at: dict[str, Any] = {"task_id": TASK, "path": "deep/a.txt"}

    made = await files.WriteFile(files_pb2.WriteFileRequest(**at, content=b"one", if_absent=True))
    again = files.WriteFile(files_pb2.WriteFileRequest(**at, content=b"x", if_absent=True))
    assert await refused(again) == ERROR_REASON_FILE_EXISTS
    changed = await files.WriteFile(files_pb2.WriteFileRequest(**at, content=b"two", if_etag=made.file.etag))
    stale = files.WriteFile(files_pb2.WriteFileRequest(**at, content=b"x", if_etag=made.file.etag))
    assert await refused(stale) == ERROR_REASON_ETAG_MISMATCH
    found = (await files.GetFile(files_pb2.GetFileRequest(**at))).file
    assert (found.path, found.kind, found.size_bytes, found.etag) == (
        "deep/a.txt",
        FILE_KIND_FILE,
        3,
        changed.file.etag,
    )
    part = await files.ReadFile(files_pb2.ReadFileRequest(**at, offset=1, length=1))
    assert (part.content, part.file) == (b"w", found)

    await files.WriteFile(files_pb2.WriteFileRequest(task_id=TASK, path="b.txt", content=b"b"))
    move: dict[str, Any] = {"task_id": TASK, "path": "b.txt", "new_path": "deep/a.txt"}
    assert await refused(files.MoveFile(files_pb2.MoveFileRequest(**move))) == ERROR_REASON_FILE_EXISTS
    moved = (await files.MoveFile(files_pb2.MoveFileRequest(**move, overwrite=True))).file
    assert (moved.path, moved.size_bytes) == ("deep/a.txt", 1)
    await files.DeleteFile(files_pb2.DeleteFileRequest(**at))
    assert await refused(files.GetFile(files_pb2.GetFileRequest(**at))) == ERROR_REASON_RESOURCE_NOT_FOUND
    assert await refused(files.DeleteFile(files_pb2.DeleteFileRequest(**at))) == ERROR_REASON_RESOURCE_NOT_FOUND


async def test_a_write_whose_answer_was_lost_comes_again_and_is_done(room: Room) -> None:
    await room.open()
    at: dict[str, Any] = {"task_id": TASK, "path": "a.txt"}
    made = files_pb2.WriteFileRequest(**at, content=b"one", if_absent=True)
    first = [(await room.files.WriteFile(made)).file for _ in range(2)]
    changed = files_pb2.WriteFileRequest(**at, content=b"two", if_etag=first[0].etag)
    second = [(await room.files.WriteFile(changed)).file for _ in range(2)]

    assert (first[0], second[0]) == (first[1], second[1])
    assert await refused(room.files.WriteFile(made)) == ERROR_REASON_FILE_EXISTS
    assert (await room.files.ReadFile(files_pb2.ReadFileRequest(**at))).content == b"two"


async def test_of_many_who_write_one_file_by_different_paths_one_does(room: Room) -> None:
    await room.open()
    await room.execute("cd workspace && mkdir d && ln -s .. d/up && echo 1 > a && ln a hard && ln -s a link")
    for number in range(10):
        etag = (await room.files.GetFile(files_pb2.GetFileRequest(task_id=TASK, path="a"))).file.etag
        requests = [
            files_pb2.WriteFileRequest(task_id=TASK, path=path, content=b"%d" % number + path.encode(), if_etag=etag)
            for path in ("a", "d/up/a", "link", "hard")
        ]
        answers = await asyncio.gather(*(room.files.WriteFile(one) for one in requests), return_exceptions=True)
        failed = [error_reason(one) for one in answers if isinstance(one, BaseException)]
        assert failed == [ERROR_REASON_ETAG_MISMATCH] * 3


async def test_a_directory_is_listed_page_by_page(room: Room) -> None:
    await room.open()
    await room.execute("cd workspace && mkdir -p d/sub && touch d/a d/b d/c")
    found: list[files_pb2.File] = []
    request = files_pb2.ListFilesRequest(task_id=TASK, path="d", page_size=3)
    while True:
        page = await room.files.ListFiles(request)
        found += page.files
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert [(file.path, file.kind) for file in found] == [
        ("d/a", FILE_KIND_FILE),
        ("d/b", FILE_KIND_FILE),
        ("d/c", FILE_KIND_FILE),
        ("d/sub", FILE_KIND_DIRECTORY),
    ]


async def test_a_large_file_is_read_in_parts_and_named_by_its_state(room: Room) -> None:
    mib = 3
    await room.open()
    made = await room.execute(f"cd workspace && yes 0123456789abcde | head -c {mib * MIB} > 'big file'")
    assert made.exit_code == 0
    at: dict[str, Any] = {"task_id": TASK, "path": "big file"}

    first = await room.files.ReadFile(files_pb2.ReadFileRequest(**at))
    part = await room.files.ReadFile(files_pb2.ReadFileRequest(**at, offset=2 * MIB + 1, length=5))
    past = await room.files.ReadFile(files_pb2.ReadFileRequest(**at, offset=mib * MIB))

    assert first.content == b"0123456789abcde\n" * (MIB // 16)
    assert (part.content, past.content) == (b"12345", b"")
    etag = first.file.etag
    assert etag == part.file.etag
    await room.execute("cd workspace && printf x >> 'big file'")
    now = (await room.files.GetFile(files_pb2.GetFileRequest(**at))).file
    assert now.etag not in ("", etag)
    overwrite = "cd workspace && touch -r 'big file' old && printf X | dd of='big file' conv=notrunc status=none"
    assert (await room.execute(f"{overwrite} && touch -r old 'big file'")).exit_code == 0
    forged = (await room.files.GetFile(files_pb2.GetFileRequest(**at))).file
    assert (forged.size_bytes, forged.modify_time) == (now.size_bytes, now.modify_time)
    assert forged.etag != now.etag


TREE = """
cd workspace && mkdir -p full/deep empty other && echo f > full/f && echo y > full/deep/y && echo o > other/o
echo a > a && echo b > b && ln a hard && ln -s a to-a && ln -s full to-full && ln -s . to-root && ln -s no broken
ln -s circle circle && mkfifo pipe && python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind("socket")'
"""
STANDING = "cd workspace && find . -path ./.git -prune -o -printf '%p %y %i %s %l\\n' | sort"
INVALID, EXISTS = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.ALREADY_EXISTS


async def test_a_move_never_deletes_a_tree(room: Room) -> None:
    await room.open()
    assert (await room.execute(TREE)).exit_code == 0
    before = (await room.execute(STANDING)).stdout
    for path, new_path, code, field in (
        ("a", ".", INVALID, "new_path"),
        ("a", "./a", INVALID, "new_path"),
        ("a", "to-root/a", INVALID, "new_path"),
        ("a", "hard", INVALID, "new_path"),
        ("to-a", "a", INVALID, "new_path"),
        ("full", "to-root/full", INVALID, "new_path"),
        ("full", "full/deep/in", INVALID, "new_path"),
        ("full", "to-full/new/in", INVALID, "new_path"),
        ("full/deep", "full", INVALID, "new_path"),
        ("full/deep", "to-root/full", INVALID, "new_path"),
        (".", "in", INVALID, "path"),
        ("a", "x" * 256, INVALID, "new_path"),
        ("a", "b/c", EXISTS, None),
        ("a", "full", EXISTS, None),
        ("a", "empty", EXISTS, None),
        ("other", "full", EXISTS, None),
        ("other", "a", EXISTS, None),
        ("no", "a", grpc.StatusCode.NOT_FOUND, None),
    ):
        move = files_pb2.MoveFileRequest(task_id=TASK, path=path, new_path=new_path, overwrite=True)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await room.files.MoveFile(move)
        told = detail_of(error.value, error_details_pb2.ErrorInfo).metadata
        assert (path, new_path, error.value.code(), told.get("field")) == (path, new_path, code, field)
        assert "os error" not in (error.value.details() or "")
    assert (await room.execute(STANDING)).stdout == before

    for path, new_path in (("a", "b"), ("other", "empty"), ("full", "new/deep/full"), ("b", "to-full")):
        await room.files.MoveFile(files_pb2.MoveFileRequest(task_id=TASK, path=path, new_path=new_path, overwrite=True))
    now = (await room.execute("cd workspace && cat to-full empty/o new/deep/full/f; ls -d a b other full")).stdout
    assert now == "a\no\nf\n"


async def test_what_is_listed_can_be_looked_at_moved_and_deleted(room: Room) -> None:
    await room.open()
    assert (await room.execute(TREE)).exit_code == 0
    listed = (await room.files.ListFiles(files_pb2.ListFilesRequest(task_id=TASK))).files
    kinds = {file.path: file.kind for file in listed}
    odd = {"broken", "circle", "pipe", "socket", "to-a", "to-full", "to-root"}
    assert {path for path in kinds if kinds[path] in (FILE_KIND_LINK, FILE_KIND_OTHER)} == odd
    assert kinds["pipe"] == kinds["socket"] == FILE_KIND_OTHER
    looked = {path: (await room.files.GetFile(files_pb2.GetFileRequest(task_id=TASK, path=path))).file for path in odd}
    followed = {"to-a": FILE_KIND_FILE, "to-full": FILE_KIND_DIRECTORY, "to-root": FILE_KIND_DIRECTORY}
    assert {path: file.kind for path, file in looked.items()} == {path: kinds[path] for path in odd} | followed

    absent = files_pb2.WriteFileRequest(task_id=TASK, path="broken", content=b"x", if_absent=True)
    assert await refused(room.files.WriteFile(absent)) == ERROR_REASON_FILE_EXISTS
    for path in odd:
        move = files_pb2.MoveFileRequest(task_id=TASK, path=path, new_path=f"moved/{path}")
        await room.files.MoveFile(move)
        await room.files.DeleteFile(files_pb2.DeleteFileRequest(task_id=TASK, path=f"moved/{path}"))
    await room.files.DeleteFile(files_pb2.DeleteFileRequest(task_id=TASK, path="moved"))
    for path in ("full", "."):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await room.files.DeleteFile(files_pb2.DeleteFileRequest(task_id=TASK, path=path))
        assert (error.value.code(), "os error" in (error.value.details() or "")) == (INVALID, False)
    listed = (await room.files.ListFiles(files_pb2.ListFilesRequest(task_id=TASK))).files
    assert {file.path for file in listed} == kinds.keys() - odd


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "a/../../b"])
async def test_a_path_that_leaves_the_working_tree_is_refused(room: Room, path: str) -> None:
    await room.open()
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await room.files.ReadFile(files_pb2.ReadFileRequest(task_id=TASK, path=path))
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.timeout(60)
async def test_what_is_no_file_is_not_opened_and_holds_up_nothing(room: Room) -> None:
    await room.open()
    makes = "import os, socket; os.mkfifo('pipe'); socket.socket(socket.AF_UNIX).bind('socket')"
    await room.turn(1, f'run python3 -c "{makes}" && ln -s pipe link && ln -s /dev/zero zero && touch empty')
    [made] = [entry.tool_call for entry in room.coordinator.shown("tool_call")]
    assert made.raw_output["exit_code"] == 0, made
    files = room.files
    for path in ("link", "pipe", "socket", "zero"):
        at: dict[str, Any] = {"task_id": TASK, "path": path}
        for call, request in (
            (files.WriteFile, files_pb2.WriteFileRequest(**at, content=b"x")),
            (files.ReadFile, files_pb2.ReadFileRequest(**at)),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match="neither a file nor a directory"):
                await call(request, timeout=10)
        assert (await files.GetFile(files_pb2.GetFileRequest(**at), timeout=10)).file.kind == FILE_KIND_OTHER
        await files.MoveFile(files_pb2.MoveFileRequest(**at, new_path=f"moved {path}"), timeout=10)
        await files.DeleteFile(files_pb2.DeleteFileRequest(task_id=TASK, path=f"moved {path}"), timeout=10)
    await files.WriteFile(files_pb2.WriteFileRequest(task_id=TASK, path="empty", content=b"x"), timeout=10)
