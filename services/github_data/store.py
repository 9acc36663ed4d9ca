"""Queries of the github-data service. What changed is marked for the organization."""

from dataclasses import dataclass

from branchline.v1.common_pb2 import ENTITY_KIND_REPOSITORY
from branchline.v1.organizations_pb2 import GithubStatus
from branchline_internal.github_data.v1.github_data_pb2 import GithubRepository
from sqlalchemy import bindparam, delete, select, update

from services.github_data.tables import accounts, github_repositories
from services.runtime.database import Reader, Statement, Tx, insert_new
from services.runtime.spine.outbox import Mark, Outbox
from services.runtime.spine.resources import Resources

_REPOSITORIES = Resources(
    github_repositories,
    GithubRepository,
    ENTITY_KIND_REPOSITORY,
    lambda one: {"organization_id": one.organization_id, "github_id": one.github_id},
    key=["organization_id", "github_id"],
)
_OPEN = Statement(insert_new(accounts, ["organization_id"]))
_WISH = Statement(
    update(accounts)
    .where(accounts.c.organization_id == bindparam("of"))
    .values(github_login=bindparam("login"), wishes=accounts.c.wishes + 1)
)
_WANTED = Statement(
    select(accounts.c.organization_id, accounts.c.github_login, accounts.c.wishes)
    .where(accounts.c.wishes > accounts.c.fulfilled)
    .order_by(accounts.c.organization_id)
)
_STATUS = Statement(select(accounts.c.status).where(accounts.c.organization_id == bindparam("of")))
_SAVE_STATUS = Statement(
    update(accounts)
    .where(accounts.c.organization_id == bindparam("of"))
    .values(status=bindparam("state"), fulfilled=bindparam("wish"))
)
_FORGET_ACCOUNT = Statement(delete(accounts).where(accounts.c.organization_id == bindparam("of")))
_FORGET_REPOSITORIES = Statement(
    delete(github_repositories).where(github_repositories.c.organization_id == bindparam("of"))
)


@dataclass(frozen=True, slots=True)
class Wish:
    """An account that shall be read. `number` tells it from a wish that comes meanwhile."""

    organization_id: str
    login: str
    number: int


@dataclass(frozen=True, slots=True)
class GithubStore:
    """The cache of every organization's GitHub account."""

    outbox: Outbox

    def want_sync(self, tx: Tx, organization_id: str, login: str) -> None:
        """Record that an account shall be read."""
        empty = GithubStatus(organization_id=organization_id).SerializeToString()
        row = {"organization_id": organization_id, "github_login": login, "wishes": 0, "fulfilled": 0, "status": empty}
        tx.change(_OPEN, row)
        tx.change(_WISH, {"of": organization_id, "login": login})

    def wanted(self, tx: Reader) -> list[Wish]:
        """Return the accounts that shall be read."""
        return [Wish(row.organization_id, row.github_login, row.wishes) for row in tx.rows(_WANTED)]

    def save_repository(self, tx: Tx, reported: GithubRepository) -> bool:
        """Store a repository as GitHub reports it; say whether it differs from what was stored.

        Nothing is stored for an organization that was forgotten meanwhile.
        """
        if tx.value(_STATUS, {"of": reported.organization_id}) is None:
            return False
        held = _REPOSITORIES.find(tx, reported.organization_id, reported.github_id) or GithubRepository()
        reported.revision = held.revision
        if reported == held:
            return False
        reported.revision += 1
        _REPOSITORIES.save(tx, [reported])
        entity_id = f"{reported.organization_id}/{reported.github_id}"
        self.outbox.mark(tx, [Mark(entity_id, reported.revision, reported)])
        return True

    def save_status(self, tx: Tx, status: GithubStatus, wish: Wish) -> None:
        """Store how a sync ended, and which wish it fulfilled."""
        held = tx.value(_STATUS, {"of": status.organization_id})
        if held is None:  # forgotten meanwhile
            return
        status.revision = GithubStatus.FromString(held).revision + 1
        state = status.SerializeToString()
        tx.change(_SAVE_STATUS, {"of": status.organization_id, "state": state, "wish": wish.number})
        self.outbox.mark(tx, [Mark(status.organization_id, status.revision, status)])

    def forget(self, tx: Tx, organization_id: str) -> None:
        """Forget an organization's account and its repositories."""
        tx.change(_FORGET_ACCOUNT, {"of": organization_id})
        tx.change(_FORGET_REPOSITORIES, {"of": organization_id})
