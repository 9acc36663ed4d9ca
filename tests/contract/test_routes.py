"""The public contract and the gateway's routes agree, and reads go to two services alone. API-2."""

from pathlib import Path

import branchline.v1 as gateway_v1
from branchline.v1.organizations_pb2 import ROLE_ADMIN, ROLE_OWNER, ROLE_VIEWER

from gateway.routes import ORGANIZATION, PACKAGE, REPOSITORY, ROUTES, SANDBOX, TASK, USER
from gateway.service import PUBLIC as METHODS
from gateway.service import GatewayConfig, build
from services.runtime.config import Secret

GATEWAY = build(
    GatewayConfig(
        addresses=dict.fromkeys((ORGANIZATION, REPOSITORY, TASK, SANDBOX, USER, "gateway"), "127.0.0.1:0"),
        signing_key=Secret("k" * 32),
    )
)
SERVED = GATEWAY._handlers  # pyright: ignore[reportPrivateUsage]


def test_the_gateway_serves_every_public_method_and_nothing_else() -> None:
    served = {f"{service}/{method}" for service, methods in SERVED.items() for method in methods}

    assert served == {f"{PACKAGE}.{name}" for name in METHODS}


def test_nothing_internal_can_be_reached_through_it() -> None:  # operators call services on their own ports
    assert all(service.startswith(f"{PACKAGE}.") for service in SERVED)
    assert not [service for service in SERVED if "Admin" in service or "Push" in service]


def test_the_whole_public_contract_is_known_to_it() -> None:
    package = Path(gateway_v1.__path__[0])
    files = {path.stem.removesuffix("_pb2_grpc") for path in package.glob("*_pb2_grpc.py")}
    known = {
        method.containing_service.file.name.rpartition("/")[2].removesuffix(".proto") for method in METHODS.values()
    }

    assert known == files


def test_deletion_needs_the_role_that_the_contract_names() -> None:
    roles = {name: route.role for name, route in ROUTES.items() if "Delete" in name or "Member" in name}

    assert roles["OrganizationService/DeleteOrganization"] == ROLE_OWNER
    assert roles["RepositoryService/DeleteRepository"] == ROLE_ADMIN
    assert roles["OrganizationService/AddMember"] == roles["OrganizationService/UpdateMember"] == ROLE_ADMIN
    assert roles["OrganizationService/RemoveMember"] == ROLE_VIEWER  # everybody may leave: the organization decides


def test_every_method_but_watches_has_a_route_and_every_route_a_method() -> None:
    assert set(ROUTES) == {name for name in METHODS if not name.partition("/")[2].startswith("Watch")}


def test_streams_are_routed_as_streams() -> None:
    for name, route in ROUTES.items():
        assert route.stream == METHODS[name].server_streaming, name


def test_reads_are_served_by_organization_and_repository_alone() -> None:
    assert {route.owner for route in ROUTES.values() if route.read} <= {ORGANIZATION, REPOSITORY}


def test_what_is_not_a_read_is_a_command_by_its_name() -> None:
    reading = ("Get", "List", "WhoAmI")
    for name, route in ROUTES.items():
        method = name.partition("/")[2]
        in_sandbox = name.startswith("SandboxService/")
        assert route.read == (method.startswith(reading) and not in_sandbox), name


def test_a_route_is_found_by_a_field_that_the_request_has() -> None:
    for name, route in ROUTES.items():
        if route.target:
            assert route.target in METHODS[name].input_type.fields_by_name, name


def test_commands_that_are_repeated_carry_a_request_id_or_are_idempotent_by_nature() -> None:
    idempotent = {
        "UserService/RevokeApiToken",
        "UserService/SetGitCredential",
        "UserService/SetTaskState",
        "SandboxService/ListAgents",
        "SandboxService/ListFiles",
        "SandboxService/StatFile",
        "SandboxService/ReadFile",
        "SandboxService/WriteFile",
    }
    for name, route in ROUTES.items():
        if not route.read and route.safe and name not in idempotent:
            assert "request_id" in METHODS[name].input_type.fields_by_name, name
