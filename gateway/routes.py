"""Which service owns each public method, what it is about, and what role it needs.

Reads name organization or repository and nothing else: that is the rule of the tree, and a test holds it. What is not
named here is not reachable from outside.
"""

from dataclasses import dataclass

from branchline.v1.organizations_pb2 import ROLE_ADMIN, ROLE_MEMBER, ROLE_OWNER, ROLE_VIEWER, Role

PACKAGE = "branchline.v1"

ORGANIZATION, REPOSITORY, TASK, SANDBOX, USER = "organization", "repository", "task", "sandbox", "user"

SLOW_SECONDS = 3700.0
"""Longest command in a sandbox, and a little more."""


@dataclass(frozen=True, slots=True)
class Route:
    """How one method is forwarded.

    `target` is the request field whose organization the caller must be a member of; empty for what concerns the
    caller alone. `safe` methods may be repeated when the owner cannot be reached. `settle` waits until the
    organization has indexed what the command made, so that the next call finds it. `defaults` adds the
    organization's settings to the principal. `people` methods change what is remembered of the caller or of the
    request's user. `stream` methods answer with a stream.
    """

    owner: str
    target: str = ""
    role: Role.ValueType = ROLE_VIEWER
    read: bool = False
    safe: bool = True
    settle: bool = False
    defaults: bool = False
    people: bool = False
    stream: bool = False
    timeout_seconds: float = 30.0


def _read(owner: str, target: str = "") -> Route:
    return Route(owner, target, read=True)


ROUTES = {
    "OrganizationService/CreateOrganization": Route(ORGANIZATION, people=True),
    "OrganizationService/GetOrganization": _read(ORGANIZATION, "organization_id"),
    "OrganizationService/ListOrganizations": _read(ORGANIZATION),
    "OrganizationService/UpdateOrganization": Route(ORGANIZATION, "organization_id", ROLE_ADMIN),
    "OrganizationService/DeleteOrganization": Route(ORGANIZATION, "organization_id", ROLE_OWNER, people=True),
    "OrganizationService/AddMember": Route(ORGANIZATION, "organization_id", ROLE_ADMIN),
    "OrganizationService/UpdateMember": Route(ORGANIZATION, "organization_id", ROLE_ADMIN, people=True),
    # everybody may leave: the organization asks for the role of who removes another
    "OrganizationService/RemoveMember": Route(ORGANIZATION, "organization_id", people=True),
    "OrganizationService/ListMembers": _read(ORGANIZATION, "organization_id"),
    "RepositoryService/AddRepository": Route(ORGANIZATION, "organization_id", ROLE_ADMIN),
    "RepositoryService/DeleteRepository": Route(ORGANIZATION, "repository_id", ROLE_ADMIN),
    "RepositoryService/ListRepositories": _read(ORGANIZATION, "organization_id"),
    "RepositoryService/GetRepositoryOverview": _read(REPOSITORY, "repository_id"),
    "RepositoryService/SyncGithub": Route(ORGANIZATION, "organization_id", ROLE_ADMIN),
    "TaskService/CreateTask": Route(REPOSITORY, "repository_id", ROLE_MEMBER, settle=True, defaults=True),
    "TaskService/GetTask": _read(REPOSITORY, "task_id"),
    "TaskService/ListTasks": _read(ORGANIZATION, "organization_id"),
    "TaskService/RetryTask": Route(TASK, "task_id", ROLE_MEMBER),
    "TaskService/ArchiveTask": Route(TASK, "task_id", ROLE_MEMBER),
    "TaskService/KillTask": Route(TASK, "task_id", ROLE_MEMBER),
    "SessionService/CreateSession": Route(TASK, "task_id", ROLE_MEMBER, timeout_seconds=300.0),
    "SessionService/RenameSession": Route(TASK, "task_id", ROLE_MEMBER),
    "SessionService/CloseSession": Route(TASK, "task_id", ROLE_MEMBER),
    "SessionService/ReopenSession": Route(TASK, "task_id", ROLE_MEMBER),
    "SessionService/SendMessage": Route(TASK, "task_id", ROLE_MEMBER),
    "SessionService/CancelTurn": Route(TASK, "task_id", ROLE_MEMBER),
    "SessionService/AnswerPermission": Route(TASK, "task_id", ROLE_MEMBER),
    "SessionService/ListTranscript": _read(REPOSITORY, "task_id"),
    "SandboxService/RunCommand": Route(SANDBOX, "task_id", ROLE_MEMBER, safe=False, timeout_seconds=SLOW_SECONDS),
    "SandboxService/StreamCommand": Route(
        SANDBOX, "task_id", ROLE_MEMBER, safe=False, stream=True, timeout_seconds=SLOW_SECONDS
    ),
    "SandboxService/ListAgents": Route(SANDBOX, "task_id", ROLE_MEMBER),
    "SandboxService/ListFiles": Route(SANDBOX, "task_id", ROLE_MEMBER),
    "SandboxService/StatFile": Route(SANDBOX, "task_id", ROLE_MEMBER),
    "SandboxService/MoveFile": Route(SANDBOX, "task_id", ROLE_MEMBER, safe=False),
    "SandboxService/ReadFile": Route(SANDBOX, "task_id", ROLE_MEMBER),
    "SandboxService/WriteFile": Route(SANDBOX, "task_id", ROLE_MEMBER),
    "SandboxService/DeleteFile": Route(SANDBOX, "task_id", ROLE_MEMBER, safe=False),
    "UserService/WhoAmI": _read(ORGANIZATION),
    "UserService/UpdatePreferences": Route(USER, settle=True, people=True),
    "UserService/CreateApiToken": Route(USER, safe=False, settle=True),
    "UserService/ListApiTokens": _read(ORGANIZATION),
    "UserService/RevokeApiToken": Route(USER, settle=True, people=True),
    "UserService/SetGitCredential": Route(USER),
    "UserService/SetTaskState": Route(USER, "task_id"),
    "HistoryService/ListHistory": _read(ORGANIZATION, "organization_id"),
}
"""Methods by their name within the package. Watches are the gateway's own: see `watches`."""
