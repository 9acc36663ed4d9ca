"""Every public method keeps what the contract says of all: who is let in, what strangers learn, what is too much."""

import asyncio
import re
import uuid
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import grpc
import pytest_asyncio
from branchline.v1 import organizations_pb2, users_pb2
from branchline.v1.options_pb2 import ACCESS_WRITE
from branchline.v1.roles_pb2 import ROLE_ADMIN, ROLE_MEMBER, ROLE_OWNER, ROLE_VIEWER, Role
from buf.validate import validate_pb2
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message_factory import GetMessageClass

from gateway.routes import PUBLIC, ROUTES, Route, rule_of
from tests.integration.test_repeated_commands import PREPARE
from tests.support.client import Client
from tests.support.requests import LAST, bent, exchanged, good, is_map, unclear
from tests.support.stack import Failure, Stack, eventually
from tests.support.targets import targets

AT_ONCE = 16
REFUSES_ROLE = (grpc.StatusCode.PERMISSION_DENIED, "ROLE_REQUIRED")
REFUSES_TOKEN = (grpc.StatusCode.PERMISSION_DENIED, "TOKEN_LIMITED")
IS_NOT_THERE = (grpc.StatusCode.NOT_FOUND, "RESOURCE_NOT_FOUND")
OPENS_BY_ITSELF = "OrganizationService/AcceptInvitation"
"""An invitation's code is all the proof there is: whoever has it is let in."""


@dataclass
class House:
    """An organization with one of everything, and people with each role."""

    word: str
    """Said in all that has words in it."""

    organization_id: str
    people: dict[Role.ValueType, Client]
    given: dict[str, Any]


@dataclass
class Walk:
    """Two organizations that know nothing of each other."""

    stack: Stack
    house: House
    other: House

    async def call(self, client: Client, name: str, request: Any) -> tuple[Failure | None, bytes]:
        return await exchanged(client.channel, PUBLIC[name], request.SerializeToString())

    async def seen(self) -> dict[str, Any]:
        """Return all that the owner of the house sees."""
        seen: dict[str, Any] = {}
        for name in (name for name, route in ROUTES.items() if not route.stream and looks(name)):
            problem, answer = await self.call(self.house.people[ROLE_OWNER], name, self.good(name))
            assert problem is None, f"{name}: {problem}"
            seen[name] = GetMessageClass(PUBLIC[name].output_type).FromString(answer)
            if "resume_token" in PUBLIC[name].output_type.fields_by_name:
                seen[name].ClearField("resume_token")  # it counts what happens to all organizations
        return seen

    def good(self, name: str) -> Any:
        return good(PUBLIC[name], self.house.given)


def looks(name: str) -> bool:
    return name.partition("/")[2].startswith(("Get", "List", "Read"))


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def walk(stack: Stack) -> AsyncGenerator[Walk, None]:
    house, other = [await _house(stack, f"w{uuid.uuid4().hex}") for _ in range(2)]
    yield Walk(stack, house, other)
    for client in (*house.people.values(), *other.people.values()):
        await client.close()


async def _house(stack: Stack, word: str) -> House:
    organization_id = await stack.new_organization(word)
    people = {role: (await stack.new_member(role, organization_id))[0] for role in Role.values() if role}
    _, spare_id = await stack.new_member(ROLE_MEMBER, organization_id)
    home, stack.organization_id = stack.organization_id, organization_id
    try:
        given = await targets(stack, people[ROLE_OWNER], organization_id, word)
    finally:
        stack.organization_id = home
    member = organizations_pb2.Member(organization_id=organization_id, user_id=spare_id, role=ROLE_VIEWER)
    return House(word, organization_id, people, {**given, "user_id": spare_id, "member": member})


@pytest_asyncio.fixture(loop_scope="session")
async def untouched(walk: Walk) -> AsyncGenerator[Walk, None]:
    """The house must look the same to its owner afterwards."""

    async def rests() -> dict[str, Any] | None:
        before = await walk.seen()
        await asyncio.sleep(0.2)
        return before if before == await walk.seen() else None

    before = await eventually(rests)
    yield walk
    after = await walk.seen()
    assert [name for name in before if before[name] != after[name]] == []


def outcome(problem: Failure | None) -> tuple[grpc.StatusCode, str]:
    return (problem.code, problem.reason) if problem else (grpc.StatusCode.OK, "")


async def test_nobody_is_let_in_without_a_valid_token(untouched: Walk) -> None:  # API-6
    wrong: list[str] = []

    async def call(client: Client, name: str, reason: str) -> None:
        problem, answer = await untouched.call(client, name, untouched.good(name))
        if outcome(problem) != (grpc.StatusCode.UNAUTHENTICATED, reason) or answer:
            wrong.append(f"{name}: {problem or answer}")

    address = untouched.stack.address
    async with Client(address) as nobody, Client(address, f"bl_{'x' * 43}") as garbage:
        known = [call(nobody, name, "TOKEN_MISSING") for name, route in ROUTES.items() if not route.anonymous]
        await asyncio.gather(*known, *(call(garbage, name, "TOKEN_INVALID") for name in ROUTES))

    assert not wrong, "\n".join(wrong)


async def test_to_others_nothing_of_an_organization_is_there(untouched: Walk) -> None:  # ORG-10
    wrong: list[str] = []
    for name, route in ROUTES.items():
        if name == OPENS_BY_ITSELF:
            continue
        request = untouched.good(name)
        problem, answer = await untouched.call(untouched.other.people[ROLE_OWNER], name, request)
        named = route.target or (
            name.partition("/")[2].startswith(("Update", "Delete", "Revoke")) and "UpdateUser" not in name
        )
        if outcome(problem) != (IS_NOT_THERE if named else (grpc.StatusCode.OK, "")):
            wrong.append(f"{name}: {problem}")
        if problem is not None and route.target and problem.resource != route.wanted(request):
            wrong.append(f"{name} names {problem.resource}")
        if shows(untouched.house, answer):
            wrong.append(f"{name} shows what is another organization's")

    assert not wrong, "\n".join(wrong)


async def test_what_is_another_organizations_cannot_be_named_in_ones_own(untouched: Walk) -> None:  # ORG-10
    wrong: list[str] = []
    for name, route in ROUTES.items():
        own, foreign = good(PUBLIC[name], untouched.other.given), untouched.good(name)
        for path, mixed in with_foreign(own, foreign):
            if path == ".".join(route.scope) or path in {"code"}:
                continue
            problem, answer = await untouched.call(untouched.other.people[ROLE_OWNER], name, mixed)
            if (problem and unclear(problem)) or shows(untouched.house, answer):
                wrong.append(f"{name} {path}: {problem or answer}")

    assert not wrong, "\n".join(wrong)


def shows(house: House, answer: bytes) -> bool:
    return house.word.encode() in answer


ITS_OWN = frozenset({"request_id", "slug", "email", "remote_url", "text", "description", "display_name", "sha256"})
"""Texts that are no names of what is there."""


def with_foreign(own: Any, foreign: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, request), each with one id of the other request."""
    for one, value in foreign.ListFields():
        name = f"{path}{one.name}"
        if one.name in ITS_OWN or is_map(one) or value == getattr(own, one.name):
            continue
        if one.type == FieldDescriptor.TYPE_STRING:
            copy = type(own)()
            copy.CopyFrom(own)
            copy.MergeFrom(type(own)(**{one.name: value}))
            yield name, copy
        elif one.message_type is not None:
            held = getattr(own, one.name)
            pairs = zip(held, value, strict=True) if one.is_repeated else [(held, value)]
            for place, (mine, other) in enumerate(pairs):
                for where, inner in with_foreign(mine, other, f"{name}."):
                    copy = type(own)()
                    copy.CopyFrom(own)
                    at = getattr(copy, one.name)
                    (at[place] if one.is_repeated else at).CopyFrom(inner)
                    yield where, copy


async def test_too_low_a_role_is_refused_with_the_one_that_is_needed(untouched: Walk) -> None:  # ORG-3
    wrong: list[str] = []
    for name, route in ROUTES.items():
        needed = ROLE_ADMIN if name == "OrganizationService/RemoveMember" else route.role
        for role, client in untouched.house.people.items():
            if not route.target or role >= needed:
                continue
            problem, answer = await untouched.call(client, name, untouched.good(name))
            metadata = {"role": role_name(role), "required_role": role_name(needed)}
            if outcome(problem) != REFUSES_ROLE or answer or (problem and problem.metadata != metadata):
                wrong.append(f"{name} as {role_name(role)}: {problem}")

    assert not wrong, "\n".join(wrong)


def role_name(role: int) -> str:
    return Role.Name(Role.ValueType(role)).removeprefix("ROLE_").lower()


async def test_a_token_may_no_more_than_its_scope(untouched: Walk) -> None:  # USR-3
    house, wrong = untouched.house, list[str]()
    viewers = users_pb2.TokenScope(role=ROLE_VIEWER)
    elsewhere = users_pb2.TokenScope(role=ROLE_OWNER, organization_ids=[untouched.other.organization_id])
    made = [
        await house.people[ROLE_ADMIN].users.CreateApiToken(
            users_pb2.CreateApiTokenRequest(display_name="held", scope=scope)
        )
        for scope in (viewers, elsewhere)
    ]
    address = untouched.stack.address
    async with Client(address, made[0].secret) as viewer, Client(address, made[1].secret) as absent:
        for name, route in ROUTES.items():
            for client, refusal in ((viewer, REFUSES_ROLE), (absent, IS_NOT_THERE)):
                problem, answer = await untouched.call(client, name, untouched.good(name))
                expected = expected_of(name, route, refusal)
                if outcome(problem) != expected or (client is absent and shows(house, answer)):
                    wrong.append(f"{name} {refusal}: {problem or answer}")
        seen = [await one.users.GetCurrentUser(users_pb2.GetCurrentUserRequest()) for one in (viewer, absent)]

    assert [[place.role for place in one.memberships] for one in seen] == [[ROLE_VIEWER], []]
    assert not wrong, "\n".join(wrong)


def expected_of(name: str, route: Route, refusal: tuple[grpc.StatusCode, str]) -> tuple[grpc.StatusCode, str]:
    if not route.target and not route.read:
        return REFUSES_TOKEN
    needed = ROLE_ADMIN if name == "OrganizationService/RemoveMember" else route.role
    return refusal if route.target and (refusal == IS_NOT_THERE or needed > ROLE_VIEWER) else (grpc.StatusCode.OK, "")


def test_every_change_is_tried_twice() -> None:  # API-3
    changes = {name.partition("/")[2] for name, method in PUBLIC.items() if rule_of(method).access == ACCESS_WRITE}

    assert changes - set(PREPARE) == {"WriteBlob"}  # bytes at an offset


async def test_what_is_at_a_limit_is_taken_and_what_is_beyond_it_is_named(walk: Walk) -> None:  # API-6, F16
    turns, wrong, tried = asyncio.Semaphore(AT_ONCE), list[str](), [0, 0]

    async def call(name: str, path: str, edge: "Edge", request: Any) -> None:
        async with turns:
            problem, _ = await walk.call(walk.house.people[ROLE_OWNER], name, request)
        said = f"{name} {path} {edge.what}: {problem}"
        tried[edge.fits] += 1
        if problem is not None and unclear(problem):
            wrong.append(said)
        if edge.fits and refuses(problem, path) and path not in MORE_THAN_LENGTH:
            wrong.append(said)
        if not edge.fits and not refuses(problem, path):
            wrong.append(said)

    early = [name for name in ROUTES if name.partition("/")[2] not in LAST]
    late = sorted((name for name in ROUTES if name not in early), key=lambda name: LAST.index(name.partition("/")[2]))
    for names in (early, late):
        await asyncio.gather(
            *(
                call(name, path.replace("[0]", ""), edge, request)
                for name in names
                for path, edge, request in bent(walk.good(name), edges)
            )
        )

    assert not wrong, "\n".join(wrong)
    assert min(tried) > 100


def refuses(problem: Failure | None, path: str) -> bool:
    """Say whether a field is refused for what is in it."""
    invalid = (grpc.StatusCode.INVALID_ARGUMENT, "FIELD_INVALID")
    return problem is not None and outcome(problem) == invalid and path in problem.fields


MORE_THAN_LENGTH = frozenset({"data", "new_path", "order_by", "path", "remote_url", "spec.command", "user.id"})
"""Fields that have rules beside their length, which nothing of mere length keeps."""


@dataclass(frozen=True)
class Edge:
    """A value at a limit of a field, or just beyond."""

    what: str
    fits: bool


def edges(message: Any, one: FieldDescriptor) -> Iterator[tuple[Edge, Any]]:
    """Yield (edge, value) for every rule of a field."""
    rules = one.GetOptions().Extensions[validate_pb2.field]
    if rules.required:
        yield Edge("absent", fits=False), None
    if is_map(one):
        yield from _map_edges(rules.map)
    elif one.is_repeated:
        yield from _list_edges(message, one, rules.repeated)
    elif one.type == FieldDescriptor.TYPE_STRING:
        yield from _text_edges(rules.string)
    elif one.type == FieldDescriptor.TYPE_BYTES:
        yield from ((Edge(f"{size} bytes", fits), b"x" * size) for size, fits in _sizes(rules.bytes, "len"))
    elif one.type == FieldDescriptor.TYPE_ENUM:
        yield from ((Edge(str(bad), fits=False), bad) for bad in rules.enum.not_in)
        if rules.enum.defined_only:
            yield Edge("9999", fits=False), 9999
    elif one.message_type is not None and one.message_type.full_name == Duration.DESCRIPTOR.full_name:
        yield from _time_edges(rules.duration)
    elif one.type in {FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_INT64}:
        numbers = rules.int32 if one.type == FieldDescriptor.TYPE_INT32 else rules.int64
        if numbers.HasField("gte"):
            yield Edge(str(numbers.gte), fits=True), numbers.gte
            yield Edge(str(numbers.gte - 1), fits=False), numbers.gte - 1
        if numbers.HasField("lte"):
            yield Edge(str(numbers.lte), fits=True), numbers.lte
            yield Edge(str(numbers.lte + 1), fits=False), numbers.lte + 1


def _sizes(rules: Any, of: str) -> Iterator[tuple[int, bool]]:
    """Yield (size, whether it fits) for the least and the most of something."""
    least, most = getattr(rules, f"min_{of}"), getattr(rules, f"max_{of}")
    if least:
        yield least - 1, False
    if most:
        yield most, True
        yield most + 1, False


def _text_edges(rules: Any) -> Iterator[tuple[Edge, str]]:
    def fits(text: str) -> bool:
        return re.search(rules.pattern, text) is not None and not rules.email and not rules.uuid

    if rules.pattern:
        yield Edge("another pattern", fits=False), "!\n"
    if rules.uuid or rules.email:
        yield Edge("another form", fits=False), "x"
    for size, right in _sizes(rules, "len"):
        yield from [(Edge(f"{size} characters", right), "a" * size)] if fits("a" * size) or not right else []
        if right and fits("\U0001f600"):
            yield Edge(f"{size} wide characters", fits=True), "\U0001f600" * size
    for size, right in _sizes(rules, "bytes"):
        if fits("a" * size) and (not rules.max_len or size <= rules.max_len):
            yield Edge(f"{size} bytes", right), "a" * size
        elif not right:
            yield Edge(f"{size} bytes", fits=False), "a" * size
    if rules.max_bytes and not rules.max_len:
        yield Edge("too many bytes in characters that are not", fits=False), "é" * (rules.max_bytes // 2 + 1)


def _list_edges(message: Any, one: FieldDescriptor, rules: Any) -> Iterator[tuple[Edge, list[Any]]]:
    held = list(getattr(message, one.name))
    item = held[0] if held else 1 if one.type == FieldDescriptor.TYPE_ENUM else "a"
    if one.message_type is not None and not held:
        item = GetMessageClass(one.message_type)()
    for size, fits in _sizes(rules, "items"):
        if not fits or held or one.message_type is None:
            yield Edge(f"{size} items", fits), [item] * size
    if one.type == FieldDescriptor.TYPE_STRING:
        yield from ((edge, [text]) for edge, text in _text_edges(rules.items.string))
    if one.type == FieldDescriptor.TYPE_ENUM:
        yield from ((Edge(f"an item {bad}", fits=False), [bad]) for bad in (*rules.items.enum.not_in, 9999))


def _map_edges(rules: Any) -> Iterator[tuple[Edge, dict[str, str]]]:
    for size, fits in _sizes(rules, "pairs"):
        yield Edge(f"{size} pairs", fits), {f"V{number}": "" for number in range(size)}
    yield from ((Edge(f"a key of {edge.what}", edge.fits), {text: ""}) for edge, text in _text_edges(rules.keys.string))
    yield from (
        (Edge(f"a value of {edge.what}", edge.fits), {"V": text}) for edge, text in _text_edges(rules.values.string)
    )


def _time_edges(rules: Any) -> Iterator[tuple[Edge, Duration]]:
    def lasting(time: timedelta) -> Duration:
        duration = Duration()
        duration.FromTimedelta(time)
        return duration

    moment = timedelta(microseconds=1)
    if rules.HasField("gte"):
        yield Edge("shortest", fits=True), rules.gte
        yield Edge("shorter", fits=False), lasting(rules.gte.ToTimedelta() - moment)
    if rules.HasField("lte"):
        yield Edge("longest", fits=True), rules.lte
        yield Edge("longer", fits=False), lasting(rules.lte.ToTimedelta() + moment)
