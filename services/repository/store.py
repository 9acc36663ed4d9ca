"""Queries of the repositories themselves and of the caches of GitHub. What changed is marked for the organization."""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from branchline.v1.common_pb2 import ENTITY_KIND_REPOSITORY
from branchline.v1.repositories_pb2 import Branch, PullRequest, Repository
from branchline_internal.repository.v1.repository_pb2 import EnsureRepositoryRequest
from branchline_internal.task.v1.task_pb2 import SetPullRequestRequest
from sqlalchemy import bindparam, delete, func, select, update

from services.repository.downward import TO_TASK
from services.repository.tables import branches, deleted_repositories, pull_requests, repositories, task_index
from services.runtime.clock import Clock, column_seconds
from services.runtime.database import Reader, Statement, Tx, insert, insert_new, is_in
from services.runtime.errors import NotFound
from services.runtime.principal import Principal
from services.runtime.spine.outbox import Mark, Outbox
from services.runtime.spine.resources import Resources

ACTIVITY_SECONDS = 60.0
"""How exactly a repository says when something last happened in it."""

REPOSITORIES = Resources(
    repositories,
    Repository,
    ENTITY_KIND_REPOSITORY,
    lambda one: {
        "id": one.id,
        "organization_id": one.organization_id,
        "deleting": one.HasField("delete_time"),
        "activity_time": column_seconds(one.activity_time),
    },
    own=["github_revision"],
)
_BRANCHES_OF = Statement(select(branches.c.payload).where(branches.c.repository_id == bindparam("of")))
_BRANCH_NAMES_OF = Statement(select(branches.c.name).where(branches.c.repository_id == bindparam("of")))
_PULL_REQUESTS_OF = Statement(
    select(pull_requests.c.payload)
    .where(pull_requests.c.repository_id == bindparam("of"))
    .order_by(pull_requests.c.number)
)
_ADD_BRANCH = Statement(insert(branches))
_ADD_PULL_REQUEST = Statement(insert(pull_requests))
_DROP_BRANCHES = Statement(delete(branches).where(branches.c.repository_id == bindparam("of")))
_DROP_PULL_REQUESTS = Statement(delete(pull_requests).where(pull_requests.c.repository_id == bindparam("of")))
_TAKE_GITHUB_REVISION = Statement(
    update(repositories)
    .where(repositories.c.id == bindparam("of"), repositories.c.github_revision < bindparam("newest"))
    .values(github_revision=bindparam("newest"))
)
_LOCK = Statement(
    select(repositories.c.id).where(is_in(repositories.c.id, "ids")).order_by(repositories.c.id).with_for_update()
)
_LIVE_TASKS = Statement(
    select(task_index.c.repository_id, func.count().label("tasks"))
    .where(is_in(task_index.c.repository_id, "ids"), task_index.c.live.is_(True))
    .group_by(task_index.c.repository_id)
)
_LIVE_TASK_OF_BRANCH = Statement(
    select(task_index.c.branch, task_index.c.task_id).where(
        task_index.c.repository_id == bindparam("of"), task_index.c.live.is_(True)
    )
)
_DELETED = Statement(select(deleted_repositories.c.id).where(deleted_repositories.c.id == bindparam("of")))
_BURY = Statement(insert_new(deleted_repositories, ["id"]))


@dataclass(frozen=True, slots=True)
class RepositoryStore:
    """Repositories and their caches."""

    outbox: Outbox
    clock: Clock

    def visible(self, tx: Reader, repository_id: str, principal: Principal) -> Repository:
        """Return a repository; raise NotFound if it is not the caller's to see."""
        repository = REPOSITORIES.get(tx, repository_id)
        if not principal.sees(repository.organization_id):
            raise NotFound(ENTITY_KIND_REPOSITORY, repository_id)
        return repository

    def lock(self, tx: Tx, repository_ids: Iterable[str]) -> None:
        """Make the writers of repositories take turns, so that what was looked at stays true."""
        ids = sorted(set(repository_ids))
        if ids:
            tx.rows(_LOCK, {"ids": ids})

    def ensure(self, tx: Tx, request: EnsureRepositoryRequest) -> None:
        """Create a repository, or bring its name and default branch and its caches up to date."""
        given = request.repository
        self.lock(tx, [given.id])
        held = REPOSITORIES.find(tx, given.id)
        if held is None:
            if tx.value(_DELETED, {"of": given.id}) is not None:
                return
            REPOSITORIES.save(tx, [given])
        elif held.HasField("delete_time"):
            return
        elif (held.display_name, held.default_branch) != (given.display_name, given.default_branch):
            held.display_name, held.default_branch = given.display_name, given.default_branch
            self.save(tx, [held])
        if request.github and tx.change(_TAKE_GITHUB_REVISION, {"of": given.id, "newest": request.github_revision}):
            self._replace_caches(tx, request)

    def _replace_caches(self, tx: Tx, request: EnsureRepositoryRequest) -> None:
        repository_id = request.repository.id
        before = self.pull_requests(tx, repository_id)
        self.drop_caches(tx, repository_id)
        for reported in (*request.branches, *request.pull_requests):
            reported.repository_id = repository_id
        tx.change_many(
            _ADD_BRANCH,
            [
                {"repository_id": repository_id, "name": branch.name, "payload": branch.SerializeToString()}
                for branch in {branch.name: branch for branch in request.branches}.values()
            ],
        )
        tx.change_many(
            _ADD_PULL_REQUEST,
            [
                {"repository_id": repository_id, "number": pull.number, "payload": pull.SerializeToString()}
                for pull in {pull.number: pull for pull in request.pull_requests}.values()
            ],
        )
        after = self.pull_requests(tx, repository_id)
        told = [
            SetPullRequestRequest(task_id=task_id, pull_request=after.get(branch))
            for branch, task_id in self.branch_holders(tx, repository_id).items()
            if before.get(branch) != after.get(branch)
        ]
        self.outbox.mark(tx, [Mark(one.task_id, request.github_revision, one, TO_TASK) for one in told])

    def drop_caches(self, tx: Tx, repository_id: str) -> None:
        """Forget what GitHub reported."""
        tx.change(_DROP_BRANCHES, {"of": repository_id})
        tx.change(_DROP_PULL_REQUESTS, {"of": repository_id})

    def save(self, tx: Tx, changed: Sequence[Repository]) -> None:
        """Store new states of repositories and push them up."""
        for repository in changed:
            repository.revision += 1
        REPOSITORIES.save(tx, changed)
        self.outbox.mark(tx, [Mark(one.id, one.revision, one) for one in changed])

    def remove(self, tx: Tx, repository: Repository) -> None:
        """Remove a repository with its caches and push up that it is gone."""
        repository.revision += 1
        self.drop_caches(tx, repository.id)
        REPOSITORIES.delete(tx, repository.id)
        tx.change(_BURY, {"id": repository.id, "delete_time": self.clock.seconds()})
        self.outbox.mark(tx, [Mark(repository.id, repository.revision, repository, deleted=True)])

    def quiet(self, noted: Mapping[str, float]) -> set[str]:
        """Return those of which it was not told for a while that something happened in them.

        With each comes when that was noted last.
        """
        now = self.clock.seconds()
        return {one for one, time in noted.items() if now - time >= ACTIVITY_SECONDS}

    def touch(self, tx: Tx, repository_ids: Iterable[str]) -> None:
        """Count live tasks again, and note that something happened."""
        ids = sorted(set(repository_ids))
        if not ids:
            return
        live = {row.repository_id: row.tasks for row in tx.rows(_LIVE_TASKS, {"ids": ids})}
        touched = sorted(REPOSITORIES.find_many(tx, ids), key=lambda one: one.id)
        for repository in touched:
            repository.live_task_count = live.get(repository.id, 0)
            repository.activity_time.CopyFrom(self.clock.timestamp())
        self.save(tx, touched)

    def branch_holders(self, tx: Reader, repository_id: str) -> dict[str, str]:
        """Return the live tasks' branches with the tasks' ids."""
        return {row.branch: row.task_id for row in tx.rows(_LIVE_TASK_OF_BRANCH, {"of": repository_id})}

    def known_branches(self, tx: Reader, repository_id: str) -> Set[str]:
        """Return the names of all branches that GitHub reported."""
        return {row.name for row in tx.rows(_BRANCH_NAMES_OF, {"of": repository_id})}

    def branches(self, tx: Reader, repository_id: str) -> list[Branch]:
        """Return the cached branches."""
        return [Branch.FromString(row.payload) for row in tx.rows(_BRANCHES_OF, {"of": repository_id})]

    def pull_requests(self, tx: Reader, repository_id: str) -> dict[str, PullRequest]:
        """Return the cached pull requests by the branch they are from: of several, the newest."""
        found = [PullRequest.FromString(row.payload) for row in tx.rows(_PULL_REQUESTS_OF, {"of": repository_id})]
        return {pull.head_branch: pull for pull in found}
