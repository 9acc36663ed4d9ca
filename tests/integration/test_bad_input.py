"""What is refused, and how it is said: one code, one reason, the offending field or resource."""

import asyncio

import grpc
import pytest
from branchline.client import Client
from branchline.v1 import (
    organizations_pb2,
    repositories_pb2,
    sessions_pb2,
    tasks_pb2,
    users_pb2,
)
from google.protobuf.field_mask_pb2 import FieldMask

from tests.support.git_http import serve_git
from tests.support.stack import Stack, eventually, failure, make_remote, request_id

NOT_FOUND, INVALID = grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT
ERROR, IDLE = tasks_pb2.TASK_STATUS_ERROR, tasks_pb2.TASK_STATUS_IDLE


async def test_unknown_ids_are_not_found_by_name(stack: Stack) -> None:  # ORG-5
    tasks = stack.client.tasks
    organization = await failure(tasks.ListTasks(tasks_pb2.ListTasksRequest(organization_id="org_x")))
    repository = await failure(stack.create_task("repo_x"))
    task = await failure(tasks.GetTask(tasks_pb2.GetTaskRequest(task_id="task_x")))

    assert {one.code for one in (organization, repository, task)} == {NOT_FOUND}
    assert {one.reason for one in (organization, repository, task)} == {"NOT_FOUND"}
    assert [one.resource for one in (organization, repository, task)] == ["org_x", "repo_x", "task_x"]


@pytest.mark.parametrize("token", ["", "wrong", "bl_wrong"])
async def test_a_bad_token_is_unauthenticated(stack: Stack, token: str) -> None:  # API-6
    async with Client(stack.address, token) as client:
        refused = await failure(client.users.WhoAmI(users_pb2.WhoAmIRequest()))

    assert refused.code == grpc.StatusCode.UNAUTHENTICATED


async def test_a_token_for_reading_cannot_do_what_its_user_may(stack: Stack) -> None:  # USR-3
    repository_id = await stack.add_repository()
    request = users_pb2.CreateApiTokenRequest(name="reader", role_limit=organizations_pb2.ROLE_VIEWER)
    made = await stack.client.users.CreateApiToken(request)
    async with Client(stack.address, made.secret) as reader:
        await reader.tasks.ListTasks(tasks_pb2.ListTasksRequest(organization_id=stack.organization_id))
        refused = await failure(
            reader.tasks.CreateTask(
                tasks_pb2.CreateTaskRequest(request_id=request_id(), repository_id=repository_id, text="say hi")
            )
        )
        escalated = await failure(reader.users.CreateApiToken(users_pb2.CreateApiTokenRequest(name="more")))

    assert refused.code == grpc.StatusCode.PERMISSION_DENIED
    assert escalated.reason == "TOKEN_LIMITED"


async def test_a_revoked_token_ends_within_seconds(stack: Stack) -> None:  # USR-3
    made = await stack.client.users.CreateApiToken(users_pb2.CreateApiTokenRequest(name="short"))
    async with Client(stack.address, made.secret) as client:
        await client.users.WhoAmI(users_pb2.WhoAmIRequest())
        await stack.client.users.RevokeApiToken(users_pb2.RevokeApiTokenRequest(token_id=made.api_token.id))

        async def ended():
            try:
                await client.users.WhoAmI(users_pb2.WhoAmIRequest())
            except grpc.aio.AioRpcError as error:
                return error.code() == grpc.StatusCode.UNAUTHENTICATED
            return False

        assert await eventually(ended, seconds=15)


async def test_another_organizations_task_does_not_exist(stack: Stack) -> None:  # ORG-10
    task = await stack.ready_task()
    other = await stack.new_organization()
    stranger, _ = await stack.new_member(organizations_pb2.ROLE_OWNER, organization_id=other)

    read = await failure(stranger.tasks.GetTask(tasks_pb2.GetTaskRequest(task_id=task.id)))
    sent = await failure(
        stranger.sessions.SendMessage(
            sessions_pb2.SendMessageRequest(
                request_id=request_id(), task_id=task.id, session_id=task.sessions[0].id, text="say hi"
            )
        )
    )
    watched = await failure(anext(aiter(stranger.tasks.WatchTask(tasks_pb2.WatchTaskRequest(task_id=task.id)))))
    unknown = await failure(stranger.tasks.GetTask(tasks_pb2.GetTaskRequest(task_id="task_x")))

    assert {read.code, sent.code, watched.code} == {NOT_FOUND}
    assert read.message.replace(task.id, "task_x") == unknown.message


async def test_a_viewer_may_look_and_not_touch(stack: Stack) -> None:  # ORG-3
    repository_id = await stack.add_repository()
    viewer, _ = await stack.new_member(organizations_pb2.ROLE_VIEWER)

    await viewer.tasks.ListTasks(tasks_pb2.ListTasksRequest(organization_id=stack.organization_id))
    refused = await failure(
        viewer.tasks.CreateTask(
            tasks_pb2.CreateTaskRequest(request_id=request_id(), repository_id=repository_id, text="say hi")
        )
    )

    assert (refused.code, refused.reason) == (grpc.StatusCode.PERMISSION_DENIED, "ROLE_REQUIRED")


@pytest.mark.parametrize("branch", ["a..b", "a b", "-x", "x.lock", "a//b", "a~1", "HEAD", "@{", "a/.b", "x."])
async def test_a_name_that_git_refuses_is_invalid(stack: Stack, branch: str) -> None:  # REP-3
    refused = await failure(stack.create_task(await stack.add_repository(), branch=branch))

    assert (refused.code, refused.fields) == (INVALID, ["branch"])


@pytest.mark.parametrize("branch", ["a..b", "-x", "refs heads", "\n"])
async def test_a_default_branch_that_git_refuses_is_invalid(stack: Stack, branch: str) -> None:  # REP-1
    request = repositories_pb2.AddRepositoryRequest(
        request_id=request_id(), organization_id=stack.organization_id, remote_url="https://h/x", default_branch=branch
    )
    refused = await failure(stack.client.repositories.AddRepository(request))

    assert (refused.code, refused.fields) == (INVALID, ["default_branch"])


@pytest.mark.parametrize(
    "settings",
    [
        organizations_pb2.OrganizationSettings(default_agent="../../bin/sh"),
        organizations_pb2.OrganizationSettings(default_sandbox_provider="X y"),
        organizations_pb2.OrganizationSettings(idle_timeout_seconds=-5),
        organizations_pb2.OrganizationSettings(default_model="m" * 129),
    ],
)
async def test_settings_that_no_task_could_use_are_invalid(
    stack: Stack, settings: organizations_pb2.OrganizationSettings
) -> None:  # ORG-2
    request = organizations_pb2.UpdateOrganizationRequest(
        request_id=request_id(),
        organization_id=stack.organization_id,
        organization=organizations_pb2.Organization(settings=settings),
        update_mask=FieldMask(paths=["settings"]),
    )
    refused = await failure(stack.client.organizations.UpdateOrganization(request))

    assert refused.code == INVALID
    assert refused.fields[0].startswith("organization.settings.")


@pytest.mark.parametrize("text", ["", "  \n ", "x" * 1024 * 1024])
async def test_an_empty_or_huge_text_is_invalid(stack: Stack, text: str) -> None:  # REP-2
    refused = await failure(stack.create_task(await stack.add_repository(), text))

    assert refused.code == INVALID
    assert set(refused.fields) == {"text"}


@pytest.mark.parametrize(
    "url", ["nonsense", "ftp://host/x", "https://user:secret@host/x", "https://host", "file:///a b", "https://[x"]
)
async def test_a_url_that_is_no_remote_is_invalid(stack: Stack, url: str) -> None:  # REP-1
    refused = await failure(stack.add_repository(url=url))

    assert (refused.code, refused.fields) == (INVALID, ["remote_url"])
    assert "secret" not in refused.message


async def test_the_same_url_twice_names_the_repository_that_has_it(stack: Stack) -> None:
    remote = make_remote(stack.remotes)
    repository_id = await stack.add_repository(remote)

    refused = await failure(stack.add_repository(remote))

    assert (refused.code, refused.resource) == (grpc.StatusCode.ALREADY_EXISTS, repository_id)


async def test_an_unreachable_remote_ends_in_error_with_gits_words_and_can_be_retried(stack: Stack) -> None:  # TSK-2
    remote = stack.remotes / "later.git"
    task = await stack.create_task(await stack.add_repository(remote), hold_prompt=True)
    failed = await stack.until(task.id, ERROR)

    make_remote(stack.remotes, "later")
    await stack.client.tasks.RetryTask(tasks_pb2.RetryTaskRequest(request_id=request_id(), task_id=task.id))
    await stack.until(task.id, IDLE)

    assert failed.status_reason.startswith("the repository could not be checked out:")
    assert "does not exist" in failed.status_reason or "not appear to be a git repository" in failed.status_reason


async def test_wrong_credentials_end_in_error_with_gits_words_and_right_ones_help(stack: Stack) -> None:  # SBX-9
    remote = make_remote(stack.remotes)
    with serve_git(stack.remotes, "alice", "secret word") as host:
        users = stack.client.users
        wrong = users_pb2.SetGitCredentialRequest(host=host, username="alice", secret="guess")
        await users.SetGitCredential(wrong)
        repository_id = await stack.add_repository(url=f"http://{host}/{remote.name}")
        task = await stack.create_task(repository_id, "write a.txt: a\ncommit A\npush", hold_prompt=True)
        failed = await stack.until(task.id, ERROR)

        await users.SetGitCredential(
            users_pb2.SetGitCredentialRequest(host=host, username="alice", secret="secret word")
        )
        await stack.client.tasks.RetryTask(tasks_pb2.RetryTaskRequest(request_id=request_id(), task_id=task.id))
        await stack.until(task.id, IDLE)

    assert "Authentication failed" in failed.status_reason
    assert "guess" not in failed.status_reason


async def test_the_same_request_twice_makes_one_task(stack: Stack) -> None:  # API-3
    repository_id = await stack.add_repository()
    request = tasks_pb2.CreateTaskRequest(
        request_id=request_id(), repository_id=repository_id, text="say hi", hold_prompt=True
    )

    answers = await asyncio.gather(*(stack.client.tasks.CreateTask(request) for _ in range(5)))
    listed = await stack.client.tasks.ListTasks(
        tasks_pb2.ListTasksRequest(organization_id=stack.organization_id, repository_id=repository_id)
    )
    request.text = "say something else"
    reused = await failure(stack.client.tasks.CreateTask(request))

    assert len({answer.task.id for answer in answers}) == 1
    assert len(listed.tasks) == 1
    assert (reused.code, reused.reason) == (INVALID, "REQUEST_ID_REUSED")


async def test_only_a_task_in_error_is_retried(stack: Stack) -> None:  # TSK-1
    task = await stack.ready_task()

    refused = await failure(
        stack.client.tasks.RetryTask(tasks_pb2.RetryTaskRequest(request_id=request_id(), task_id=task.id))
    )

    assert (refused.code, refused.metadata["status"]) == (grpc.StatusCode.FAILED_PRECONDITION, "idle")


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
            tasks_pb2.ListTasksRequest(organization_id=organization_id, consistency_token="nonsense!")
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
        ["consistency_token"],
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
