"""The end of an organization, driven by rows: repositories, then what its other children hold, then its own.

Each step is one bounded transaction and begins where the rows say that the last one ended, so a stop at any point is
gone on from. A step is taken by whatever makes it possible (the command, a repository that is gone, a child that has
forgotten), and by a sweep.
"""

from dataclasses import dataclass

from branchline_internal.github_data.v1.github_data_pb2 import DeleteOrganizationRequest
from branchline_internal.history.v1.history_pb2 import DeleteFeedRequest
from branchline_internal.user.v1.user_pb2 import ForgetTaskStatesRequest
from sqlalchemy import Table, bindparam, delete, select, update

from services.organization.blobs import Blobs
from services.organization.claims import Claims
from services.organization.destinations import TO_GITHUB_DATA, TO_HISTORY, TO_USER
from services.organization.drafts import Drafts
from services.organization.invitations import Invitations
from services.organization.members import REMOVED_AT_ONCE, Members
from services.organization.organizations import ORGANIZATIONS, Organizations
from services.organization.repositories import Repositories
from services.organization.tables import (
    HISTORY,
    WATCHED,
    agents,
    github_status,
    input_requests,
    organizations,
    sandbox_providers,
    teardowns,
    user_task_states,
)
from services.runtime.database import Database, Reader, Statement, Tx, insert_new
from services.runtime.loops import for_each
from services.runtime.spine.index import IndexTable
from services.runtime.spine.outbox import Mark, Outbox

_AT_ONCE = 200

_DELETING = Statement(select(organizations.c.id).where(organizations.c.deleting.is_(True)))
_TOLD = Statement(
    select(teardowns.c.child, teardowns.c.done).where(teardowns.c.organization_id == bindparam("organization"))
)
_TELL = Statement(insert_new(teardowns, ["organization_id", "child"]))
_DONE = Statement(
    update(teardowns)
    .where(teardowns.c.organization_id == bindparam("organization"), teardowns.c.child == bindparam("of"))
    .values(done=True)
)
_FORGET = Statement(delete(teardowns).where(teardowns.c.organization_id == bindparam("organization")))

_FORGET_PROVIDERS = Statement(
    delete(sandbox_providers).where(sandbox_providers.c.organization_id == bindparam("organization"))
)


def _rows_of(table: Table) -> Statement:
    columns = table.c
    return Statement(
        select(columns.scope, columns.id, columns.change_seq)
        .where(columns.scope == bindparam("organization"))
        .limit(_AT_ONCE)
    )


_PURGED: list[tuple[IndexTable, Statement]] = [
    (spec, _rows_of(spec.table))
    for spec in (HISTORY, *WATCHED)
    if spec.table in {HISTORY.table, user_task_states, github_status, agents, input_requests}
]


@dataclass(frozen=True, slots=True)
class Teardown:
    """Ends organizations."""

    outbox: Outbox
    organizations: Organizations
    members: Members
    repositories: Repositories
    invitations: Invitations
    drafts: Drafts
    claims: Claims
    blobs: Blobs

    def advance(self, tx: Tx, organization_id: str) -> bool:
        """Take the next step, if there is one now; say whether another can follow at once."""
        organization = ORGANIZATIONS.find(tx, organization_id)
        if organization is None or not organization.HasField("delete_time"):
            return False
        if self.repositories.begin_deletions(tx, organization_id, _AT_ONCE) == _AT_ONCE:
            return True
        if self.repositories.any_left(tx, organization_id):
            return False
        told = {row.child: row.done for row in tx.rows(_TOLD, {"organization": organization_id})}
        if not told:
            self._tell_children(tx, organization_id)
        if not told or not all(told.values()):
            return False
        for spec, rows in _PURGED:
            if self.organizations.index.forget_where(tx, spec, rows, {"organization": organization_id}):
                return True
        if self.members.remove_some(tx, organization_id) == REMOVED_AT_ONCE:
            return True
        if self._forget_rest(tx, organization_id):
            return True
        tx.change(_FORGET_PROVIDERS, {"organization": organization_id})
        self.organizations.end(tx, organization)
        tx.change(_FORGET, {"organization": organization_id})
        return False

    def _forget_rest(self, tx: Tx, organization_id: str) -> bool:
        """Forget some of what is not watched; say whether there may be more. Bytes of blobs are collected."""
        return (
            self.invitations.forget_of(tx, organization_id, _AT_ONCE) == _AT_ONCE
            or self.drafts.forget_of(tx, organization_id, _AT_ONCE) == _AT_ONCE
            or self.claims.drop_of(tx, organization_id)
            or self.blobs.discard_of(tx, organization_id)
        )

    def _tell_children(self, tx: Tx, organization_id: str) -> None:
        told = {
            TO_GITHUB_DATA: DeleteOrganizationRequest(organization_id=organization_id),
            TO_HISTORY: DeleteFeedRequest(organization_id=organization_id),
            TO_USER: ForgetTaskStatesRequest(organization_id=organization_id),
        }
        tx.change_many(_TELL, [{"organization_id": organization_id, "child": child, "done": False} for child in told])
        self.outbox.mark(tx, [Mark(organization_id, 1, request, child) for child, request in told.items()])

    async def forgotten(self, database: Database, organization_id: str, child: str) -> None:
        """Note that a child has forgotten an organization, and go on."""
        more = await database.write(self._forgotten, organization_id, child)
        while more:
            more = await database.write(self.advance, organization_id)

    def _forgotten(self, tx: Tx, organization_id: str, child: str) -> bool:
        tx.change(_DONE, {"organization": organization_id, "of": child})
        return self.advance(tx, organization_id)

    async def sweep(self, database: Database) -> None:
        """Bury the repositories and end the organizations that are waiting for it."""

        async def bury(repository_id: str) -> None:
            while await database.write(self._bury, repository_id):
                pass

        async def end(organization_id: str) -> None:
            while await database.write(self.advance, organization_id):
                pass

        await for_each(await database.read(self.repositories.unburied), "bury a repository", bury)
        await for_each(await database.read(_deleting), "end an organization", end)

    def _bury(self, tx: Tx, repository_id: str) -> bool:
        """Take a step; say whether there are more."""
        organization_id = self.repositories.bury(tx, repository_id)
        if organization_id:
            self.advance(tx, organization_id)
        return not organization_id and self.repositories.is_unburied(tx, repository_id)


def _deleting(tx: Reader) -> list[str]:
    return [row.id for row in tx.rows(_DELETING)]
