"""No message is over its bound on any edge, whatever people and agents put into an organization. F22.

Every service of the installation measures every message that it takes and gives: pages, frames, pushed batches,
deliveries. What is asked for is found by reflection, so a new list or watch is measured, too.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import pytest_asyncio
from branchline.client import Client
from branchline.v1 import organizations_pb2, repositories_pb2, tasks_pb2, users_pb2, watches_pb2
from branchline.v1.sessions_pb2 import Attachment
from branchline.v1.users_pb2 import Draft
from branchline_internal.admin.v1 import admin_pb2
from branchline_internal.admin.v1.admin_pb2_grpc import AdminServiceStub
from branchline_internal.history.v1 import history_pb2
from branchline_internal.history.v1.history_pb2_grpc import HistoryServiceStub
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from cli.calls import operating
from services.runtime.serving import Meter
from services.runtime.spine.chunks import PART_BYTES
from tests.support.requests import good, reflected
from tests.support.stack import Stack, eventually, request_id

BYTES = 64 * 1024
"""Longest text of a task, a message or a draft."""

AROUND_BYTES = 64 * 1024
"""What may stand around the payloads that are counted: ids, type names, numbers."""

LONG_NAME = "\N{GRINNING FACE}" * 128
TASKS = 24
WATCHES = {"WatchOrganization", "WatchTask", "WatchHistory"}


@dataclass
class Meters:
    """What the services of an installation measured."""

    largest: dict[str, int] = field(default_factory=lambda: defaultdict[str, int](int))
    """Bytes of the largest message, by method and direction."""

    many: dict[str, int] = field(default_factory=lambda: defaultdict[str, int](int))
    """Most items that one message carried."""

    over: list[str] = field(default_factory=list[str])

    def measure(self, method: MethodDescriptor, data: bytes, answer: bool) -> None:
        """Take note of one message."""
        name = f"{method.full_name} {'answers' if answer else 'takes'}"
        size = len(data)
        self.largest[name] = max(self.largest[name], size)
        if size > BYTES:
            kind = method.output_type if answer else method.input_type
            count = items(GetMessageClass(kind).FromString(data))
            self.many[name] = max(self.many[name], count)
            if count > 1 and size > PART_BYTES + AROUND_BYTES:
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
    before: dict[str, str]
    """Resume token of each watch from before there was anything."""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def large(stack: Stack) -> AsyncGenerator[Large, None]:
    meters = Meters()
    meter: Meter = meters.measure
    for service in stack.services.values():
        service.serving.meters.append(meter)
    home, stack.organization_id = stack.organization_id, await stack.new_organization()
    given: dict[str, Any] = {"organization_id": stack.organization_id, "page_size": 1000}
    try:
        given["repository_id"] = repository_id = await stack.add_repository()
        task = await stack.ready_task(repository_id, agent="mock")
        given |= {"task_id": task.id, "session_id": task.sessions[0].id}
        methods = await asyncio.to_thread(reflected, stack.address)
        before = {
            one.name: [answer async for answer in opening(stack.client, one, given)][-1].frame.resume_token
            for one in methods
            if one.name in WATCHES
        }
        await fill(stack, repository_id, given["task_id"], given["session_id"])
        yield Large(stack, meters, given, before)
    finally:
        stack.organization_id = home
        for service in stack.services.values():
            service.serving.meters.remove(meter)


async def fill(stack: Stack, repository_id: str, task_id: str, session_id: str) -> None:
    """Put as much as may be into tasks, drafts, a transcript, a working tree, and the lists of people and tokens."""
    failing = {"sandbox_provider": "nowhere", "title": "\N{GRINNING FACE}" * 62, "agent": "mock"}
    texts = [f"say {number} " + "x" * (BYTES - 16) for number in range(TASKS)]
    tasks = await asyncio.gather(*(stack.create_task(repository_id, text, **failing) for text in texts))
    draft = Draft(text="d" * (BYTES - 1024))
    states = [users_pb2.SetTaskStateRequest(task_id=task.id, draft=draft, unread=True) for task in tasks]
    await asyncio.gather(*(stack.client.users.SetTaskState(state) for state in states))
    await asyncio.gather(*(stack.until(task.id, tasks_pb2.TASK_STATUS_ERROR) for task in tasks))
    for _ in range(10):
        email, role = f"{request_id()}@{'x' * 40}.example.com", organizations_pb2.ROLE_VIEWER
        await stack.client.organizations.AddMember(
            organizations_pb2.AddMemberRequest(
                request_id=request_id(),
                organization_id=stack.organization_id,
                email=email,
                display_name=LONG_NAME,
                role=role,
            )
        )
        await stack.client.repositories.AddRepository(
            repositories_pb2.AddRepositoryRequest(
                request_id=request_id(),
                organization_id=stack.organization_id,
                remote_url=f"https://example.invalid/{'u' * 1900}/{request_id()}.git",
            )
        )
        await stack.client.users.CreateApiToken(users_pb2.CreateApiTokenRequest(name=LONG_NAME[:64]))
    task = await stack.task(task_id)
    attached = [Attachment(path=f"a/{'b' * 1000}", content="c" * (250 * 1024))]
    texts = [
        "run head -c 40000 /dev/zero | tr '\\0' y",
        "repeat 2000 " + "many words ",
        "run mkdir -p lots && cd lots && for n in $(seq 2000); do : > $n-" + "f" * 200 + "; done",
        "run head -c 1048576 /dev/zero > large.bin",
        *["say " + "s" * (BYTES - 64)] * 4,
    ]
    for number, text in enumerate(texts):
        await stack.send(task, text, attachments=attached)
        await stack.until(task_id, tasks_pb2.TASK_STATUS_IDLE, turn=number + 1)
    await eventually(partial(settled, stack))


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
            if method.name in WATCHES and answer.frame.kind == watches_pb2.WATCH_FRAME_KIND_SYNCED:
                break
        call.cancel()
        return
    while True:
        answer = await cast("Any", client.channel).unary_unary(path, *coders)(request, timeout=60)
        yield answer
        if not getattr(answer, "next_page_token", ""):
            return
        request.page_token = answer.next_page_token


READS = ("List", "Get", "Watch", "WhoAmI", "Read", "Stat", "Run", "Stream")


async def test_no_list_watch_page_batch_or_delivery_is_over_its_bound(large: Large) -> None:  # F22
    client, given = large.stack.client, {**large.given}
    given |= {"command": ["sh", "-c", "head -c 3000000 /dev/zero"], "StatFile.path": "large.bin"}
    given |= {"ReadFile.path": "large.bin", "ListFiles.path": "lots"}
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
    assert len(reads) >= 18
    cut = {name for name, found in answers.items() if len([one for one in found if items(one)]) > 1}
    assert {"ListTranscript", "WatchTask", "WatchOrganization"} <= cut
    assert {"WatchTask again", "WatchOrganization again"} <= cut
    assert sum(one.ByteSize() for one in answers["WatchTask"]) > 2 * PART_BYTES
    for name in ("spine.v1.PushService.Push", "task.v1.TaskService.CreateTask", "sandbox.v1.SandboxService.StartTurn"):
        assert large.meters.largest[f"branchline.internal.{name} takes"] > BYTES - 1024, dict(large.meters.largest)
