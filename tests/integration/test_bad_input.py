"""What is refused, and how it is said: one code, one reason, the offending field or resource."""

import asyncio
import time
from collections.abc import Awaitable
from typing import Any

import grpc
import pytest
from branchline.v1 import (
    organizations_pb2,
    repositories_pb2,
    roles_pb2,
    secrets_pb2,
    sessions_pb2,
    tasks_pb2,
    users_pb2,
)
from branchline.v1.common_pb2 import (
    ENTITY_KIND_TASK,
    FAILURE_REASON_CLONE_FAILED,
    FAILURE_REASON_GIT_CREDENTIALS_REFUSED,
    Consistency,
    Prompt,
)
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask

from services.runtime.spine.tokens import consistency_token
from tests.support.client import Client
from tests.support.git_http import serve_git
from tests.support.stack import Stack, eventually, failure, make_remote, request_id

NOT_FOUND, INVALID = grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT
FAILED, IDLE = tasks_pb2.TASK_STATE_FAILED, tasks_pb2.TASK_ACTIVITY_IDLE
HI = Prompt(text="say hi")


async def test_unknown_ids_are_not_found_by_name(stack: Stack) -> None:  # ORG-5
    tasks = stack.client.tasks
    organization = await failure(tasks.ListTasks(tasks_pb2.ListTasksRequest(organization_id="org_x")))
    repository = await failure(stack.create_task("repo_x"))
    task = await failure(tasks.GetTask(tasks_pb2.GetTaskRequest(task_id="task_x")))

    assert {one.code for one in (organization, repository, task)} == {NOT_FOUND}
    assert {one.reason for one in (organization, repository, task)} == {"RESOURCE_NOT_FOUND"}
    assert [one.resource for one in (organization, repository, task)] == ["org_x", "repo_x", "task_x"]


@pytest.mark.parametrize("token", ["", "wrong", "bl_wrong"])
async def test_a_bad_token_is_unauthenticated(stack: Stack, token: str) -> None:  # API-6
    async with Client(stack.address, token) as client:
        refused = await failure(client.users.GetCurrentUser(users_pb2.GetCurrentUserRequest()))

    assert refused.code == grpc.StatusCode.UNAUTHENTICATED


async def test_a_token_for_reading_cannot_do_what_its_user_may(stack: Stack) -> None:  # USR-3
    repository_id = await stack.add_repository()
    request = users_pb2.CreateApiTokenRequest(
        display_name="reader", scope=users_pb2.TokenScope(role=roles_pb2.ROLE_VIEWER)
    )
    made = await stack.client.users.CreateApiToken(request)
    async with Client(stack.address, made.secret) as reader:
        await reader.tasks.ListTasks(tasks_pb2.ListTasksRequest(organization_id=stack.organization_id))
        refused = await failure(
            reader.tasks.CreateTask(
                tasks_pb2.CreateTaskRequest(request_id=request_id(), repository_id=repository_id, prompt=HI)
            )
        )
        escalated = await failure(reader.users.CreateApiToken(users_pb2.CreateApiTokenRequest(display_name="more")))

    assert refused.code == grpc.StatusCode.PERMISSION_DENIED
    assert escalated.reason == "TOKEN_LIMITED"


async def test_a_revoked_token_ends_within_seconds(stack: Stack) -> None:  # USR-3
    made = await stack.client.users.CreateApiToken(users_pb2.CreateApiTokenRequest(display_name="short"))
    async with Client(stack.address, made.secret) as client:
        await client.users.GetCurrentUser(users_pb2.GetCurrentUserRequest())
        await stack.client.users.RevokeApiToken(users_pb2.RevokeApiTokenRequest(api_token_id=made.api_token.id))

        async def ended():
            try:
                await client.users.GetCurrentUser(users_pb2.GetCurrentUserRequest())
            except grpc.aio.AioRpcError as error:
                return error.code() == grpc.StatusCode.UNAUTHENTICATED
            return False

        assert await eventually(ended, seconds=15)


async def test_another_organizations_task_does_not_exist(stack: Stack) -> None:  # ORG-10
    task = await stack.ready_task()
    other = await stack.new_organization()
    stranger, _ = await stack.new_member(roles_pb2.ROLE_OWNER, organization_id=other)

    read = await failure(stranger.tasks.GetTask(tasks_pb2.GetTaskRequest(task_id=task.id)))
    sent = await failure(
        stranger.sessions.SendMessage(
            sessions_pb2.SendMessageRequest(
                request_id=request_id(), task_id=task.id, session_id=(await stack.session(task.id)).id, prompt=HI
            )
        )
    )
    watched = await failure(anext(aiter(stranger.tasks.WatchTask(tasks_pb2.WatchTaskRequest(task_id=task.id)))))
    unknown = await failure(stranger.tasks.GetTask(tasks_pb2.GetTaskRequest(task_id="task_x")))

    assert {read.code, sent.code, watched.code} == {NOT_FOUND}
    assert read.message.replace(task.id, "task_x") == unknown.message


async def test_a_viewer_may_look_and_not_touch(stack: Stack) -> None:  # ORG-3
    repository_id = await stack.add_repository()
    viewer, _ = await stack.new_member(roles_pb2.ROLE_VIEWER)

    await viewer.tasks.ListTasks(tasks_pb2.ListTasksRequest(organization_id=stack.organization_id))
    refused = await failure(
        viewer.tasks.CreateTask(
            tasks_pb2.CreateTaskRequest(request_id=request_id(), repository_id=repository_id, prompt=HI)
        )
    )

    assert (refused.code, refused.reason) == (grpc.StatusCode.PERMISSION_DENIED, "ROLE_REQUIRED")


@pytest.mark.parametrize("branch", ["a..b", "a b", "-x", "x.lock", "a//b", "a~1", "HEAD", "@{", "a/.b", "x."])
async def test_a_name_that_git_refuses_is_invalid(stack: Stack, branch: str) -> None:  # REP-3
    refused = await failure(
        stack.create_task(await stack.add_repository(), branch=tasks_pb2.BranchChoice(new_branch=branch))
    )

    assert (refused.code, refused.fields) == (INVALID, ["branch.new_branch"])


@pytest.mark.parametrize("branch", ["a..b", "-x", "refs heads", "\n"])
async def test_a_default_branch_that_git_refuses_is_invalid(stack: Stack, branch: str) -> None:  # REP-1
    request = repositories_pb2.CreateRepositoryRequest(
        request_id=request_id(), organization_id=stack.organization_id, remote_url="https://h/x", default_branch=branch
    )
    refused = await failure(stack.client.repositories.CreateRepository(request))

    assert (refused.code, refused.fields) == (INVALID, ["default_branch"])


@pytest.mark.parametrize(
    "settings",
    [
        organizations_pb2.OrganizationSettings(default_agent="../../bin/sh"),
        organizations_pb2.OrganizationSettings(default_sandbox_provider="X y"),
        organizations_pb2.OrganizationSettings(idle_timeout=Duration(seconds=-5)),
        organizations_pb2.OrganizationSettings(default_model="m" * 129),
    ],
)
async def test_settings_that_no_task_could_use_are_invalid(
    stack: Stack, settings: organizations_pb2.OrganizationSettings
) -> None:  # ORG-2
    request = organizations_pb2.UpdateOrganizationRequest(
        request_id=request_id(),
        organization=organizations_pb2.Organization(id=stack.organization_id, settings=settings),
        update_mask=FieldMask(paths=["settings"]),
    )
    refused = await failure(stack.client.organizations.UpdateOrganization(request))

    assert refused.code == INVALID
    assert refused.fields[0].startswith("organization.settings.")


@pytest.mark.parametrize("text", ["", "  \n ", "x" * 1024 * 1024])
async def test_an_empty_or_huge_text_is_invalid(stack: Stack, text: str) -> None:  # REP-2
    refused = await failure(stack.create_task(await stack.add_repository(), text))

    assert refused.code == INVALID
    assert set(refused.fields) == {"prompt.text"}


@pytest.mark.parametrize(
    "url", ["nonsense", "ftp://host/x", "https://user:secret@host/x", "https://host", "file:///a b", "https://[x"]
)
async def test_a_url_that_is_no_remote_is_invalid(stack: Stack, url: str) -> None:  # REP-1
    refused = await failure(stack.add_repository(url=url))

    assert (refused.code, refused.fields) == (INVALID, ["remote_url"])
    assert "user:secret" not in refused.message


async def test_the_same_url_twice_names_the_repository_that_has_it(stack: Stack) -> None:
    remote = make_remote(stack.remotes)
    repository_id = await stack.add_repository(remote)

    refused = await failure(stack.add_repository(remote))

    assert (refused.code, refused.resource) == (grpc.StatusCode.ALREADY_EXISTS, repository_id)


async def test_an_unreachable_remote_ends_in_error_with_gits_words_and_can_be_retried(stack: Stack) -> None:  # TSK-2
    remote = stack.remotes / "later.git"
    task = await stack.create_task(await stack.add_repository(remote), hold_prompt=True)
    failed = await stack.until(task.id, state=FAILED)

    make_remote(stack.remotes, "later")
    await stack.client.tasks.RetryProvisioning(
        tasks_pb2.RetryProvisioningRequest(request_id=request_id(), task_id=task.id)
    )
    await stack.until(task.id, activity=IDLE)

    assert failed.failure.reason == FAILURE_REASON_CLONE_FAILED
    said = failed.failure.message + failed.failure.output_tail
    assert "does not exist" in said or "not appear to be a git repository" in said


async def test_wrong_credentials_end_in_error_with_gits_words_and_right_ones_help(stack: Stack) -> None:  # SBX-9
    remote = make_remote(stack.remotes)
    with serve_git(stack.remotes, "alice", "secret word") as host:
        made = await stack.client.secrets.CreateSecret(
            secrets_pb2.CreateSecretRequest(
                secret=secrets_pb2.Secret(git_credential=secrets_pb2.GitCredential(host=host, username="alice")),
                value=b"guess",
            )
        )
        repository_id = await stack.add_repository(url=f"http://{host}/{remote.name}")
        task = await stack.create_task(repository_id, "write a.txt: a\ncommit A\npush", hold_prompt=True)
        failed = await stack.until(task.id, state=FAILED)

        await stack.client.secrets.UpdateSecret(
            secrets_pb2.UpdateSecretRequest(
                secret=secrets_pb2.Secret(id=made.secret.id),
                value=b"secret word",
            )
        )
        await stack.client.tasks.RetryProvisioning(
            tasks_pb2.RetryProvisioningRequest(request_id=request_id(), task_id=task.id)
        )
        await stack.until(task.id, activity=IDLE)

    said = failed.failure.message + failed.failure.output_tail
    assert failed.failure.reason == FAILURE_REASON_GIT_CREDENTIALS_REFUSED
    assert "Authentication failed" in said
    assert "guess" not in str(failed)


async def test_the_same_request_twice_makes_one_task(stack: Stack) -> None:  # API-3
    repository_id = await stack.add_repository()
    request = tasks_pb2.CreateTaskRequest(
        request_id=request_id(), repository_id=repository_id, prompt=HI, hold_prompt=True
    )

    answers = await asyncio.gather(*(stack.client.tasks.CreateTask(request) for _ in range(5)))
    listed = await stack.client.tasks.ListTasks(
        tasks_pb2.ListTasksRequest(
            organization_id=stack.organization_id, filter=tasks_pb2.TaskFilter(repository_ids=[repository_id])
        )
    )
    request.prompt.text = "say something else"
    reused = await failure(stack.client.tasks.CreateTask(request))

    assert len({answer.task.id for answer in answers}) == 1
    assert len(listed.tasks) == 1
    assert (reused.code, reused.reason) == (INVALID, "REQUEST_ID_REUSED")


async def test_only_a_task_in_error_is_retried(stack: Stack) -> None:  # TSK-1
    task = await stack.ready_task()

    refused = await failure(
        stack.client.tasks.RetryProvisioning(
            tasks_pb2.RetryProvisioningRequest(request_id=request_id(), task_id=task.id)
        )
    )

    assert (refused.code, refused.metadata["state"]) == (grpc.StatusCode.FAILED_PRECONDITION, "idle")


async def test_a_read_that_cannot_be_fresh_enough_says_so_before_its_callers_deadline(stack: Stack) -> None:  # F31
    task, tasks = await stack.ready_task(), stack.client.tasks
    never = consistency_token([(ENTITY_KIND_TASK, task.id, 10**9)])
    fresh = Consistency(at_least_as_fresh=[never])  # which would wait for ten seconds
    watch: Any = tasks.WatchTask(tasks_pb2.WatchTaskRequest(task_id=task.id, consistency=fresh), timeout=5)
    reads: list[Awaitable[Any]] = [
        tasks.GetTask(tasks_pb2.GetTaskRequest(task_id=task.id, consistency=fresh), timeout=5),
        tasks.ListTasks(
            tasks_pb2.ListTasksRequest(organization_id=stack.organization_id, consistency=fresh), timeout=5
        ),
        watch.read(),
    ]

    refused = await asyncio.gather(*(failure(one) for one in reads))

    assert {(one.code, one.reason) for one in refused} == {(grpc.StatusCode.UNAVAILABLE, "INDEX_BEHIND")}


@pytest.mark.parametrize("seconds", [0, 1])
async def test_a_read_waits_no_longer_than_its_caller_allows(stack: Stack, seconds: int) -> None:  # API-5
    task = await stack.ready_task()
    never = consistency_token([(ENTITY_KIND_TASK, task.id, 10**9)])
    fresh = Consistency(at_least_as_fresh=[never], max_wait=Duration(seconds=seconds))
    began = time.monotonic()

    refused = await failure(
        stack.client.tasks.GetTask(tasks_pb2.GetTaskRequest(task_id=task.id, consistency=fresh), timeout=30)
    )

    assert refused.reason == "INDEX_BEHIND"
    assert seconds <= time.monotonic() - began < seconds + 3


async def test_garbled_tokens_name_their_field(stack: Stack) -> None:  # API-4, API-5
    client, organization_id = stack.client, stack.organization_id
    resume = await failure(
        anext(
            aiter(
                client.organizations.WatchOrganization(
                    organizations_pb2.WatchOrganizationRequest(organization_id=organization_id, resume_token="%%%")
                )
            )
        )
    )
    consistency = await failure(
        client.tasks.ListTasks(
            tasks_pb2.ListTasksRequest(
                organization_id=organization_id, consistency=Consistency(at_least_as_fresh=["nonsense!"])
            )
        )
    )
    page = await failure(
        client.repositories.ListRepositories(
            repositories_pb2.ListRepositoriesRequest(organization_id=organization_id, page_token="nonsense")
        )
    )

    assert [one.code for one in (resume, consistency, page)] == [INVALID] * 3
    assert [one.fields for one in (resume, consistency, page)] == [
        ["resume_token"],
        ["consistency.at_least_as_fresh"],
        ["page_token"],
    ]


async def test_a_taken_slug_is_refused(stack: Stack) -> None:  # ORG-1
    refused = await failure(
        stack.client.organizations.CreateOrganization(
            organizations_pb2.CreateOrganizationRequest(
                request_id=request_id(),
                slug="home",
                display_name="Home",
                kind=organizations_pb2.ORGANIZATION_KIND_TEAM,
            )
        )
    )

    assert (refused.code, refused.reason) == (grpc.StatusCode.ALREADY_EXISTS, "SLUG_TAKEN")
