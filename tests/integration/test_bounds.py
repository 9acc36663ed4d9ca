"""No message is over its bound on any edge, whatever people and agents put into an organization. F22.

Every service of the installation measures every message that it takes and gives: pages, frames, pushed batches,
deliveries. What is asked for is found by reflection, so a new list or watch is measured, too.
"""

import asyncio
import hashlib
from collections import defaultdict
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import pytest_asyncio
from branchline.v1 import (
    blobs_pb2,
    organizations_pb2,
    processes_pb2,
    repositories_pb2,
    roles_pb2,
    sessions_pb2,
    tasks_pb2,
    users_pb2,
    watches_pb2,
)
from branchline.v1.common_pb2 import Attachment, FileExcerpt, Prompt
from branchline_internal.admin.v1 import admin_pb2
from branchline_internal.admin.v1.admin_pb2_grpc import AdminServiceStub
from branchline_internal.history.v1 import history_pb2
from branchline_internal.history.v1.history_pb2_grpc import HistoryServiceStub
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from cli.calls import operating
from services.runtime.limits import COMMAND_BYTES, MESSAGE_BYTES, PAGE_BYTES
from services.runtime.serving import Meter
from tests.support.client import Client
from tests.support.processes import follow, start
from tests.support.requests import good, reflected
from tests.support.stack import Stack, eventually, request_id

BYTES = 64 * 1024
"""Longest text of a task, a message or a draft."""

EXCERPT = Attachment(file_excerpt=FileExcerpt(path="p" * 1024, start_line=1, end_line=2, text="e" * 15360))
ATTACHED = [EXCERPT] * 16
PROMPT_BYTES = BYTES + 16 * 16384

AROUND_BYTES = 64 * 1024
"""What may stand around the payloads that are counted: ids, type names, numbers."""

LONG_NAME = "\N{GRINNING FACE}" * 128
TASKS, REPOSITORIES, PROCESSES, QUEUED = 24, 420, 4, 6
WATCHES = {"WatchOrganization", "WatchTask", "WatchHistory"}


@dataclass
class Meters:
    """What the services of an installation measured."""

    largest: dict[str, int] = field(default_factory=lambda: defaultdict[str, int](int))
    """Bytes of the largest message, by method and direction."""

    over: list[str] = field(default_factory=list[str])

    def measure(self, method: MethodDescriptor, data: bytes, answer: bool) -> None:
        """Take note of one message."""
        name = f"{method.full_name} {'answers' if answer else 'takes'}"
        size = len(data)
        self.largest[name] = max(self.largest[name], size)
        if size > MESSAGE_BYTES:
            self.over.append(f"{name} {size} bytes")
        elif size > PAGE_BYTES + AROUND_BYTES:
            count = items(GetMessageClass(method.output_type if answer else method.input_type).FromString(data))
            if count > 1:
                self.over.append(f"{name} {count} items in {size} bytes")


def items(message: Message) -> int:
    """Return how many things a message carries: those of its longest list."""
    message = getattr(message, "frame", message)
    return max((len(value) for one, value in message.ListFields() if one.is_repeated), default=0)


@dataclass
class Large:
    """An organization in which everything is as large as it may be."""

    stack: Stack
    meters: Meters
    given: dict[str, Any]
    before: dict[str, str] = field(default_factory=dict[str, str])
    """Resume token of each watch from before there was anything."""

    async def begin_watch(self, method: MethodDescriptor) -> None:
        """Watch until all is known, and remember where that was."""
        seen = [answer async for answer in opening(self.stack.client, method, self.given)]
        self.before[method.name] = seen[-1].header.resume_token


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def large(stack: Stack) -> AsyncGenerator[Large, None]:
    meters = Meters()
    meter: Meter = meters.measure
    for service in stack.services.values():
        service.serving.meters.append(meter)
    home, stack.organization_id = stack.organization_id, await stack.new_organization()
    try:
        filled = Large(stack, meters, {"organization_id": stack.organization_id, "page_size": 1000})
        watches = {one.name: one for one in await asyncio.to_thread(reflected, stack.address) if one.name in WATCHES}
        for name in ("WatchOrganization", "WatchHistory"):
            await filled.begin_watch(watches[name])
        repository_id = await stack.add_repository()
        filled.given["repository_id"] = repository_id
        filled.given["GetDraft.task_id"] = await fill_organization(stack, repository_id)
        filled.given["blob_id"] = await upload(stack, bytes(range(256)) * 12_000)
        task = await stack.ready_task(repository_id, session=sessions_pb2.SessionOptions(agent="mock"))
        filled.given |= {"task_id": task.id, "session_id": (await stack.session(task.id)).id}
        await filled.begin_watch(watches["WatchTask"])
        filled.given["process_id"] = await fill_task(stack, task)
        yield filled
    finally:
        stack.organization_id = home
        for service in stack.services.values():
            service.serving.meters.remove(meter)


async def fill_organization(stack: Stack, repository_id: str) -> str:
    """Put as much as may be into tasks, drafts, and the lists of people, repositories and tokens; return a task."""
    failing: Any = {
        "sandbox": tasks_pb2.SandboxOptions(provider="nowhere"),
        "title": "\N{GRINNING FACE}" * 62,
        "session": sessions_pb2.SessionOptions(agent="mock"),
    }
    texts = [f"say {number} " + "x" * (BYTES - 16) for number in range(TASKS)]
    tasks = [
        (
            await stack.client.tasks.CreateTask(
                tasks_pb2.CreateTaskRequest(
                    request_id=request_id(),
                    repository_id=repository_id,
                    prompt=Prompt(text=text, attachments=ATTACHED),
                    **failing,
                )
            )
        ).task
        for text in texts
    ]
    for task in tasks:
        draft = users_pb2.Draft(task_id=task.id, prompt=Prompt(text="d" * (BYTES - 1024)))
        await stack.client.users.UpdateDraft(users_pb2.UpdateDraftRequest(draft=draft))
        state = users_pb2.UserTaskState(task_id=task.id, unread=True)
        await stack.client.users.UpdateUserTaskState(users_pb2.UpdateUserTaskStateRequest(user_task_state=state))
    await asyncio.gather(*(stack.until(task.id, state=tasks_pb2.TASK_STATE_FAILED) for task in tasks))
    for _ in range(10):
        await stack.client.organizations.InviteMember(
            organizations_pb2.InviteMemberRequest(
                request_id=request_id(),
                organization_id=stack.organization_id,
                email=f"{request_id()}@{'x' * 40}.example.com",
                role=roles_pb2.ROLE_VIEWER,
            )
        )
        await stack.client.users.CreateApiToken(users_pb2.CreateApiTokenRequest(display_name=LONG_NAME))
    for _ in range(REPOSITORIES // 20):
        await asyncio.gather(*(add_large_repository(stack) for _ in range(20)))
    return tasks[0].id


async def add_large_repository(stack: Stack) -> None:
    request = repositories_pb2.CreateRepositoryRequest(
        request_id=request_id(),
        organization_id=stack.organization_id,
        display_name="\N{GRINNING FACE}" * 200,
        remote_url=f"https://example.invalid/{'u' * 1900}/{request_id()}.git",
    )
    await stack.client.repositories.CreateRepository(request)


async def upload(stack: Stack, data: bytes) -> str:
    """Upload a blob in as large parts as may be; return its id."""
    blobs, whole = stack.client.blobs, hashlib.sha256(data).hexdigest()
    which: dict[str, Any] = {"organization_id": stack.organization_id}
    made = await blobs.CreateBlob(blobs_pb2.CreateBlobRequest(**which, size_bytes=len(data), sha256=whole))
    which["blob_id"] = made.blob.id
    for offset in range(0, len(data), PAGE_BYTES):
        part = data[offset : offset + PAGE_BYTES]
        await blobs.WriteBlob(blobs_pb2.WriteBlobRequest(**which, offset=offset, data=part))
    return made.blob.id


async def fill_task(stack: Stack, task: tasks_pb2.Task) -> str:
    """Put as much as may be into a transcript, a working tree, a queue, and processes; return one of these."""
    texts = [
        "run head -c 40000 /dev/zero | tr '\\0' y",
        "repeat 2000 " + "many words ",
        "run mkdir -p lots && cd lots && for n in $(seq 2000); do : > $n-" + "f" * 200 + "; done",
        "run head -c 1048576 /dev/zero > large.bin",
        *["say " + "s" * (BYTES - 64)] * 4,
    ]
    for number, text in enumerate(texts):
        await stack.send(task, text, attachments=ATTACHED)
        await stack.until(task.id, activity=tasks_pb2.TASK_ACTIVITY_IDLE, turn=number + 1)
    second = await stack.client.sessions.CreateSession(
        sessions_pb2.CreateSessionRequest(request_id=request_id(), task_id=task.id, display_name=LONG_NAME[:62])
    )
    await stack.send(task, "ask " + "q" * 8192, session_id=second.session.id)
    await stack.send(task, "wait 600")
    for number in range(QUEUED):
        await stack.send(task, f"say {number}" + "w" * (BYTES - 64), attachments=ATTACHED)
    command = ["sh", "-c", "head -c 3000000 /dev/zero", "-" * (COMMAND_BYTES - 64)]
    environment = {f"{'V' * 100}{number}": "v" * 1024 for number in range(64)}
    process = processes_pb2.Process()
    for _ in range(PROCESSES):
        process = await start(stack.client, task.id, *command, environment=environment)
        await follow(stack.client, process)
    await eventually(partial(settled, stack))
    return process.id


async def settled(stack: Stack) -> bool:
    """Say whether nothing waits to leave any service."""
    for name in stack.services:
        if name != "gateway":
            async with operating(stack.installation, name, AdminServiceStub) as admin:
                answer = await admin.ListOutbox(admin_pb2.ListOutboxRequest())
            assert not answer.parked_count, f"{name}: {answer.rows}"
            if answer.waiting_count:
                return False
    return True


async def opening(client: Client, method: MethodDescriptor, given: dict[str, Any]) -> AsyncGenerator[Any, None]:
    """Yield what a list answers, page by page; what a watch says until it is complete; what a stream has."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    request: Any = good(method, given)
    request_type: Any = GetMessageClass(method.input_type)
    coders: Any = (request_type.SerializeToString, GetMessageClass(method.output_type).FromString)
    if method.server_streaming:
        call = cast("Any", client.channel).unary_stream(path, *coders)(request, timeout=60)
        async for answer in call:
            yield answer
            if method.name in WATCHES and answer.header.kind == watches_pb2.FRAME_KIND_SYNCED:
                break
        call.cancel()
        return
    while True:
        answer = await cast("Any", client.channel).unary_unary(path, *coders)(request, timeout=60)
        yield answer
        if not getattr(answer, "next_page_token", ""):
            return
        request.page_token = answer.next_page_token


READS = ("List", "Get", "Watch", "Read")


async def test_no_list_watch_page_batch_or_delivery_is_over_its_bound(large: Large) -> None:  # F22
    client, given = large.stack.client, {**large.given}
    given |= {"GetFile.path": "large.bin", "ReadFile.path": "large.bin", "ListFiles.path": "lots"}
    reads = [one for one in await asyncio.to_thread(reflected, large.stack.address) if one.name.startswith(READS)]
    answers: dict[str, list[Any]] = {}
    for method in reads:
        answers[method.name] = [answer async for answer in opening(client, method, given)]
        if method.name in WATCHES:
            resumed = {**given, "resume_token": large.before[method.name]}
            answers[f"{method.name} again"] = [answer async for answer in opening(client, method, resumed)]
    async with operating(large.stack.installation, "history", HistoryServiceStub) as history:
        export = history_pb2.ExportEventsRequest(organization_id=large.stack.organization_id)
        answers["ExportEvents"] = [answer async for answer in cast("Any", history.ExportEvents(export))]

    assert not large.meters.over, "\n".join(large.meters.over)
    assert len(reads) > 30
    cut = {name for name, found in answers.items() if len([one for one in found if items(one)]) > 1}
    assert {"ListTranscriptEntries", "ListQueuedMessages", "ListRepositories"} <= cut
    assert {"WatchTask", "WatchOrganization", "WatchTask again", "WatchOrganization again"} <= cut
    assert sum(one.ByteSize() for one in answers["WatchTask"]) > 2 * PAGE_BYTES
    [found] = answers["GetProcess"]
    kept = found.process.output_bytes - found.process.kept_offset
    assert sum(len(one.output.data) for one in answers["WatchProcess"]) == kept > 10 * BYTES
    for name in ("spine.v1.PushService.Push", "task.v1.TaskService.CreateTask", "sandbox.v1.SandboxService.StartTurn"):
        taken = large.meters.largest[f"branchline.internal.{name} takes"]
        assert taken > PROMPT_BYTES, dict(large.meters.largest)
