"""Reads an account's repositories, branches and open pull requests through GitHub's REST API.

Source: https://docs.github.com/rest (repos, branches, pulls), through githubkit, which obeys rate limits and
sends conditional requests.
"""

import asyncio
from dataclasses import dataclass, field
from typing import Any

import httpx
import structlog
from branchline.github_data.v1.github_data_pb2 import GithubRepository
from branchline.resource.v1 import organization_pb2
from branchline.resource.v1.organization_pb2 import GithubStatus
from branchline.resource.v1.repository_pb2 import Branch, PullRequest
from githubkit import GitHub, Response
from githubkit.exception import GitHubException, RequestFailed

from services.github_data.store import GithubStore
from services.runtime.clock import Clock
from services.runtime.signal import Signal

log = structlog.get_logger()

Json = dict[str, Any]

_PARALLEL_REPOSITORIES = 4
_REFUSED = frozenset({401, 403})
_NO_SUCH_ACCOUNT = 404


@dataclass(slots=True)
class GithubSync:
    """Reads the accounts that shall be read, one after the other, for as long as the service runs."""

    github: GitHub[Any]
    store: GithubStore
    clock: Clock
    wanted: Signal = field(default_factory=Signal)

    async def run(self) -> None:
        """Sync for ever. What was wanted before a restart is done after it."""
        while True:
            ticket = self.wanted.ticket
            for organization_id, login in await self.store.wanted():
                await self.store.save_status(await self._sync(organization_id, login))
            await self.wanted.wait(ticket)

    async def _sync(self, organization_id: str, login: str) -> GithubStatus:
        status = GithubStatus(organization_id=organization_id, sync_time=self.clock.timestamp())
        try:
            status.repository_count = await self._read_account(organization_id, login)
            status.connection = organization_pb2.GITHUB_CONNECTION_CONNECTED
        except* (GitHubException, httpx.HTTPError, KeyError, ValueError) as errors:
            _explain(status, errors)
        log.info("github sync ended", organization=organization_id, detail=status.detail)
        return status

    async def _read_account(self, organization_id: str, login: str) -> int:
        repositories = await self._repositories(login)
        limit = asyncio.Semaphore(_PARALLEL_REPOSITORIES)

        async def read(repository: Json) -> None:
            async with limit:
                reported = await self._read_repository(organization_id, login, repository)
                await self.store.save_repository(reported)

        async with asyncio.TaskGroup() as group:
            for repository in repositories:
                group.create_task(read(repository))
        return len(repositories)

    async def _repositories(self, login: str) -> list[Json]:
        """Return the repositories of an organization, or of a person if there is no such organization."""
        rest = self.github.rest
        try:
            return [one async for one in rest.paginate(rest.repos.async_list_for_org, map_func=_json, org=login)]
        except RequestFailed as error:
            if error.response.status_code != _NO_SUCH_ACCOUNT:
                raise
        return [one async for one in rest.paginate(rest.repos.async_list_for_user, map_func=_json, username=login)]

    async def _read_repository(self, organization_id: str, login: str, repository: Json) -> GithubRepository:
        rest = self.github.rest
        name = str(repository["name"])
        reported = GithubRepository(
            organization_id=organization_id,
            github_id=repository["id"],
            full_name=repository["full_name"],
            clone_url=repository.get("clone_url") or repository["html_url"],
            default_branch=repository.get("default_branch") or "",
        )
        async for branch in rest.paginate(rest.repos.async_list_branches, map_func=_json, owner=login, repo=name):
            head = branch["commit"]["sha"]
            reported.branches.append(
                Branch(name=branch["name"], head_commit=head, protected=bool(branch.get("protected")))
            )
        async for pull in rest.paginate(rest.pulls.async_list, map_func=_json, owner=login, repo=name, state="open"):
            reported.pull_requests.append(_pull_request(pull))
        return reported


def _explain(status: GithubStatus, errors: BaseExceptionGroup[Exception]) -> None:
    """Say in the status why a sync failed."""
    error = errors.exceptions[0]
    if isinstance(error, BaseExceptionGroup):
        _explain(status, error)
        return
    status.connection = organization_pb2.GITHUB_CONNECTION_FAILING
    status.detail = f"{type(error).__name__}: {error}"[:500]
    if isinstance(error, RequestFailed):
        status.detail = f"GitHub answered {error.response.status_code}: {error.response.text[:500]}"
        if error.response.status_code in _REFUSED:
            status.connection = organization_pb2.GITHUB_CONNECTION_RECONNECT_REQUIRED


def _json(response: Response[Any]) -> list[Json]:
    """Return a page as it came. Not as githubkit's models: those refuse a page for a field that we do not read."""
    return response.json()


def _pull_request(pull: Json) -> PullRequest:
    message = PullRequest(
        number=pull["number"],
        title=pull["title"],
        head_branch=pull["head"]["ref"],
        base_branch=pull["base"]["ref"],
        author_login=(pull.get("user") or {}).get("login", ""),
        draft=bool(pull.get("draft")),
        url=pull["html_url"],
    )
    message.update_time.FromJsonString(pull["updated_at"])
    return message
