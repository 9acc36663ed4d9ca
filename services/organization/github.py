"""What the GitHub cache reports: its status, and repositories, which are created and kept up to date from it."""

from collections.abc import Sequence
from dataclasses import dataclass

from branchline.v1.common_pb2 import ENTITY_KIND_GITHUB_STATUS
from branchline.v1.organizations_pb2 import GITHUB_CONNECTION_NOT_CONNECTED, GithubStatus
from branchline.v1.repositories_pb2 import REPOSITORY_SOURCE_GITHUB, Repository
from branchline_internal.github_data.v1.github_data_pb2 import GithubRepository
from branchline_internal.repository.v1.repository_pb2 import EnsureRepositoryRequest
from sqlalchemy import bindparam, delete, select

from services.organization.destinations import TO_REPOSITORY
from services.organization.organizations import ORGANIZATIONS
from services.organization.repositories import REPOSITORIES, Repositories
from services.organization.tables import github_repositories, github_status
from services.runtime.database import Reader, Statement, Tx, insert_new
from services.runtime.spine.index import Entry, Index
from services.runtime.spine.ingest import Pushed
from services.runtime.spine.outbox import Mark, Outbox
from services.runtime.spine.resources import Held

STATUSES = Held(github_status, GithubStatus, ENTITY_KIND_GITHUB_STATUS)

_OF_ID = (
    github_repositories.c.organization_id == bindparam("organization"),
    github_repositories.c.github_id == bindparam("number"),
)
_LINKED = Statement(select(github_repositories.c.repository_id).where(*_OF_ID))
_LINK = Statement(insert_new(github_repositories, ["organization_id", "github_id"]))
_UNLINK = Statement(delete(github_repositories).where(*_OF_ID))


@dataclass(frozen=True, slots=True)
class Github:
    """The organization's view of the GitHub cache."""

    index: Index
    outbox: Outbox
    repositories: Repositories

    def take_statuses(self, tx: Tx, pushed: Sequence[Pushed[GithubStatus]]) -> None:
        """Index how the cache stands."""
        entries = [
            Entry(
                ENTITY_KIND_GITHUB_STATUS,
                one.state.organization_id,
                one.state.organization_id,
                one.revision,
                one.state,
                deleted=one.deleted,
            )
            for one in pushed
        ]
        self.index.put_many(tx, entries)

    def take_repository(self, tx: Tx, pushed: Pushed[GithubRepository]) -> None:
        """Create the repository child that GitHub reports, and pass branches and pull requests down to it."""
        reported = pushed.state
        key = {"organization": reported.organization_id, "number": reported.github_id}
        if pushed.deleted:
            tx.change(_UNLINK, key)
            return
        repository = self._ours(tx, reported) or self._import(tx, reported)
        if repository is None or repository.HasField("delete_time"):
            return
        repository.display_name = reported.full_name
        repository.default_branch = reported.default_branch
        request = EnsureRepositoryRequest(
            repository=repository,
            github=True,
            branches=reported.branches,
            pull_requests=reported.pull_requests,
            github_revision=reported.revision,
        )
        self.outbox.mark(tx, [Mark(repository.id, reported.revision, request, TO_REPOSITORY)])

    def _ours(self, tx: Tx, reported: GithubRepository) -> Repository | None:
        """Return the repository that a report is about, by GitHub's id or by its URL."""
        key = {"organization": reported.organization_id, "number": reported.github_id}
        linked = tx.value(_LINKED, key)
        if linked:
            return REPOSITORIES.find(tx, linked)
        found = self.repositories.of_url(tx, reported.organization_id, reported.clone_url)
        if found is not None:
            self._link(tx, reported, found.id)
        return found

    def _import(self, tx: Tx, reported: GithubRepository) -> Repository | None:
        """Create the repository of a report, if its organization wants that."""
        organization = ORGANIZATIONS.find(tx, reported.organization_id)
        if organization is None or organization.HasField("delete_time"):
            return None
        if not organization.settings.auto_import_repositories:
            return None
        repository = Repository(
            organization_id=organization.id,
            source=REPOSITORY_SOURCE_GITHUB,
            remote_url=reported.clone_url,
            display_name=reported.full_name,
            default_branch=reported.default_branch,
        )
        self.repositories.found(tx, repository)
        self._link(tx, reported, repository.id)
        return repository

    def _link(self, tx: Tx, reported: GithubRepository, repository_id: str) -> None:
        given = {"organization_id": reported.organization_id, "github_id": reported.github_id}
        tx.change(_LINK, {**given, "repository_id": repository_id})


def status_of(tx: Reader, organization_id: str) -> GithubStatus:
    """Return how an organization's GitHub cache stands."""
    none = GithubStatus(organization_id=organization_id, connection=GITHUB_CONNECTION_NOT_CONNECTED)
    return STATUSES.find(tx, organization_id) or none
