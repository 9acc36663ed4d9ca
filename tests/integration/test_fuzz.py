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
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import branchline_internal
import grpc
import pytest_asyncio
from branchline.v1 import (
    organizations_pb2,
    roles_pb2,
    tasks_pb2,
)
from branchline.v1.common_pb2 import ENTITY_KIND_TASK
from branchline_internal.admin.v1 import admin_pb2
from branchline_internal.admin.v1.admin_pb2_grpc import AdminServiceStub
from branchline_internal.spine.v1 import push_pb2
from branchline_internal.spine.v1.push_pb2 import ConsistencyPoint, CursorValue, EntityRevision, PageCursor, ResumePoint
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.struct_pb2 import Struct

from cli.calls import operating
from gateway.routes import PUBLIC, ROUTES
from services.runtime.client import MESSAGE_LIMIT_BYTES
from services.runtime.principal import METADATA_KEY, OPERATOR, Principal, Signer
from tests.support.client import Client
from tests.support.requests import LAST, answered, bent, good, is_map, reflected, unclear
from tests.support.stack import Stack
from tests.support.targets import targets

SEED = 20_240_901
AT_ONCE = 16

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


def _internal() -> dict[str, MethodDescriptor]:
    """Return every method that is no client's, by its full name."""
    folder = Path(*branchline_internal.__path__)
    names = (".".join(path.relative_to(folder.parent).with_suffix("").parts) for path in folder.rglob("*_pb2.py"))
    services = [one for name in names for one in import_module(name).DESCRIPTOR.services_by_name.values()]
    return {method.full_name: method for service in services for method in service.methods}


INTERNAL = _internal()
EVERY = INTERNAL | {method.full_name: method for method in PUBLIC.values()}


def sockets(stack: Stack) -> dict[str, list[MethodDescriptor]]:
    """Return everything that the services serve among themselves, and to the operator, by the service's name."""
    return {
        name: [
            EVERY[f"{served}.{method}"]
            for served, methods in service._handlers.items()  # pyright: ignore[reportPrivateUsage]
            for method in methods
        ]
        for name, service in stack.services.items()
        if name != "gateway"
    }


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


def extreme(request: Any, foreign: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """Yield (what, request), each with one field at or beyond its bounds, however deep."""

    def values(_: Any, one: FieldDescriptor) -> Iterator[tuple[str, Any]]:
        return ((f"{str(value)[:40]!r}", value) for value in extremes(one, foreign))

    for path, what, bad in bent(request, values):
        yield f"{path}={what}", bad


def extremes(one: FieldDescriptor, foreign: Mapping[str, str]) -> list[Any]:
    """Return values at and beyond the bounds of a field's type."""
    values: list[Any] = []
    if one.message_type is not None and is_map(one):
        return MAPS if one.message_type.fields_by_name["value"].type == FieldDescriptor.TYPE_STRING else []
    if one.type == FieldDescriptor.TYPE_STRING:
        values = [*TEXTS, *([foreign[one.name]] if one.name in foreign else ())]
        if any(place in one.name for place in PLACES):
            values += PATHS
        if one.name.endswith("_token") or one.name == "at_least_as_fresh":
            values += crafted()
    elif one.type == FieldDescriptor.TYPE_BYTES:
        values = [b"", b"\xff\0" * 600_000]
    elif one.type in {FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_ENUM}:
        values = list(NUMBERS)
    elif one.type == FieldDescriptor.TYPE_INT64:
        values = list(LARGE_NUMBERS)
    elif one.type == FieldDescriptor.TYPE_BOOL:
        values = [False, True]
    elif one.message_type is not None and one.message_type.full_name == Struct.DESCRIPTOR.full_name:
        values = STRUCTS
    elif one.message_type is not None and one.is_repeated:
        values = [GetMessageClass(one.message_type)()]
    if one.is_repeated:
        return [[], *([value] for value in values), *([value] * 2_000 for value in values[2:3])]
    return values


MAPS: list[Mapping[str, str]] = [
    {"": ""},
    {"A": "x" * 5_000},
    {"a\0b": "a\0b"},
    {"A": "\0", "B=C": "\n", "PATH": "", "LD_PRELOAD": "/nowhere"},
    {f"V{number}": "" for number in range(2_000)},
]


def struct(value: Any) -> Struct:
    made = Struct()
    made.update({"a": value})
    return made


def deep(levels: int) -> Any:
    value: Any = "the ground"
    for _ in range(levels):
        value = {"deeper": value}
    return value


STRUCTS = [
    struct(""),
    struct(float("inf")),
    struct("\0" * 20_000),
    struct({str(number): number for number in range(5_000)}),
    struct(deep(20)),
]


def bottomless(message: Descriptor, within: tuple[str, ...] = ()) -> Iterator[bytes]:
    """Yield requests that hold a `Struct`, wherever one can be, with more levels than any parser takes."""
    if message.full_name == Struct.DESCRIPTOR.full_name:
        yield BOTTOMLESS
        return
    for one in message.fields:
        if one.message_type is not None and one.message_type.full_name not in within:
            for inner in bottomless(one.message_type, (*within, message.full_name)):
                yield delimited(one.number, inner)


def delimited(number: int, data: bytes) -> bytes:
    """Return bytes as a field of a message."""
    size, varint = len(data), bytearray()
    while size >= 128:
        varint.append(size & 127 | 128)
        size >>= 7
    return bytes([number << 3 | 2]) + bytes([*varint, size]) + data


def bottomless_struct() -> bytes:
    """Return a `Struct` in the value of a `Struct`, and so on."""
    data = b""
    for _ in range(2_000):
        data = delimited(1, delimited(1, b"a") + delimited(2, delimited(5, data)))
    return data


BOTTOMLESS = bottomless_struct()


def crafted() -> list[str]:
    """Return tokens that decode, and that we never gave out."""
    cursor = PageCursor(
        values=[CursorValue(text="\0"), CursorValue(number=-(2**63)), CursorValue(seconds=float("nan"))]
    )
    point = ConsistencyPoint(
        entities=[EntityRevision(kind=ENTITY_KIND_TASK, id="a\0b", revision=-1), EntityRevision(id="x")]
    )
    point.entities.add(revision=2**63 - 1).kind = cast("Any", 99)
    resume = ResumePoint(topic="org_x\0", epoch="\0", change_seq=-1, selection=b"\0")
    messages: list[Message] = [cursor, point, resume]
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
    organization_id, other = await stack.new_organization(), await stack.new_organization()
    owner, _ = await stack.new_member(roles_pb2.ROLE_OWNER, organization_id)
    viewer, _ = await stack.new_member(roles_pb2.ROLE_VIEWER, organization_id)
    member, member_id = await stack.new_member(roles_pb2.ROLE_MEMBER, organization_id)
    _, spare_id = await stack.new_member(roles_pb2.ROLE_MEMBER, organization_id)
    stranger, stranger_id = await stack.new_member(roles_pb2.ROLE_OWNER, other)
    foreign_task = await stack.ready_task()
    home, stack.organization_id = stack.organization_id, organization_id
    try:
        given = await targets(stack, owner, organization_id)
    finally:
        stack.organization_id = home
    given |= {
        "user_id": spare_id,
        "member": organizations_pb2.Member(
            organization_id=organization_id, user_id=spare_id, role=roles_pb2.ROLE_ADMIN
        ),
        "ListHistoryEvents.user_id": member_id,
    }
    foreign = {
        "organization_id": home,
        "repository_id": foreign_task.repository_id,
        "task_id": foreign_task.id,
        "session_id": (await stack.session(foreign_task.id)).id,
        "user_id": stranger_id,
    }
    clients = {"owner": owner, "member": member, "viewer": viewer, "stranger": stranger}
    async with Client(stack.address, "bl_nobody") as nobody:
        yield Field(stack, methods, {**clients, "nobody": nobody}, given, foreign)
    for client in clients.values():
        await client.close()


async def test_no_method_breaks_at_what_it_is_given(aimed: Field) -> None:  # F16
    chance = random.Random(SEED)
    assert {method.full_name for method in aimed.methods} == {method.full_name for method in PUBLIC.values()}
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
                aimed.send("owner", method, data + one, "levels without end") for one in bottomless(method.input_type)
            ]
            sent += [
                aimed.send("owner", method, one.SerializeToString(), what)
                for what, one in extreme(request, aimed.foreign)
                if one.ByteSize() < MESSAGE_LIMIT_BYTES
            ]
        await asyncio.gather(*sent)

    assert not aimed.unclear, "\n".join(sorted(aimed.unclear))
    assert aimed.outcomes["OK"]
    await serves_on(aimed.stack)


def test_every_method_is_served_by_a_socket(stack: Stack) -> None:
    served = {method.full_name for methods in sockets(stack).values() for method in methods}
    gateways = {route.method.full_name for route in ROUTES.values() if route.owner == "gateway"}

    assert served == {*EVERY} - gateways


async def test_no_socket_takes_what_carries_no_principal_of_ours(stack: Stack) -> None:
    stranger, ours = (
        Signer("another installation's key", "gateway"),
        Signer(stack.installation.signing_key.value, "gateway"),
    )
    for name, methods in sockets(stack).items():
        forged = stranger.metadata(name, Principal(service="gateway"))
        for_another = ours.metadata("another", Principal(service="gateway"))
        async with channel_to(stack, name) as channel:
            for method in methods:
                for metadata in (None, forged, for_another, ((METADATA_KEY, "x.y.z"),)):
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

    async def shoot(name: str, channel: Any, method: MethodDescriptor, chance: random.Random) -> None:
        service_itself, operator = gateway.metadata(name), Signer(key, OPERATOR).metadata(name)
        user = gateway.metadata(name, Principal(user_id="usr_x", organization_id="x"))
        request = good(method, nowhere)
        whole = request.SerializeToString()
        given = [(service_itself, what, data) for what, data in garbled(whole, chance)]
        given += [(service_itself, "levels without end", whole + data) for data in bottomless(method.input_type)]
        senders = {"AdminService": [operator], "OrganizationService": [operator, service_itself]}
        for sender in senders.get(method.containing_service.name, [service_itself]):
            given += [(sender, what, one.SerializeToString()) for what, one in extreme(request, {})]
        given += [(caller, "a good request", whole) for caller in (service_itself, user, operator)]
        for caller, what, data in given:
            problem = await answered(channel, method, data, caller)
            outcomes[f"{method.full_name} {problem.code.name if problem else 'OK'}"] += 1
            if problem is not None and unclear(problem):
                wrong.append(f"{method.full_name}, {what}: {unclear(problem)}")

    async with AsyncExitStack() as opened:
        shots: list[Any] = []
        for name, methods in sockets(stack).items():
            channel = await opened.enter_async_context(channel_to(stack, name))
            inside = [method for method in methods if method.full_name in INTERNAL]
            shots += [shoot(name, channel, method, random.Random(SEED)) for method in inside]
        await asyncio.gather(*shots)

    assert not wrong, "\n".join(wrong)
    assert outcomes["branchline.internal.spine.v1.PushService.Push OK"]
    assert {*INTERNAL} == {outcome.split()[0] for outcome in outcomes}
    await serves_on(stack)


def channel_to(stack: Stack, name: str) -> Any:
    return grpc.aio.insecure_channel(
        stack.installation.addresses[name],
        options=(("grpc.default_authority", "localhost"), ("grpc.max_send_message_length", MESSAGE_LIMIT_BYTES)),
    )


async def serves_on(stack: Stack) -> None:
    """Assert that a task is made, that its agent works, that watches begin, and that nothing is parked."""
    task = await stack.create_task(await stack.add_repository(), "say hello")
    await stack.until(task.id, activity=tasks_pb2.TASK_ACTIVITY_IDLE, turn=1)
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
