"""Reads an account's repositories, branches and open pull requests through GitHub's REST API.

Source: https://docs.github.com/rest (repos, branches, pulls), through githubkit, which obeys rate limits and
sends conditional requests.
"""

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from branchline.v1.repositories_pb2 import Branch, PullRequest
from branchline_internal.github_data.v1.github_data_pb2 import GithubRepository
from githubkit import GitHub, Response
from githubkit.exception import RequestFailed

from services.github_data.bounds import bounded
from services.github_data.failure import GithubRefused
from services.runtime.logging import get_logger

log = get_logger(__name__)

Json = dict[str, Any]

MOST_LISTED = 10_000
"""Branches, and pull requests, of one repository that are read at all."""

_PAGE = 100
_TIMEOUT_SECONDS = 30.0
_NO_SUCH_ACCOUNT = 404


@dataclass(frozen=True, slots=True)
class Account:
    """An organization or a person at GitHub."""

    github: GitHub[Any]
    login: str

    async def repositories(self) -> list[Json]:
        """Return the repositories of an organization, or of a person if there is no such organization."""
        repos = self.github.rest.repos
        try:
            return [one async for one in self._pages(repos.async_list_for_org, org=self.login)]
        except GithubRefused as error:
            if error.status_code != _NO_SUCH_ACCOUNT:
                raise
        return [one async for one in self._pages(repos.async_list_for_user, username=self.login)]

    async def read(self, organization_id: str, repository: Json) -> GithubRepository:
        """Read one of the repositories; what is too much to be reported is left out, and logged."""
        rest, name = self.github.rest, str(repository["name"])
        reported = GithubRepository(
            organization_id=organization_id,
            github_id=repository["id"],
            full_name=repository["full_name"],
            clone_url=repository.get("clone_url") or repository["html_url"],
            default_branch=repository.get("default_branch") or "",
        )
        async for branch in self._pages(rest.repos.async_list_branches, owner=self.login, repo=name):
            head = branch["commit"]["sha"]
            protected = bool(branch.get("protected"))
            reported.branches.append(Branch(name=branch["name"], head_commit=head, protected=protected))
            if len(reported.branches) == MOST_LISTED:
                break
        async for pull in self._pages(rest.pulls.async_list, owner=self.login, repo=name, state="open"):
            reported.pull_requests.append(_pull_request(pull))
            if len(reported.pull_requests) == MOST_LISTED:
                break
        reported, left_out = bounded(reported)
        if left_out or MOST_LISTED in (len(reported.branches), len(reported.pull_requests)):
            log.warning("github repository cut", repository=reported.full_name, left_out=left_out)
        return reported

    async def _pages(self, method: Any, **given: Any) -> AsyncGenerator[Json, None]:
        """Yield what a method lists, page by page. Raise GithubRefused."""
        try:
            async for one in self.github.rest.paginate(method, map_func=_json, per_page=_PAGE, **given):
                yield one
        except RequestFailed as error:
            raise GithubRefused(error.response.status_code, error.response.text) from error


def open_accounts(url: str, token: str) -> Callable[[str], Account]:
    """Return what makes the account of a login, of one client for all."""
    return partial(Account, GitHub(token or None, base_url=url, timeout=_TIMEOUT_SECONDS))


def _json(response: Response[Any]) -> list[Json]:
    """Return a page as it came. Not as githubkit's models: those refuse a page for a field that we do not read."""
    return response.json()


def _pull_request(pull: Json) -> PullRequest:
    user: Json = pull.get("user") or {}
    message = PullRequest(
        number=pull["number"],
        title=pull["title"],
        head_branch=pull["head"]["ref"],
        base_branch=pull["base"]["ref"],
        author_login=user.get("login", ""),
        draft=bool(pull.get("draft")),
        url=pull["html_url"],
    )
    message.update_time.FromJsonString(pull["updated_at"])
    return message
