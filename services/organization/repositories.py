"""The catalogue of repositories: added by URL or by GitHub's report, kept as the repository pushes it, and deleted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from branchline.v1.common_pb2 import ENTITY_KIND_REPOSITORY
from branchline.v1.errors_pb2 import ERROR_REASON_REPOSITORY_EXISTS
from branchline.v1.history_pb2 import (
    EVENT_KIND_REPOSITORY_CREATED,
    EVENT_KIND_REPOSITORY_DELETED,
    EVENT_KIND_REPOSITORY_DELETING,
)
from branchline.v1.repositories_pb2 import Repository
from branchline_internal.repository.v1.repository_pb2 import DeleteRepositoryRequest, EnsureRepositoryRequest
from sqlalchemy import String, bindparam, delete, select, tuple_

from services.organization.destinations import TO_REPOSITORY
from services.organization.feed import Feed
from services.organization.tables import github_repositories, repositories, repository_deletions
from services.organization.tasks import Tasks
from services.runtime.clock import Clock
from services.runtime.database import Reader, Statement, Tx, insert_new, is_in, upsert
from services.runtime.errors import AlreadyExists
from services.runtime.spine.index import Entry, Index
from services.runtime.spine.ingest import Pushed
from services.runtime.spine.outbox import Mark, Outbox
from services.runtime.spine.pages import Page, page_of
from services.runtime.spine.resources import Held

BURIED_AT_ONCE = 500
"""Most tasks that are removed from the index in one step."""

REPOSITORIES = Held(repositories, Repository, ENTITY_KIND_REPOSITORY)
_OF_URL = REPOSITORIES.by("scope", "remote_url")

_c = repositories.c
_d = repository_deletions.c
_BEGIN_DELETION = Statement(insert_new(repository_deletions, ["repository_id"]))
_GONE = Statement(upsert(repository_deletions, ["repository_id"], keep=["organization_id", "request_time"]))
_DELETIONS = Statement(select(repository_deletions).where(is_in(_d.repository_id, "ids")))
_GONE_ONES = Statement(select(_d.repository_id).where(_d.gone.is_(True)).limit(BURIED_AT_ONCE))
_FORGET_DELETION = Statement(delete(repository_deletions).where(_d.repository_id == bindparam("repository")))
_UNLINK = Statement(delete(github_repositories).where(github_repositories.c.repository_id == bindparam("repository")))
_UNTOUCHED = Statement(
    select(_c.payload)
    .where(_c.scope == bindparam("of"), _c.deleted.is_(False), _c.id.not_in(select(_d.repository_id)))
    .limit(bindparam("most"))
)
_ANY = Statement(select(_c.id).where(_c.scope == bindparam("of"), _c.deleted.is_(False)).limit(1))
_place = tuple_(_c.display_name, _c.id)
_listed = (
    select(_c.display_name, _c.id, _c.payload)
    .where(_c.scope == bindparam("of"), _c.deleted.is_(False))
    .order_by(_c.display_name, _c.id)
    .limit(bindparam("most"))
)
FIRST_PAGE = Statement(_listed)
NEXT_PAGE = Statement(
    _listed.where(_place > tuple_(bindparam("after_name", type_=String), bindparam("after_id", type_=String)))
)


@dataclass(frozen=True, slots=True)
class Repositories:
    """What is indexed of repositories, and their births and deaths."""

    index: Index
    outbox: Outbox
    feed: Feed
    tasks: Tasks
    clock: Clock

    def of_url(self, tx: Reader, organization_id: str, remote_url: str) -> Repository | None:
        """Return the organization's repository with this URL, or None."""
        return next(iter(_OF_URL(tx, scope=organization_id, remote_url=remote_url)), None)

    def add(self, tx: Tx, repository: Repository) -> None:
        """Index a new repository and have the child created. Raise AlreadyExists naming the one that has the URL."""
        holder = self.of_url(tx, repository.organization_id, repository.remote_url)
        if holder is not None:
            sentence = f"{holder.display_name} has this URL"
            reason = ERROR_REASON_REPOSITORY_EXISTS
            raise AlreadyExists(ENTITY_KIND_REPOSITORY, holder.id, sentence, reason, repository_id=holder.id)
        self.found(tx, repository)
        self.outbox.mark(tx, [Mark(repository.id, 1, EnsureRepositoryRequest(repository=repository), TO_REPOSITORY)])
        words = f"{repository.display_name} added"
        self.feed.record(tx, repository.organization_id, EVENT_KIND_REPOSITORY_CREATED, words, repository.id)

    def found(self, tx: Tx, repository: Repository) -> None:
        """Give a new repository its id and index it."""
        now = self.clock.timestamp()
        repository.id = self.clock.new_id("repo")
        repository.create_time.CopyFrom(now)
        repository.activity_time.CopyFrom(now)
        repository.revision = 1
        self.index.put(tx, _entry(repository))

    def take(self, tx: Tx, pushed: Sequence[Pushed[Repository]]) -> set[str]:
        """Index pushed repositories, and bury those that are gone; return the organizations that are rid of some.

        One whose deletion was asked for shows that, also while it does not know of it yet.
        """
        deletions = {row.repository_id: row for row in tx.rows(_DELETIONS, {"ids": [one.id for one in pushed]})}
        entries: list[Entry] = []
        for one in pushed:
            if one.deleted:
                continue
            asked = deletions.get(one.id)
            if asked is not None and not one.state.HasField("delete_time"):
                one.state.delete_time.FromNanoseconds(int(asked.request_time * 1e9))
            entries.append(_entry(one.state))
        self.index.put_many(tx, entries)
        return self._note_gone(tx, [one.state for one in pushed if one.deleted])

    def _note_gone(self, tx: Tx, gone: Sequence[Repository]) -> set[str]:
        now = self.clock.seconds()
        tx.change_many(
            _GONE,
            [
                {
                    "repository_id": one.id,
                    "organization_id": one.organization_id,
                    "request_time": now,
                    "gone": True,
                }
                for one in gone
            ],
        )
        return {self.bury(tx, one.id) for one in gone} - {""}

    def begin_deletion(self, tx: Tx, repository: Repository) -> None:
        """Have a repository deleted by its owner."""
        if repository.HasField("delete_time"):
            return
        now = self.clock.timestamp()
        repository.delete_time.CopyFrom(now)
        repository.revision += 1
        if not self.index.put(tx, _entry(repository)):
            return  # another has begun it
        given = {"repository_id": repository.id, "organization_id": repository.organization_id, "gone": False}
        tx.change(_BEGIN_DELETION, {**given, "request_time": now.ToNanoseconds() / 1e9})
        forget = DeleteRepositoryRequest(repository_id=repository.id)
        self.outbox.mark(tx, [Mark(repository.id, repository.revision, forget, TO_REPOSITORY)])
        words = f"{repository.display_name} is being deleted"
        self.feed.record(tx, repository.organization_id, EVENT_KIND_REPOSITORY_DELETING, words, repository.id)

    def begin_deletions(self, tx: Tx, organization_id: str, most: int) -> int:
        """Have some of an organization's repositories deleted that are not yet; return how many."""
        rows = tx.rows(_UNTOUCHED, {"of": organization_id, "most": most})
        for row in rows:
            self.begin_deletion(tx, Repository.FromString(row.payload))
        return len(rows)

    def any_left(self, tx: Reader, organization_id: str) -> bool:
        """Say whether an organization has repositories."""
        return tx.row(_ANY, {"of": organization_id}) is not None

    def bury(self, tx: Tx, repository_id: str) -> str:
        """Remove some of what is indexed below a repository that is gone, at last the repository itself.

        Return its organization once nothing is left, else an empty string.
        """
        found: list[Any] = tx.rows(_DELETIONS, {"ids": [repository_id]})
        if not found or not found[0].gone:
            return ""
        organization_id: str = found[0].organization_id
        if self.tasks.forget_of(tx, organization_id, repository_id, BURIED_AT_ONCE) == BURIED_AT_ONCE:
            return ""
        tx.change(_UNLINK, {"repository": repository_id})
        tx.change(_FORGET_DELETION, {"repository": repository_id})
        repository = REPOSITORIES.find(tx, repository_id)
        if repository is not None:
            repository.revision += 1
            if self.index.put(tx, _entry(repository, deleted=True)):
                words = f"{repository.display_name} deleted"
                self.feed.record(tx, organization_id, EVENT_KIND_REPOSITORY_DELETED, words, repository_id)
        return organization_id

    def unburied(self, tx: Reader) -> list[str]:
        """Return repositories that are gone and not yet buried."""
        return [row.repository_id for row in tx.rows(_GONE_ONES)]

    def is_unburied(self, tx: Reader, repository_id: str) -> bool:
        """Say whether a repository is gone and not yet buried."""
        return any(row.gone for row in tx.rows(_DELETIONS, {"ids": [repository_id]}))

    def page(self, tx: Reader, organization_id: str, after: Sequence[Any] | None, most: int) -> Page[Repository]:
        """Return the repositories behind a place in the catalogue, by name."""
        given: dict[str, Any] = {"of": organization_id, "most": most + 1}
        if after is not None:
            given |= {"after_name": after[0], "after_id": after[1]}
        rows = tx.each(FIRST_PAGE if after is None else NEXT_PAGE, given)
        return page_of(Repository, rows, ["display_name", "id"], most)


def _entry(repository: Repository, *, deleted: bool = False) -> Entry:
    return Entry(
        ENTITY_KIND_REPOSITORY,
        repository.organization_id,
        repository.id,
        repository.revision,
        repository,
        deleted=deleted,
        columns={"display_name": repository.display_name, "remote_url": repository.remote_url},
    )
