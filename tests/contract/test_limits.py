"""Limits that are kept by counting: no number of calls at the same moment passes one, on either database.

In each test all look before any of them writes, unless they take turns.
"""

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from branchline.v1 import organizations_pb2
from branchline.v1.blobs_pb2 import Blob
from branchline.v1.common_pb2 import Actor, Prompt
from branchline.v1.organizations_pb2 import InviteMemberRequest, Organization
from branchline.v1.processes_pb2 import ProcessSpec
from branchline.v1.roles_pb2 import ROLE_MEMBER, ROLE_OWNER
from branchline.v1.secrets_pb2 import GitCredential, Secret
from branchline.v1.users_pb2 import Draft, User, UserTaskState
from cryptography.fernet import Fernet
from sqlalchemy import MetaData, func, select

from services.organization import blobs as blobs_module
from services.organization import invitations as invitations_module
from services.organization import members as members_module
from services.organization.stores import Stores, open_stores
from services.organization.tables import blobs, invitations, members
from services.organization.tables import metadata as organization_metadata
from services.runtime.clock import Clock
from services.runtime.database import Database, Statement, Tx, open_database
from services.runtime.errors import InvalidArgument, ResourceExhausted
from services.runtime.principal import Principal, bind_principal
from services.runtime.spine.outbox import Outbox
from services.sandbox import process_store
from services.sandbox.process_store import ProcessStore
from services.sandbox.tables import metadata as sandbox_metadata
from services.sandbox.tables import processes
from services.user import drafts as drafts_module
from services.user import keeping, task_states
from services.user.cipher import Cipher
from services.user.drafts import Drafts
from services.user.keeping import Secrets
from services.user.tables import drafts, secrets
from services.user.tables import metadata as user_metadata
from services.user.tables import task_states as task_states_table
from services.user.task_states import TaskStates
from tests.support.databases import Databases

MOST = 2
CALLS = 6


@asynccontextmanager
async def opened(databases: Databases, tables: MetaData) -> AsyncGenerator[Database, None]:
    database = open_database(databases.make(tables))
    await database.start()
    try:
        yield database
    finally:
        await database.close()


@pytest.fixture
def count_together(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], None]:
    """Make the first two that run a module's statement go on only once both have its answer, if they ever have."""

    def patch(module: Any, name: str) -> None:
        both = threading.Barrier(2)
        statement: Statement = getattr(module, name)
        look = Tx.rows

        def looking(tx: Tx, run: Statement, *given: Any) -> Any:
            found = look(tx, run, *given)
            if run is statement:
                with suppress(threading.BrokenBarrierError):
                    both.wait(0.5)
                    both.abort()
            return found

        monkeypatch.setattr(Tx, "rows", looking)

    return patch


async def at_once(calls: list[Awaitable[Any]]) -> int:
    """Make calls at the same moment; return how many were not refused for a limit."""
    done = await asyncio.gather(*calls, return_exceptions=True)
    refused = [one for one in done if isinstance(one, ResourceExhausted | InvalidArgument)]
    assert not [one for one in done if isinstance(one, BaseException) and one not in refused]
    return len(done) - len(refused)


async def counted(database: Database, table: Any, *conditions: Any) -> int:
    statement = Statement(select(func.count()).select_from(table).where(*conditions))
    return await database.read(lambda tx: tx.value(statement))


async def test_processes(
    databases: Databases, count_together: Callable[[Any, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_store, "MOST_RUNNING", MOST)
    count_together(process_store, "_COUNT")
    async with opened(databases, sandbox_metadata) as database:
        store = ProcessStore(Outbox(database, Clock()), Clock())
        given = ("task_1", "sbx_1", "org_1", ProcessSpec(), Actor())
        assert await at_once([database.write(store.start, *given) for _ in range(CALLS)]) == MOST
        assert await counted(database, processes) == MOST


async def test_secrets(
    databases: Databases, count_together: Callable[[Any, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "SECRETS_PER_USER", MOST)
    count_together(keeping, "_COUNT")
    async with opened(databases, user_metadata) as database:
        store = Secrets(Outbox(database, Clock()), Clock(), Cipher(Fernet.generate_key().decode()))
        wanted = [Secret(git_credential=GitCredential(host=f"git{n}.test", username="u")) for n in range(CALLS)]
        assert await at_once([database.write(store.create, "usr_1", one, b"value") for one in wanted]) == MOST
        assert await counted(database, secrets) == MOST


async def test_drafts(
    databases: Databases, count_together: Callable[[Any, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drafts_module, "DRAFT_BYTES", 250)
    count_together(drafts_module, "_OTHERS")
    async with opened(databases, user_metadata) as database:
        store = Drafts(Outbox(database, Clock()), Clock())
        wanted = [Draft(task_id="t", session_id=f"s{n}", prompt=Prompt(text="x" * 100)) for n in range(CALLS)]
        assert await at_once([database.write(store.set, "usr_1", "org_1", one) for one in wanted]) == MOST
        assert await counted(database, drafts) == MOST


async def test_task_states(
    databases: Databases, count_together: Callable[[Any, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_states, "SESSIONS_PER_TASK", MOST)
    count_together(task_states, "_OTHERS")
    async with opened(databases, user_metadata) as database:
        store = TaskStates(Outbox(database, Clock()), Clock())
        wanted = [
            UserTaskState(user_id="u", organization_id="o", task_id="t", session_id=f"s{n}") for n in range(CALLS)
        ]
        assert await at_once([database.write(store.save, one) for one in wanted]) == MOST
        assert await counted(database, task_states_table) == MOST


@asynccontextmanager
async def founded(databases: Databases) -> AsyncGenerator[tuple[Database, Stores, str], None]:
    """Yield an organization; its owner calls."""
    async with opened(databases, organization_metadata) as database:
        stores = open_stores(database, Outbox(database, Clock()), Clock())
        await stores.index.start()
        organization = Organization(slug="acme", kind=organizations_pb2.ORGANIZATION_KIND_TEAM)
        await database.write(stores.organizations.found, organization, User(id="usr_1", display_name="u", revision=1))
        bind_principal(Principal(user_id="usr_1", organization_id=organization.id, role=ROLE_OWNER))
        yield database, stores, organization.id
        bind_principal(None)


async def test_unfinished_uploads(
    databases: Databases, count_together: Callable[[Any, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blobs_module, "UPLOADS_AT_ONCE", MOST)
    count_together(blobs_module, "_UPLOADS")
    async with founded(databases) as (database, stores, organization_id):
        wanted = [Blob(organization_id=organization_id, size_bytes=7) for _ in range(CALLS)]
        assert await at_once([database.write(stores.blobs.begin, one) for one in wanted]) == CALLS
        assert await counted(database, blobs, blobs.c.deleted.is_(False)) == MOST


async def test_invitations(
    databases: Databases, count_together: Callable[[Any, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(invitations_module, "MOST_OPEN", MOST)
    count_together(invitations_module, "_COUNT")
    async with founded(databases) as (database, stores, organization_id):
        request = InviteMemberRequest(organization_id=organization_id, email="a@b.test", role=ROLE_MEMBER)
        invite = stores.invitations.invite
        assert await at_once([database.write(invite, request, f"code {n}") for n in range(CALLS)]) == MOST
        assert await counted(database, invitations) == MOST


async def test_members_of_an_organization(
    databases: Databases, count_together: Callable[[Any, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(members_module, "MOST_MEMBERS", MOST)
    count_together(members_module, "_COUNT")
    async with founded(databases) as (database, stores, organization_id):
        users = [User(id=f"usr_{n}", display_name="u", revision=1) for n in range(2, 2 + CALLS)]
        join = stores.members.join
        assert await at_once([database.write(join, organization_id, one, ROLE_MEMBER) for one in users]) == MOST - 1
        assert await counted(database, members) == MOST


async def test_organizations_of_a_person(
    databases: Databases, count_together: Callable[[Any, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(members_module, "MOST_MEMBERSHIPS", MOST)
    count_together(members_module, "_COUNT_OF_USER")
    user = User(id="usr_1", display_name="u", revision=1)
    async with founded(databases) as (database, stores, _):
        wanted = [Organization(slug=f"o{n}", kind=organizations_pb2.ORGANIZATION_KIND_TEAM) for n in range(CALLS)]
        found = stores.organizations.found
        assert await at_once([database.write(found, one, user) for one in wanted]) == MOST - 1
        assert await counted(database, members) == MOST
