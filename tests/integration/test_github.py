"""Repositories, branches and pull requests from GitHub, against a simulator that speaks its REST API."""

import asyncio
import shutil
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path

import grpc
import httpx
import pytest_asyncio
from branchline.v1 import organizations_pb2, repositories_pb2, sessions_pb2, tasks_pb2
from branchline.v1.organizations_pb2 import Organization
from google.protobuf.field_mask_pb2 import FieldMask

from tests.support.stack import GITHUB_PORT, Stack, eventually, failure, request_id

MOCK = sessions_pb2.SessionOptions(agent="mock")
SIMULATOR = Path(__file__).parents[1] / "support" / "github_simulator.mjs"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def github() -> AsyncGenerator[None, None]:
    """Run the simulator where the installation expects GitHub."""
    node = shutil.which("node")
    assert node, "node runs the simulator"
    process = await asyncio.create_subprocess_exec(
        node, str(SIMULATOR), str(GITHUB_PORT), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    async with asyncio.timeout(60):
        assert b"listening" in await process.stdout.readline()
    yield
    process.kill()
    await process.wait()


@pytest_asyncio.fixture(loop_scope="session")
async def acme(stack: Stack, github: None) -> AsyncGenerator[str, None]:
    """An organization that the operator bound to GitHub's "acme", for one test."""
    slug = f"acme-{uuid.uuid4().hex[:8]}"
    organization_id = await stack.new_organization(slug)
    await stack.bind_github(slug, "acme")
    yield organization_id
    await stack.bind_github(slug, "")


async def set_pull_requests(pulls: Sequence[Mapping[str, object]]) -> None:
    async with httpx.AsyncClient() as http:
        (await http.put(f"http://127.0.0.1:{GITHUB_PORT}/pulls", json=pulls)).raise_for_status()


async def resync(stack: Stack, organization_id: str) -> None:
    await stack.client.repositories.SyncGithub(
        repositories_pb2.SyncGithubRequest(request_id=request_id(), organization_id=organization_id)
    )


async def sync(stack: Stack, organization_id: str) -> organizations_pb2.GithubStatus:
    await resync(stack, organization_id)

    async def ended() -> organizations_pb2.GithubStatus | None:
        answer = await stack.client.organizations.GetOrganization(
            organizations_pb2.GetOrganizationRequest(organization_id=organization_id)
        )
        return answer.github_status if answer.github_status.revision else None

    return await eventually(ended)


async def test_repositories_are_imported_with_branches_and_pull_requests(
    stack: Stack, acme: str
) -> None:  # GHD-7, REP-6
    status = await sync(stack, acme)

    async def imported() -> list[repositories_pb2.Repository] | None:
        answer = await stack.client.repositories.ListRepositories(
            repositories_pb2.ListRepositoriesRequest(organization_id=acme)
        )
        return list(answer.repositories) if len(answer.repositories) == 2 else None

    repositories = await eventually(imported)
    assert status.connection == organizations_pb2.GITHUB_CONNECTION_CONNECTED
    assert status.repository_count == 2
    assert [one.display_name for one in repositories] == ["acme/shop", "acme/site"]
    assert repositories[1].default_branch == "trunk"

    async def overview() -> list[repositories_pb2.Branch] | None:
        answer = await stack.client.repositories.ListBranches(
            repositories_pb2.ListBranchesRequest(repository_id=repositories[0].id)
        )
        return list(answer.branches) or None

    branches = await eventually(overview)
    assert [(one.name, one.is_default) for one in branches] == [("main", True), ("topic", False)]
    assert all(len(one.head_commit) == 40 for one in branches)


async def test_a_task_carries_its_branchs_pull_request_while_it_is_open(stack: Stack, acme: str) -> None:  # GHD-9
    pull = {
        "number": 7,
        "title": "Sell more",
        "state": "open",
        "draft": False,
        "html_url": "https://github.com/acme/shop/pull/7",
        "head": {"ref": "topic"},
        "base": {"ref": "main"},
        "user": {"login": "alice"},
        "updated_at": "2026-01-02T03:04:05Z",
    }
    await set_pull_requests([pull])
    await sync(stack, acme)

    async def shop() -> str | None:
        answer = await stack.client.repositories.ListRepositories(
            repositories_pb2.ListRepositoriesRequest(organization_id=acme)
        )
        return next((one.id for one in answer.repositories if one.display_name == "acme/shop"), None)

    async def listed(*, has_pull_request: bool) -> list[str]:
        answer = await stack.client.tasks.ListTasks(
            tasks_pb2.ListTasksRequest(
                organization_id=acme, filter=tasks_pb2.TaskFilter(has_pull_request=has_pull_request)
            )
        )
        return [task.branch for task in answer.tasks]

    async def branches() -> int | None:
        answer = await stack.client.repositories.ListBranches(
            repositories_pb2.ListBranchesRequest(repository_id=repository_id)
        )
        return len(answer.branches) or None

    repository_id = await eventually(shop)
    await eventually(branches)
    topic, other = tasks_pb2.BranchChoice(existing_branch="topic"), tasks_pb2.BranchChoice(new_branch="other")
    born_with = await stack.create_task(repository_id, branch=topic, session=MOCK)
    await stack.create_task(repository_id, branch=other, session=MOCK)
    assert born_with.pull_request.number == 7
    assert await listed(has_pull_request=True) == ["topic"]
    assert await listed(has_pull_request=False) == ["other"]

    await set_pull_requests([pull | {"head": {"ref": "other"}}])
    await resync(stack, acme)

    async def moved() -> bool:
        return await listed(has_pull_request=True) == ["other"]

    assert await eventually(moved)
    assert await listed(has_pull_request=False) == ["topic"]
    await set_pull_requests([])


async def test_a_second_sync_changes_nothing(stack: Stack, acme: str) -> None:  # GHD-3
    await sync(stack, acme)
    await sync(stack, acme)

    async def imported() -> set[str] | None:
        answer = await stack.client.repositories.ListRepositories(
            repositories_pb2.ListRepositoriesRequest(organization_id=acme)
        )
        return {one.display_name for one in answer.repositories} if len(answer.repositories) >= 2 else None

    assert await eventually(imported) == {"acme/shop", "acme/site"}


async def test_without_a_login_nothing_is_synced(stack: Stack) -> None:  # GHD-2
    organization_id = await stack.new_organization()

    refused = await failure(
        stack.client.repositories.SyncGithub(
            repositories_pb2.SyncGithubRequest(request_id=request_id(), organization_id=organization_id)
        )
    )

    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "GITHUB_NOT_CONNECTED")


async def test_a_login_is_one_organizations_and_no_administrator_can_take_it(stack: Stack, acme: str) -> None:  # F15
    slug = f"other-{uuid.uuid4().hex[:8]}"
    other = await stack.new_organization(slug)

    bound = await failure(stack.bind_github(slug, "ACME"))
    named = await failure(
        stack.client.organizations.UpdateOrganization(
            organizations_pb2.UpdateOrganizationRequest(
                request_id=request_id(),
                organization=Organization(id=other, github_login="acme"),
                update_mask=FieldMask(paths=["github_login"]),
            )
        )
    )

    assert (bound.code, bound.reason) == (grpc.StatusCode.ALREADY_EXISTS, "GITHUB_LOGIN_TAKEN")
    assert named.code == grpc.StatusCode.INVALID_ARGUMENT
