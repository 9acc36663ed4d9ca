"""Queries of the github-data service. What changed is marked for the organization."""

from dataclasses import dataclass

from branchline.github_data.v1.github_data_pb2 import GithubRepository
from branchline.resource.v1.organization_pb2 import GithubStatus
from sqlalchemy import select, update
from sqlalchemy.dialects.sqlite import insert as upsert

from services.github_data.tables import accounts, github_repositories
from services.runtime.service import Chassis
from services.runtime.spine.outbox import Mark


@dataclass(frozen=True, slots=True)
class GithubStore:
    """The cache of every organization's GitHub account."""

    chassis: Chassis

    async def want_sync(self, organization_id: str, github_login: str) -> None:
        """Record that an account shall be read."""
        values = {"github_login": github_login, "sync_wanted": True}
        empty = GithubStatus(organization_id=organization_id).SerializeToString()
        statement = upsert(accounts).values(organization_id=organization_id, status=empty, **values)
        async with self.chassis.database.transaction() as tx:
            await tx.execute(statement.on_conflict_do_update(index_elements=["organization_id"], set_=values))

    async def wanted(self) -> list[tuple[str, str]]:
        """Return (organization id, login) of accounts that shall be read."""
        query = select(accounts.c.organization_id, accounts.c.github_login).where(accounts.c.sync_wanted.is_(True))
        async with self.chassis.database.read() as connection:
            return [(row.organization_id, row.github_login) for row in (await connection.execute(query)).all()]

    async def save_repository(self, reported: GithubRepository) -> bool:
        """Store a repository as GitHub reports it; say whether it differs from what was stored."""
        table = github_repositories
        key = (table.c.organization_id == reported.organization_id, table.c.github_id == reported.github_id)
        async with self.chassis.database.transaction() as tx:
            payload = (await tx.execute(select(table.c.payload).where(*key))).scalar_one_or_none()
            held = GithubRepository.FromString(payload) if payload is not None else GithubRepository()
            reported.revision = held.revision
            if reported == held:
                return False
            reported.revision += 1
            values = {"payload": reported.SerializeToString()}
            statement = upsert(table).values(
                organization_id=reported.organization_id, github_id=reported.github_id, **values
            )
            await tx.execute(
                statement.on_conflict_do_update(index_elements=["organization_id", "github_id"], set_=values)
            )
            entity_id = f"{reported.organization_id}/{reported.github_id}"
            await self.chassis.outbox.mark(tx, [Mark(entity_id, reported.revision, reported)])
        return True

    async def save_status(self, status: GithubStatus) -> None:
        """Store how a sync ended, and that it is no longer wanted."""
        key = accounts.c.organization_id == status.organization_id
        async with self.chassis.database.transaction() as tx:
            held = GithubStatus.FromString((await tx.execute(select(accounts.c.status).where(key))).scalar_one())
            status.revision = held.revision + 1
            values = {"sync_wanted": False, "status": status.SerializeToString()}
            await tx.execute(update(accounts).where(key).values(values))
            await self.chassis.outbox.mark(tx, [Mark(status.organization_id, status.revision, status)])
