"""Which service answers each public method, what it is about, and what role it needs: read from the contract itself.

Every method carries a `MethodRule`; what is not contract (where an answer must be awaited in an index, whose memory it
changes) stands in the small tables here. What has no rule is not reachable from outside: a test holds it.
"""

from dataclasses import dataclass, field

from branchline.v1 import (
    agents_pb2,
    blobs_pb2,
    files_pb2,
    history_pb2,
    organizations_pb2,
    processes_pb2,
    repositories_pb2,
    secrets_pb2,
    server_pb2,
    sessions_pb2,
    tasks_pb2,
    users_pb2,
)
from branchline.v1.options_pb2 import (
    ACCESS_READ,
    LEVEL_GATEWAY,
    LEVEL_ORGANIZATION,
    LEVEL_REPOSITORY,
    LEVEL_SANDBOX,
    LEVEL_TASK,
    LEVEL_USER,
    MethodRule,
    rule,
)
from branchline.v1.roles_pb2 import ROLE_VIEWER, Role
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pb2 import MethodOptions
from google.protobuf.message import Message

from services.runtime.errors import InvalidArgument

PACKAGE = "branchline.v1"

ORGANIZATION, REPOSITORY, TASK, SANDBOX, USER = "organization", "repository", "task", "sandbox", "user"

OWNERS = {
    LEVEL_GATEWAY: "gateway",
    LEVEL_ORGANIZATION: ORGANIZATION,
    LEVEL_REPOSITORY: REPOSITORY,
    LEVEL_TASK: TASK,
    LEVEL_SANDBOX: SANDBOX,
    LEVEL_USER: USER,
}

_FILES = (
    agents_pb2,
    blobs_pb2,
    files_pb2,
    history_pb2,
    organizations_pb2,
    processes_pb2,
    repositories_pb2,
    secrets_pb2,
    server_pb2,
    sessions_pb2,
    tasks_pb2,
    users_pb2,
)

PUBLIC = {
    f"{service.name}/{method.name}": method
    for file in _FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
"""Every method of the public contract, by its name within the package."""

_SETTLED = frozenset(
    {
        "TaskService/CreateTask",
        "UserService/UpdateUser",
        "UserService/CreateApiToken",
        "UserService/RevokeApiToken",
        "SecretService/CreateSecret",
        "SecretService/UpdateSecret",
        "SecretService/DeleteSecret",
    }
)
"""Answered only once the organization has indexed what they made, so that the next call finds it."""

_PEOPLE = frozenset(
    {
        "OrganizationService/CreateOrganization",
        "OrganizationService/DeleteOrganization",
        "OrganizationService/UpdateMember",
        "OrganizationService/RemoveMember",
        "OrganizationService/AcceptInvitation",
        "UserService/UpdateUser",
        "UserService/RevokeApiToken",
    }
)
"""Change what is remembered of the caller, or of the user whom the request names."""

_DEFAULTS = frozenset({"TaskService/CreateTask"})
"""Need the organization's settings with the caller."""

_SECONDS = 30.0
STREAM_SECONDS = 7 * 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Route:
    """How one method is forwarded."""

    name: str
    method: MethodDescriptor
    owner: str
    """Service that answers; the gateway itself where it is none of them."""

    scope: tuple[str, ...] = ()
    """Path of the request's field whose organization the caller must be a member of; empty for the caller alone."""

    role: Role.ValueType = ROLE_VIEWER
    read: bool = False
    anonymous: bool = False
    """Whether it is taken without a credential."""

    _idempotent: bool = field(default=False)

    @property
    def target(self) -> str:
        """What the scope names: "organization_id", "repository_id" or "task_id"; empty without one."""
        if not self.scope:
            return ""
        return f"{self.scope[-2]}_id" if self.scope[-1] == "id" else self.scope[-1]

    @property
    def settle(self) -> bool:
        """Whether it is answered only once the organization has indexed what it made."""
        return self.name in _SETTLED

    @property
    def people(self) -> bool:
        """Whether it changes what is remembered of people."""
        return self.name in _PEOPLE

    @property
    def defaults(self) -> bool:
        """Whether it needs the organization's settings."""
        return self.name in _DEFAULTS

    @property
    def stream(self) -> bool:
        """Whether it answers with a stream."""
        return self.method.server_streaming

    @property
    def seconds(self) -> float:
        """How long it may take."""
        return STREAM_SECONDS if self.stream else _SECONDS

    def repeatable(self, request: Message) -> bool:
        """Say whether a call may be repeated of which it is not known what became of it."""
        return self._idempotent and bool(getattr(request, "request_id", "given"))

    def wanted(self, request: Message) -> str:
        """Return the id that the scope names; raise InvalidArgument if there is none."""
        value: object = request
        for step in self.scope:
            value = getattr(value, step)
        if self.scope and not value:
            raise InvalidArgument(".".join(self.scope), "must be given")
        return str(value) if self.scope else ""


def rule_of(method: MethodDescriptor) -> MethodRule:
    """Return what the contract says of a method."""
    return method.GetOptions().Extensions[rule]


def _route(name: str, method: MethodDescriptor) -> Route:
    said = rule_of(method)
    return Route(
        name=name,
        method=method,
        owner=OWNERS[said.level],
        scope=tuple(said.scope.split(".")) if said.scope else (),
        role=said.required_role or ROLE_VIEWER,
        read=said.access == ACCESS_READ,
        anonymous=said.anonymous,
        _idempotent=method.GetOptions().idempotency_level != MethodOptions.IDEMPOTENCY_UNKNOWN,
    )


ROUTES = {name: _route(name, method) for name, method in PUBLIC.items()}
"""How each method is reached."""

ANONYMOUS = frozenset(f"/{PACKAGE}.{name}" for name, route in ROUTES.items() if route.anonymous)
"""Full names of the methods that are taken without a credential."""
