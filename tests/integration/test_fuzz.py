"""Garbled, extreme and foreign requests to every method, as reflection tells of them: each gets a clear answer.

Whatever comes in, from whomever: no answer is INTERNAL or UNKNOWN, every refusal has a reason and one of bad input its
field, and the installation serves on as before with nothing parked.
"""

import asyncio
import base64
import random
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, cast

import grpc
import pytest_asyncio
from branchline.client import Client
from branchline.v1 import organizations_pb2, sessions_pb2, tasks_pb2, users_pb2
from branchline.v1.vocabulary_pb2 import ENTITY_KIND_TASK
from branchline_internal.admin.v1 import admin_pb2
from branchline_internal.admin.v1.admin_pb2_grpc import AdminServiceStub
from branchline_internal.github_data.v1 import github_data_pb2
from branchline_internal.history.v1 import history_pb2 as internal_history_pb2
from branchline_internal.organization.v1 import organization_pb2 as internal_organization_pb2
from branchline_internal.repository.v1 import repository_pb2 as internal_repository_pb2
from branchline_internal.sandbox.v1 import sandbox_pb2
from branchline_internal.spine.v1 import push_pb2
from branchline_internal.spine.v1.push_pb2 import ConsistencyPoint, CursorValue, EntityRevision, PageCursor
from branchline_internal.task.v1 import task_pb2 as internal_task_pb2
from branchline_internal.user.v1 import user_pb2 as internal_user_pb2
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from cli.calls import operating
from services.runtime.client import MESSAGE_LIMIT_BYTES
from services.runtime.principal import METADATA_KEY, OPERATOR, Principal, Signer
from tests.support.requests import good, put, reflected
from tests.support.stack import Failure, Stack, failure_of, request_id

SEED = 20_240_901
AT_ONCE = 16
SECONDS = 60.0

CLEAR = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    }
)

LAST = ("ArchiveTask", "KillTask", "DeleteRepository", "DeleteOrganization")
"""Methods that take away what the others are tried on, in this order."""

TEXTS = (
    "",
    " ",
    "x" * 129,
    "é" * 40_000,
    "a\0b",
    "\U0010ffff\u202e\r\n",
    "%_'\"; DROP TABLE outbox; --",
)
PATHS = ("../../../etc/passwd", "/etc/passwd", "-rf")
"""For what ends as a path or an argument of a program; anywhere else they are words like any other."""

PLACES = ("path", "directory", "command", "branch", "url", "name")
NUMBERS = (0, 1, -1, 2**31 - 1, -(2**31))
LARGE_NUMBERS = (*NUMBERS, 2**63 - 1, -(2**63))

COORDINATORS = ("organization", "repository", "task")
OWN = {
    "organization": internal_organization_pb2.DESCRIPTOR.services_by_name["OrganizationService"],
    "repository": internal_repository_pb2.DESCRIPTOR.services_by_name["RepositoryService"],
    "task": internal_task_pb2.DESCRIPTOR.services_by_name["TaskService"],
    "sandbox": sandbox_pb2.DESCRIPTOR.services_by_name["SandboxService"],
    "user": internal_user_pb2.DESCRIPTOR.services_by_name["UserService"],
    "history": internal_history_pb2.DESCRIPTOR.services_by_name["HistoryService"],
    "github_data": github_data_pb2.DESCRIPTOR.services_by_name["GithubDataService"],
}
SOCKETS: list[tuple[str, ServiceDescriptor]] = [
    *OWN.items(),
    *((name, admin_pb2.DESCRIPTOR.services_by_name["AdminService"]) for name in OWN),
    *((name, push_pb2.DESCRIPTOR.services_by_name["PushService"]) for name in COORDINATORS),
]
"""Everything that the services serve among themselves, and to the operator."""


@dataclass
class Field:
    """What requests are aimed at, and the clients that send them."""

    stack: Stack
    methods: list[MethodDescriptor]
    clients: dict[str, Client]
    given: dict[str, Any]
    """A good value for each field, by its name."""

    foreign: dict[str, str]
    """Ids of another organization, by the name of their field."""

    turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(AT_ONCE))
    outcomes: Counter[str] = field(default_factory=Counter[str])
    unclear: list[str] = field(default_factory=list[str])

    async def send(self, caller: str, method: MethodDescriptor, data: bytes, what: str) -> None:
        """Send bytes to a method and judge the answer."""
        async with self.turns:
            problem = await answered(self.clients[caller].channel, method, data)
        self.outcomes[problem.code.name if problem else "OK"] += 1
        if problem is not None:
            words = unclear(problem)
            if words:
                self.unclear.append(f"{method.name} as {caller}, {what}: {words}")


async def answered(channel: Any, method: MethodDescriptor, data: bytes, metadata: Any = None) -> Failure | None:
    """Return how a call fails, or None. Of a stream the first answer is enough."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    try:
        if method.server_streaming:
            call = (
                channel.stream_stream(path)(iter([data]), timeout=SECONDS, metadata=metadata)
                if method.client_streaming
                else channel.unary_stream(path)(data, timeout=SECONDS, metadata=metadata)
            )
            try:
                await call.read()
            finally:
                call.cancel()
        else:
            await channel.unary_unary(path)(data, timeout=SECONDS, metadata=metadata)
    except grpc.aio.AioRpcError as error:
        return failure_of(error)
    return None


def unclear(problem: Failure) -> str:
    """Say what is wrong with a refusal; nothing if it is a clear one."""
    said = f"{problem.code.name} {problem.reason}: {problem.message[:200]}"
    if problem.code not in CLEAR or not problem.reason:
        return said
    if problem.code == grpc.StatusCode.INVALID_ARGUMENT and not all(problem.fields or [""]):
        return f"names no field: {said}"
    return ""


def bent(message: Any, foreign: Mapping[str, str], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (what, message), each with one field at or beyond its bounds, however deep."""
    for one in cast("list[FieldDescriptor]", message.DESCRIPTOR.fields):
        name = f"{path}{one.name}"
        for value in extremes(one, foreign):
            copy = type(message)()
            copy.CopyFrom(message)
            put(copy, one, value)
            yield f"{name}={str(value)[:40]!r}", copy
        if one.message_type is not None and not one.is_repeated:
            for what, inner in bent(getattr(message, one.name), foreign, f"{name}."):
                copy = type(message)()
                copy.CopyFrom(message)
                getattr(copy, one.name).CopyFrom(inner)
                yield what, copy


def extremes(one: FieldDescriptor, foreign: Mapping[str, str]) -> list[Any]:
    """Return values at and beyond the bounds of a field's type."""
    values: list[Any] = []
    if one.type == FieldDescriptor.TYPE_STRING:
        values = [*TEXTS, *([foreign[one.name]] if one.name in foreign else ())]
        if any(place in one.name for place in PLACES):
            values += PATHS
        if one.name.endswith("_token"):
            values += crafted()
    elif one.type == FieldDescriptor.TYPE_BYTES:
        values = [b"", b"\xff\0" * 600_000]
    elif one.type in {FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_ENUM}:
        values = list(NUMBERS)
    elif one.type == FieldDescriptor.TYPE_INT64:
        values = list(LARGE_NUMBERS)
    elif one.message_type is not None and one.is_repeated:
        values = [GetMessageClass(one.message_type)()]
    if one.is_repeated:
        return [[], *([value] for value in values), *([value] * 2_000 for value in values[2:3])]
    return values


def crafted() -> list[str]:
    """Return tokens that decode, and that we never gave out."""
    cursor = PageCursor(
        values=[CursorValue(text="\0"), CursorValue(number=-(2**63)), CursorValue(seconds=float("nan"))]
    )
    point = ConsistencyPoint(
        entities=[EntityRevision(kind=ENTITY_KIND_TASK, id="a\0b", revision=-1), EntityRevision(id="x")]
    )
    point.entities.add(revision=2**63 - 1).kind = cast("Any", 99)
    messages: list[Message] = [cursor, point]
    return ["%%%", "AAAA", "é", *(base64.urlsafe_b64encode(one.SerializeToString()).decode() for one in messages)]


def garbled(data: bytes, chance: random.Random) -> Iterator[tuple[str, bytes]]:
    """Yield (what, bytes) that are no request, or hardly one."""
    yield "nothing", b""
    yield "noise", chance.randbytes(200)
    yield "bytes that are no text", b"\x0a\x02\xff\xfe\x12\x02\xff\xfe\x1a\x02\xff\xfe" + data
    yield "a number in the place of a text", b"\x08\x01\x10\x01\x18\x01" + data
    yield "an unknown field", data + b"\xfa\x3f\x04abcd"
    yield "groups without end", data + b"\x0b" * 5_000
    yield "a length beyond the end", data + b"\x0a\xff\xff\xff\xff\x07"
    for _ in range(4):
        torn = bytearray(data)
        for _ in range(min(len(torn), 3)):
            torn[chance.randrange(len(torn))] = chance.randrange(256)
        yield "flipped bytes", bytes(torn[: chance.randrange(len(torn) + 1)] if chance.random() < 0.5 else torn)


@pytest_asyncio.fixture(loop_scope="session")
async def aimed(stack: Stack) -> AsyncGenerator[Field, None]:
    """An organization that is there to be shot at, and one beside it."""
    methods = await asyncio.to_thread(reflected, stack.address)
    owner, organization_id = stack.client, await stack.new_organization()
    viewer, _ = await stack.new_member(organizations_pb2.ROLE_VIEWER, organization_id)
    member, member_id = await stack.new_member(organizations_pb2.ROLE_MEMBER, organization_id)
    _, spare_id = await stack.new_member(organizations_pb2.ROLE_MEMBER, organization_id)
    other = await stack.new_organization()
    stranger, stranger_id = await stack.new_member(organizations_pb2.ROLE_OWNER, other)
    foreign_task = await stack.ready_task()
    home, stack.organization_id = stack.organization_id, organization_id
    try:
        repository_id = await stack.add_repository()
        task = await stack.ready_task(repository_id, agent="mock")
    finally:
        stack.organization_id = home
    token = await owner.users.CreateApiToken(users_pb2.CreateApiTokenRequest(name="spare"))
    given: dict[str, Any] = {
        "request_id": request_id,
        "organization_id": organization_id,
        "repository_id": repository_id,
        "task_id": task.id,
        "session_id": task.sessions[0].id,
        "user_id": spare_id,
        "token_id": token.api_token.id,
        "email": lambda: f"{request_id()}@example.com",
        "display_name": "Someone",
        "role": organizations_pb2.ROLE_VIEWER,
        "slug": lambda: f"f{request_id()[:12]}",
        "kind": organizations_pb2.ORGANIZATION_KIND_TEAM,
        "remote_url": lambda: f"https://example.invalid/{request_id()}.git",
        "text": "say hi",
        "name": "a name",
        "host": "example.invalid",
        "username": "someone",
        "secret": "hidden",
        "command": ["true"],
        "path": "README.md",
        "new_path": "README.txt",
        "entry_id": "ent_x",
        "option_id": "opt_x",
        "hold_prompt": True,
        "queue": True,
        "agent": "mock",
        "organization": organizations_pb2.Organization(display_name="Fuzz"),
        "update_mask": FieldMask(paths=["display_name", "settings"]),
        "preferences": users_pb2.UserPreferences(),
        "draft": users_pb2.Draft(text="half", attachments=[sessions_pb2.Attachment(path="a", content="b")]),
        "CreateTask.sandbox_provider": "nowhere",
        "CreateSession.agent": "nobody",
        "ListHistory.user_id": member_id,
    }
    foreign = {
        "organization_id": home,
        "repository_id": foreign_task.repository_id,
        "task_id": foreign_task.id,
        "session_id": foreign_task.sessions[0].id,
        "user_id": stranger_id,
    }
    clients = {"owner": owner, "member": member, "viewer": viewer, "stranger": stranger}
    async with Client(stack.address, "bl_nobody") as nobody:
        yield Field(stack, methods, {**clients, "nobody": nobody}, given, foreign)
    for client in (viewer, member, stranger):
        await client.close()


async def test_no_method_breaks_at_what_it_is_given(aimed: Field) -> None:  # F16
    chance = random.Random(SEED)
    assert len(aimed.methods) > 40
    early = [method for method in aimed.methods if method.name not in LAST]
    late = sorted((method for method in aimed.methods if method.name in LAST), key=lambda one: LAST.index(one.name))
    for methods in (early, *([method] for method in late)):
        sent: list[Any] = []
        for method in methods:
            request = good(method, aimed.given)
            data = request.SerializeToString()
            for caller in ("nobody", "stranger", "viewer", "member"):
                if caller != "member" or method not in late:
                    sent.append(aimed.send(caller, method, data, "a good request"))
            sent += [aimed.send("owner", method, one, what) for what, one in garbled(data, chance)]
            sent += [
                aimed.send("owner", method, one.SerializeToString(), what)
                for what, one in bent(request, aimed.foreign)
                if one.ByteSize() < MESSAGE_LIMIT_BYTES
            ]
        await asyncio.gather(*sent)

    assert not aimed.unclear, "\n".join(sorted(aimed.unclear))
    assert aimed.outcomes["OK"]
    await serves_on(aimed.stack)


async def test_no_socket_takes_what_carries_no_principal_of_ours(stack: Stack) -> None:
    forged = Signer("another installation's key", "gateway").metadata(Principal(service="gateway"))
    for name, service in SOCKETS:
        async with channel_to(stack, name) as channel:
            for method in service.methods:
                for metadata in (None, forged, ((METADATA_KEY, "x.y.z"),)):
                    problem = await answered(channel, method, b"", metadata)
                    assert problem is not None, method.full_name
                    assert (problem.code, problem.reason) == (
                        grpc.StatusCode.UNAUTHENTICATED,
                        "PRINCIPAL_INVALID",
                    ), method.full_name


async def test_no_socket_breaks_at_what_its_own_send(stack: Stack) -> None:  # F16
    wrong, outcomes = list[str](), Counter[str]()
    nowhere: dict[str, Any] = dict.fromkeys(
        ("task_id", "repository_id", "session_id", "sandbox_id", "user_id", "organization_id", "child"), "nowhere"
    )
    nowhere |= {"entries": push_pb2.PushEntry(outbox_seq=1, id="nowhere", revision=1)}
    key = stack.installation.signing_key.value
    gateway = Signer(key, "gateway")
    service_itself, operator = gateway.metadata(), Signer(key, OPERATOR).metadata()
    user = gateway.metadata(Principal(user_id="usr_x", organization_id="x"))

    async def shoot(channel: Any, method: MethodDescriptor, chance: random.Random) -> None:
        request = good(method, nowhere)
        whole = request.SerializeToString()
        given = [(service_itself, what, data) for what, data in garbled(whole, chance)]
        senders = {"AdminService": [operator], "OrganizationService": [operator, service_itself]}
        for sender in senders.get(method.containing_service.name, [service_itself]):
            given += [(sender, what, one.SerializeToString()) for what, one in bent(request, {})]
        given += [(caller, "a good request", whole) for caller in (service_itself, user, operator)]
        for caller, what, data in given:
            problem = await answered(channel, method, data, caller)
            outcomes[f"{method.full_name} {problem.code.name if problem else 'OK'}"] += 1
            if problem is not None and unclear(problem):
                wrong.append(f"{method.full_name}, {what}: {unclear(problem)}")

    async with AsyncExitStack() as opened:
        shots: list[Any] = []
        for name, service in SOCKETS:
            channel = await opened.enter_async_context(channel_to(stack, name))
            shots += [shoot(channel, method, random.Random(SEED)) for method in service.methods]
        await asyncio.gather(*shots)

    assert not wrong, "\n".join(wrong)
    assert {f"{method.full_name} OK" for _, service in SOCKETS[-len(COORDINATORS) :] for method in service.methods} <= {
        *outcomes
    }
    await serves_on(stack)


def channel_to(stack: Stack, name: str) -> Any:
    return grpc.aio.insecure_channel(
        stack.installation.addresses[name],
        options=(("grpc.default_authority", "localhost"), ("grpc.max_send_message_length", MESSAGE_LIMIT_BYTES)),
    )


async def serves_on(stack: Stack) -> None:
    """Assert that a task is made, that its agent works, that watches begin, and that nothing is parked."""
    task = await stack.create_task(await stack.add_repository(), "say hello")
    await stack.until(task.id, tasks_pb2.TASK_STATUS_IDLE, turn=1)
    watch = stack.client.organizations.WatchOrganization(
        organizations_pb2.WatchOrganizationRequest(organization_id=stack.organization_id)
    )
    assert await watch.read() is not grpc.aio.EOF
    watch.cancel()
    for name in stack.services:
        if name != "gateway":
            async with operating(stack.installation, name, AdminServiceStub) as admin:
                listed = await admin.ListOutbox(admin_pb2.ListOutboxRequest(parked=True))
            assert not listed.rows, f"{name}: {listed.rows}"
