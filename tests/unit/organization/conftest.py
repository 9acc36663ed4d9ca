"""The organization's stores over a real SQLite file, without the other services."""

import sqlite3
from collections.abc import AsyncGenerator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from branchline.v1 import organizations_pb2, tasks_pb2
from branchline.v1.organizations_pb2 import Organization
from branchline.v1.repositories_pb2 import Repository
from branchline.v1.roles_pb2 import ROLE_OWNER, Role
from branchline.v1.tasks_pb2 import TaskSummary
from branchline.v1.users_pb2 import User
from branchline_internal.spine.v1.push_pb2 import PushEntry, PushRequest
from branchline_internal.user.v1.user_pb2 import DraftState
from google.protobuf.message import Message
from sqlalchemy import bindparam, select

from services.organization.blob_bytes import DEFAULT_QUOTA_BYTES, BlobsConfig, open_bytes
from services.organization.ingest import OrganizationIngest
from services.organization.members import MEMBERS
from services.organization.public_blobs import PublicBlobServicer
from services.organization.public_organizations import PublicOrganizationServicer
from services.organization.public_reads import PublicHistoryReader, PublicTaskReader, PublicUserReader
from services.organization.public_repositories import PublicRepositoryServicer
from services.organization.servicer import OrganizationServicer
from services.organization.stores import Stores, open_stores
from services.organization.uploads import Uploads
from services.runtime.clock import Clock
from services.runtime.database import Database, Statement, open_database
from services.runtime.principal import Principal, bind_principal
from services.runtime.spine.commands import Commands
from services.runtime.spine.ingest import Ingest
from services.runtime.spine.outbox import Outbox, OutboxRow
from services.runtime.spine.tables import outbox as outbox_table
from tests.support.databases import look_into, migrated, migrated_file

NOBODY: Any = None
MEMBERS_OF = MEMBERS.by("scope")
_PENDING = Statement(
    select(outbox_table).where(outbox_table.c.destination == bindparam("to")).order_by(outbox_table.c.seq)
)


@dataclass
class Room:
    """One organization service without its neighbours."""

    url: str
    folder: Path
    database: Database
    outbox: Outbox
    stores: Stores
    ingest: Ingest
    uploads: Uploads
    clock: "Time"

    @property
    def internal(self) -> OrganizationServicer:
        return OrganizationServicer(self.database, self.clock.clock, self.stores, NOBODY, self.uploads)

    @property
    def blobs(self) -> PublicBlobServicer:
        return PublicBlobServicer(self.database, self.stores, self.commands, self.uploads)

    @property
    def organizations(self) -> PublicOrganizationServicer:
        return PublicOrganizationServicer(self.database, self.stores, self.commands, NOBODY)

    @property
    def repositories(self) -> PublicRepositoryServicer:
        return PublicRepositoryServicer(self.database, self.stores, self.commands, self.outbox)

    @property
    def tasks(self) -> PublicTaskReader:
        return PublicTaskReader(self.database, self.stores)

    @property
    def history(self) -> PublicHistoryReader:
        return PublicHistoryReader(self.database, self.stores)

    @property
    def users(self) -> PublicUserReader:
        return PublicUserReader(self.database, self.stores)

    @property
    def commands(self) -> Commands:
        return Commands(self.database, Clock(), "k" * 32)

    async def push(self, *entries: tuple[Message, bool]) -> dict[int, str]:
        """Apply states as a child pushes them; return the reasons of those that were refused."""
        return await self.ingest.submit(PushRequest(entries=[_entry(state, deleted) for state, deleted in entries]))

    async def push_draft(self, state: DraftState, *, deleted: bool = False) -> None:
        """Apply a draft as the user service pushes it."""
        draft = state.draft
        entry_id = f"{state.user_id}/{draft.task_id}/{draft.session_id}"
        await self.push_as(entry_id, state, revision=draft.revision, deleted=deleted)

    async def push_as(self, entry_id: str, state: Message, *, revision: int = 1, deleted: bool = False) -> None:
        """Apply a state under an id that it does not say."""
        entry = PushEntry(id=entry_id, revision=revision, deleted=deleted)
        entry.state.Pack(state)
        assert await self.ingest.submit(PushRequest(entries=[entry])) == {}

    async def found(self, slug: str = "acme", *, owner: str = "usr_owner") -> Organization:
        """Found an organization; its owner is the caller from now on."""
        organization = Organization(slug=slug, display_name=slug.title(), kind=organizations_pb2.ORGANIZATION_KIND_TEAM)
        user = User(id=owner, display_name=owner, email=f"{owner}@example.com", revision=1)
        await self.push((user, False))
        await self.database.write(self.stores.organizations.found, organization, user)
        call_as(owner, organization.id)
        return organization

    async def join(self, organization_id: str, user_id: str, role: Role.ValueType) -> None:
        user = User(id=user_id, display_name=user_id, email=f"{user_id}@example.com", revision=1)
        await self.database.write(self.stores.members.join, organization_id, user, role)

    async def repository(self, organization_id: str, name: str = "acme/shop") -> Repository:
        repository = Repository(
            organization_id=organization_id, display_name=name, remote_url=f"https://git.test/{name}"
        )
        await self.database.write(self.stores.repositories.add, repository)
        return repository

    async def member_ids(self, organization_id: str) -> set[str]:
        found = await self.database.read(lambda tx: MEMBERS_OF(tx, scope=organization_id))
        return {member.user_id for member in found}

    def count(self, table: str) -> int:
        """Return how many rows a table has, as the database says."""
        return look_into(self.url, f"SELECT count(*) FROM {table}")[0][0]

    def plan(self, statement: Statement, **given: object) -> str:
        """Return how SQLite would go about a query."""
        text = f"EXPLAIN QUERY PLAN {statement.sqlite.text}"
        path = migrated_file("organization", self.folder / "plan").removeprefix("sqlite:///")
        with closing(sqlite3.connect(path)) as connection:
            return " / ".join(row[3] for row in connection.execute(text, statement.sqlite.values(given)))

    async def marks(self, destination: str, kind: type[Message]) -> list[Any]:
        """Return what waits in the outbox for a destination."""
        rows = await self.database.read(lambda tx: tx.rows(_PENDING, {"to": destination}))
        kept = [_row(row) for row in rows]
        return [kind.FromString(row.payload) for row in kept if row.holds(kind)]


def _entry(state: Any, deleted: bool) -> PushEntry:
    entity_id = getattr(state, "id", "") or getattr(state, "organization_id", "")
    if hasattr(state, "api_token"):
        entity_id = state.api_token.id
    if hasattr(state, "open_session_id"):
        entity_id = "/".join((state.user_id, state.task_id, state.session_id))
    entry = PushEntry(id=entity_id, revision=getattr(state, "revision", 1), deleted=deleted)
    entry.state.Pack(state)
    return entry


@dataclass
class Time:
    """The present, which goes on as it does and by what is added."""

    added: timedelta = timedelta()

    @property
    def clock(self) -> Clock:
        return Clock(now=lambda: datetime.now(UTC) + self.added)

    def pass_by(self, **amount: float) -> None:
        self.added += timedelta(**amount)


class Calling:
    """A call's context as far as servicers look at it."""

    def time_remaining(self) -> float | None:
        return None


def call_as(user_id: str, organization_id: str, role: Role.ValueType = ROLE_OWNER) -> None:
    """Make calls in the name of a user placed in an organization."""
    bind_principal(Principal(user_id=user_id, organization_id=organization_id, role=role))


def summary(organization_id: str, repository_id: str, number: int, **fields: Any) -> TaskSummary:
    """Make a task's summary."""
    task = TaskSummary(
        id=f"task_{number:06}",
        organization_id=organization_id,
        repository_id=repository_id,
        title=fields.pop("title", f"Task {number}"),
        branch=fields.pop("branch", f"feat/{number}"),
        state=fields.pop("state", tasks_pb2.TASK_STATE_ACTIVE),
        revision=fields.pop("revision", 1),
        **fields,
    )
    task.create_time.seconds = task.update_time.seconds = 1_700_000_000 + number
    return task


async def open_room(url: str, folder: Path, quota_bytes: int = DEFAULT_QUOTA_BYTES) -> Room:
    database = open_database(url)
    await database.start()
    time = Time()
    clock = time.clock
    outbox = Outbox(database, clock)
    stores = open_stores(database, outbox, clock, quota_bytes)
    await stores.index.start()
    kept = open_bytes(BlobsConfig(), folder)
    uploads = Uploads(database, clock, stores.blobs, stores.claims, kept)
    return Room(
        url, folder, database, outbox, stores, OrganizationIngest(outbox, stores).ingest(database), uploads, time
    )


@pytest.fixture
async def room(tmp_path: Path) -> AsyncGenerator[Room, None]:
    opened = await open_room(migrated("organization", tmp_path), tmp_path)
    yield opened
    await opened.database.close()
    bind_principal(None)


def _row(row: Any) -> OutboxRow:
    return OutboxRow(row.seq, row.destination, row.type_url, row.entity_id, row.revision, row.deleted, row.payload)
