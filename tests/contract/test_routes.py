"""The public contract and the gateway's routes agree, and reads go to two services alone. API-2."""

from pathlib import Path

import branchline.v1 as public
import pytest
from branchline.v1 import options_pb2
from branchline.v1.options_pb2 import ACCESS_MACHINE, ACCESS_READ, ACCESS_WRITE, LEVEL_GATEWAY, LEVEL_SANDBOX
from branchline.v1.roles_pb2 import ROLE_ADMIN, ROLE_MEMBER, ROLE_OWNER, ROLE_VIEWER
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.descriptor_pb2 import MethodOptions
from google.protobuf.message_factory import GetMessageClass

from gateway.routes import (
    ANONYMOUS,
    ORGANIZATION,
    PACKAGE,
    PUBLIC,
    REPOSITORY,
    ROUTES,
    SANDBOX,
    TASK,
    USER,
    rule_of,
)
from gateway.service import GatewayConfig, build
from services.runtime.config import Secret

GATEWAY = build(
    GatewayConfig(
        addresses=dict.fromkeys((ORGANIZATION, REPOSITORY, TASK, SANDBOX, USER, "gateway"), "127.0.0.1:0"),
        signing_key=Secret("k" * 32),
    )
)
SERVED = GATEWAY._handlers  # pyright: ignore[reportPrivateUsage]
READING = ("Get", "List", "Read", "Watch")
BYTES = {"BlobService/ReadBlob", "BlobService/WriteBlob"}
"""Bytes at an offset of something that its caller made: the same however often they are written, and there at once."""

NOT_REPEATED = {
    "FileService/DeleteFile",
    "FileService/MoveFile",
    "ProcessService/SignalProcess",
}
"""Done twice they do something else than once, and the machine they are done in remembers no requests."""


def idempotency(method: MethodDescriptor) -> int:
    return method.GetOptions().idempotency_level


def test_the_gateway_serves_every_public_method_and_nothing_else() -> None:
    served = {f"{service}/{method}" for service, methods in SERVED.items() for method in methods}

    assert served == {f"{PACKAGE}.{name}" for name in PUBLIC}


def test_nothing_internal_can_be_reached_through_it() -> None:  # operators call services on their own ports
    assert all(service.startswith(f"{PACKAGE}.") for service in SERVED)
    assert not [service for service in SERVED if "Admin" in service or "Push" in service]


def test_the_whole_public_contract_is_known_to_it() -> None:
    package = Path(public.__path__[0])
    stubs = {path.stem.removesuffix("_pb2_grpc") for path in package.glob("*_pb2_grpc.py")}
    known = {
        method.containing_service.file.name.rpartition("/")[2].removesuffix(".proto") for method in PUBLIC.values()
    }

    assert known == {name for name in stubs if "add_" in (package / f"{name}_pb2_grpc.py").read_text()}


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_method_says_in_the_contract_what_it_does_where_and_who_may(name: str) -> None:
    method, rule = PUBLIC[name], rule_of(PUBLIC[name])

    assert rule.access in {ACCESS_READ, ACCESS_WRITE, ACCESS_MACHINE}
    assert rule.level != options_pb2.LEVEL_UNSPECIFIED
    assert rule.required_role or not rule.scope or rule.anonymous
    assert (rule.access == ACCESS_MACHINE) <= (rule.level == LEVEL_SANDBOX)
    assert not method.client_streaming  # browsers have no such streams


def test_deletion_needs_the_role_that_the_contract_names() -> None:
    roles = {name: route.role for name, route in ROUTES.items() if "Delete" in name or "Member" in name}

    assert roles["OrganizationService/DeleteOrganization"] == ROLE_OWNER
    assert roles["RepositoryService/DeleteRepository"] == ROLE_ADMIN
    assert roles["OrganizationService/InviteMember"] == roles["OrganizationService/UpdateMember"] == ROLE_ADMIN
    assert roles["OrganizationService/RemoveMember"] == ROLE_VIEWER  # everybody may leave: the organization decides


def test_who_may_only_look_changes_nothing_of_a_task_and_reaches_into_no_machine() -> None:
    looking = {name for name, route in ROUTES.items() if route.role == ROLE_VIEWER and route.target}
    own = {
        "OrganizationService/RemoveMember",
        "UserService/UpdateUserTaskState",
    }

    assert {name for name in looking if not ROUTES[name].read} == own
    machine = {name: ROUTES[name].role for name, method in PUBLIC.items() if rule_of(method).access == ACCESS_MACHINE}
    assert set(machine.values()) == {ROLE_MEMBER}


def test_streams_are_routed_as_streams() -> None:
    for name, route in ROUTES.items():
        assert route.stream == PUBLIC[name].server_streaming == route.name.partition("/")[2].startswith("Watch"), name


def test_reads_are_served_by_organization_and_repository_or_from_their_indexes() -> None:
    reads = {name: route.owner for name, route in ROUTES.items() if route.read}

    assert {owner for name, owner in reads.items() if name not in GATEWAYS} <= {ORGANIZATION, REPOSITORY}
    gateways = {name for name, method in PUBLIC.items() if rule_of(method).level == LEVEL_GATEWAY}
    assert gateways == GATEWAYS


GATEWAYS = {
    "HistoryService/WatchHistory",
    "OrganizationService/WatchOrganization",
    "ServerService/GetServerInfo",
    "TaskService/WatchTask",
}
"""Answered by the gateway itself."""


def test_what_is_a_read_is_called_so_and_what_reaches_into_a_machine_is_none() -> None:
    for name, route in ROUTES.items():
        reads = name.partition("/")[2].startswith(READING) and rule_of(PUBLIC[name]).access != ACCESS_MACHINE
        assert route.read == reads, name
        assert not route.read or idempotency(PUBLIC[name]) == MethodOptions.NO_SIDE_EFFECTS, name


def test_a_scope_is_a_path_to_a_field_that_must_be_given_and_names_something_that_can_be_placed() -> None:
    for name, route in ROUTES.items():
        if not route.scope:
            continue
        message = PUBLIC[name].input_type
        for step in route.scope[:-1]:
            inner = message.fields_by_name[step].message_type
            assert inner is not None, name
            message = inner
        assert message.fields_by_name[route.scope[-1]].type == FieldDescriptor.TYPE_STRING, name
        assert route.target in {"organization_id", "repository_id", "task_id"}, name


def test_a_scope_that_is_not_given_is_named_by_its_path() -> None:
    request = GetMessageClass(PUBLIC["TaskService/UpdateTask"].input_type)()

    with pytest.raises(Exception, match="must be given") as refused:
        ROUTES["TaskService/UpdateTask"].wanted(request)
    assert getattr(refused.value, "violations")[0][0] == "task.id"  # noqa: B009


def test_every_mutation_takes_a_request_id_and_what_changes_an_index_answers_a_token() -> None:
    for name, method in PUBLIC.items():
        if rule_of(method).access == ACCESS_WRITE:
            assert idempotency(method) == MethodOptions.IDEMPOTENT, name
        if rule_of(method).access == ACCESS_WRITE and name not in BYTES:
            assert method.input_type.fields_by_name["request_id"].number == 1, name
            assert "consistency_token" in method.output_type.fields_by_name, name


def test_every_read_takes_how_fresh_it_must_be_and_every_list_pages() -> None:
    for name, method in PUBLIC.items():
        route, fields = ROUTES[name], method.input_type.fields_by_name
        if route.read and name not in {*BYTES, "ServerService/GetServerInfo"}:
            freshness = fields["consistency"].message_type
            assert freshness is not None, name
            assert freshness.full_name == f"{PACKAGE}.Consistency", name
        if name.partition("/")[2].startswith("List"):
            assert {"page_size", "page_token"} <= set(fields), name
            assert "next_page_token" in method.output_type.fields_by_name, name


def test_only_what_is_done_once_however_often_it_is_asked_is_repeated() -> None:
    unnamed = {name for name, route in ROUTES.items() if route.repeatable(GetMessageClass(PUBLIC[name].input_type)())}
    for name, method in PUBLIC.items():
        if name in unnamed:
            assert rule_of(method).access != ACCESS_WRITE or name in BYTES, name
        if "request_id" in method.input_type.fields_by_name:
            named = GetMessageClass(method.input_type)(request_id="a")
            assert ROUTES[name].repeatable(named) == (name not in NOT_REPEATED), name

    assert not unnamed & NOT_REPEATED


def test_three_methods_at_most_are_taken_without_a_credential() -> None:
    assert {
        f"/{PACKAGE}.OrganizationService/AcceptInvitation",
        f"/{PACKAGE}.ServerService/GetServerInfo",
    } == ANONYMOUS
    assert not [name for name, route in ROUTES.items() if route.anonymous and route.target]
