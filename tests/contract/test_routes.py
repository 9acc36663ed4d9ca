"""The public contract and the gateway's routes agree, and reads go to two services alone. API-2."""

from branchline.gateway.v1 import (
    history_pb2,
    organizations_pb2,
    repositories_pb2,
    sandboxes_pb2,
    sessions_pb2,
    tasks_pb2,
    users_pb2,
)

from gateway.routes import ORGANIZATION, REPOSITORY, ROUTES

FILES = (history_pb2, organizations_pb2, repositories_pb2, sandboxes_pb2, sessions_pb2, tasks_pb2, users_pb2)
METHODS = {
    f"{service.name}/{method.name}": method
    for file in FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}


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
