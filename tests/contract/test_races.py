"""Two who find nothing at the same moment and both make it: on PostgreSQL no lock holds what is not there yet.

In each test both have looked before either writes. SQLite's writers take turns by themselves.
"""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from branchline.v1 import organizations_pb2, sandboxes_pb2
from branchline.v1.common_pb2 import Prompt
from branchline.v1.organizations_pb2 import Organization
from branchline.v1.repositories_pb2 import Branch, Repository
from branchline.v1.sandboxes_pb2 import Sandbox
from branchline.v1.tasks_pb2 import Task
from branchline.v1.users_pb2 import Draft, User, UserTaskState
from branchline_internal.github_data.v1.github_data_pb2 import GithubRepository
from branchline_internal.repository.v1.repository_pb2 import EnsureRepositoryRequest
from branchline_internal.spine.v1.push_pb2 import PushEntry, PushRequest
from branchline_internal.user.v1.user_pb2 import DraftState
from sqlalchemy import MetaData, select

from services.github_data.store import GithubStore
from services.github_data.tables import metadata as github_data_metadata
from services.organization.github import Github
from services.organization.ingest import OrganizationIngest
from services.organization.repositories import Repositories
from services.organization.stores import open_stores
from services.organization.tables import github_repositories, repositories
from services.organization.tables import metadata as organization_metadata
from services.repository.store import REPOSITORIES, RepositoryStore
from services.repository.tables import metadata as repository_metadata
from services.runtime.clock import Clock
from services.runtime.database import Database, Raced, Statement, Tx, open_database
from services.runtime.errors import AlreadyExists
from services.runtime.spine import index as index_module
from services.runtime.spine.index import Entry, Index, IndexTable
from services.runtime.spine.outbox import Outbox
from services.runtime.spine.resources import Held
from services.runtime.spine.tables import outbox as outbox_table
from services.sandbox.store import SANDBOXES, SandboxStore
from services.sandbox.tables import metadata as sandbox_metadata
from services.user.accounts import USERS, Accounts
from services.user.drafts import Drafts
from services.user.tables import metadata as user_metadata
from services.user.task_states import TaskStates
from tests.support.databases import Databases
from tests.support.edges import TASK, metadata, tasks

_MARKED = Statement(select(outbox_table.c.revision, outbox_table.c.payload))
_OF_URL = Statement(select(repositories.c.id, repositories.c.remote_url).where(repositories.c.deleted.is_(False)))
_LINKED = Statement(select(github_repositories.c.repository_id))


@asynccontextmanager
async def opened(databases: Databases, tables: MetaData) -> AsyncGenerator[Database, None]:
    database = open_database(databases.make(tables))
    await database.start()
    try:
        yield database
    finally:
        await database.close()


@pytest.fixture
def look_together(monkeypatch: pytest.MonkeyPatch) -> Callable[[type, str], None]:
    """Make the first two that call a method go on only once both have its answer."""

    def patch(owner: type, name: str) -> None:
        both = threading.Barrier(2)
        look = getattr(owner, name)

        def looking(*args: Any, **kwargs: Any) -> Any:
            found = look(*args, **kwargs)
            with suppress(threading.BrokenBarrierError):
                both.wait(0.5)
                both.abort()
            return found

        monkeypatch.setattr(owner, name, looking)

    return patch


async def test_two_first_states_of_a_task_are_both_kept(
    databases: Databases, look_together: Callable[[type, str], None]
) -> None:
    key = UserTaskState(user_id="u", organization_id="o", task_id="t", session_id="s")
    async with opened(databases, user_metadata) as database:
        states = TaskStates(Outbox(database, Clock()), Clock())
        look_together(TaskStates, "take")

        def change(tx: Tx, wanted: UserTaskState) -> None:
            state = states.take(tx, key)
            state.MergeFrom(wanted)
            states.save(tx, state)

        await asyncio.gather(
            database.write(change, UserTaskState(open_session_id="s")),
            database.write(change, UserTaskState(unread=True)),
        )
        held = await database.write(states.take, key)
        (marked,) = await database.read(lambda tx: tx.rows(_MARKED))

    assert (held.open_session_id, held.unread, held.revision) == ("s", True, 2)
    assert UserTaskState.FromString(marked.payload) == held


async def test_two_first_drafts_of_a_message_have_two_revisions(
    databases: Databases, look_together: Callable[[type, str], None]
) -> None:
    async with opened(databases, user_metadata) as database:
        drafts = Drafts(Outbox(database, Clock()), Clock())
        look_together(Tx, "value")
        written = await asyncio.gather(
            *(
                database.write(drafts.set, "u", "o", Draft(task_id="t", session_id="s", prompt=Prompt(text=text)))
                for text in ("one", "other")
            )
        )
        (marked,) = await database.read(lambda tx: tx.rows(_MARKED))

    assert sorted(draft.revision for draft in written) == [1, 2]
    assert DraftState.FromString(marked.payload).draft == max(written, key=lambda draft: draft.revision)


async def test_a_person_is_made_once(databases: Databases, look_together: Callable[[type, str], None]) -> None:
    async with opened(databases, user_metadata) as database:
        accounts = Accounts(Outbox(database, Clock()), Clock())
        look_together(Held, "find")
        made = await asyncio.gather(
            *(database.write(accounts.create, User(id="u", display_name=name)) for name in ("one", "other"))
        )
        held = await database.read(USERS.get, "u")

    assert made == [held, held]


async def test_a_repository_that_is_added_and_imported_at_once_is_one(
    databases: Databases, look_together: Callable[[type, str], None]
) -> None:
    url = "https://git.test/a/b"
    async with opened(databases, organization_metadata) as database:
        outbox = Outbox(database, Clock())
        stores = open_stores(database, outbox, Clock())
        await stores.index.start()
        organization = Organization(slug="acme", kind=organizations_pb2.ORGANIZATION_KIND_TEAM)
        await database.write(stores.organizations.found, organization, User(id="u", display_name="u", revision=1))
        reported = GithubRepository(organization_id=organization.id, github_id=7, clone_url=url, revision=1)
        entry = PushEntry(id="7", revision=1)
        entry.state.Pack(reported)
        given = Repository(organization_id=organization.id, display_name="a/b", remote_url=url)
        look_together(Repositories, "of_url")
        added, refused = await asyncio.gather(
            database.write(stores.repositories.add, given),
            OrganizationIngest(outbox, stores).ingest(database).submit(PushRequest(entries=[entry])),
            return_exceptions=True,
        )
        held = await database.read(lambda tx: tx.rows(_OF_URL))
        linked = await database.read(lambda tx: tx.rows(_LINKED))

    assert refused == {}
    assert added is None or isinstance(added, AlreadyExists)
    assert [row.remote_url for row in held] == [url]
    assert [row.repository_id for row in linked] == [held[0].id]


async def test_two_reports_of_a_new_repository_import_it_once(
    databases: Databases, look_together: Callable[[type, str], None]
) -> None:
    async with opened(databases, organization_metadata) as database:
        outbox = Outbox(database, Clock())
        stores = open_stores(database, outbox, Clock())
        await stores.index.start()
        organization = Organization(slug="acme", kind=organizations_pb2.ORGANIZATION_KIND_TEAM)
        await database.write(stores.organizations.found, organization, User(id="u", display_name="u", revision=1))
        look_together(Github, "_ours")
        ingests = [OrganizationIngest(outbox, stores).ingest(database) for _ in range(2)]
        entry = PushEntry(id="7", revision=1)
        entry.state.Pack(GithubRepository(organization_id=organization.id, github_id=7, clone_url="u", revision=1))
        refused = await asyncio.gather(*(ingest.submit(PushRequest(entries=[entry])) for ingest in ingests))
        held = await database.read(lambda tx: tx.rows(_OF_URL))
        linked = await database.read(lambda tx: tx.rows(_LINKED))

    assert refused == [{}, {}]
    assert [row.repository_id for row in linked] == [row.id for row in held]


async def test_what_two_first_words_say_of_a_repository_is_all_kept(
    databases: Databases, look_together: Callable[[type, str], None]
) -> None:
    first = EnsureRepositoryRequest(repository=Repository(id="r", organization_id="o", display_name="old", revision=1))
    second = EnsureRepositoryRequest(
        repository=Repository(id="r", organization_id="o", display_name="new", revision=1),
        github=True,
        github_revision=4,
        branches=[Branch(name="main")],
    )
    async with opened(databases, repository_metadata) as database:
        store = RepositoryStore(Outbox(database, Clock()), Clock())
        look_together(Held, "find")
        await asyncio.gather(database.write(store.ensure, first), database.write(store.ensure, second))
        held = await database.read(REPOSITORIES.get, "r")
        known = await database.read(store.known_branches, "r")

    assert held.revision == 2  # whoever came second changed what the first had stored
    assert known == {"main"}


async def test_a_sandbox_is_either_made_or_buried_and_told_so(
    databases: Databases, look_together: Callable[[type, str], None]
) -> None:
    async with opened(databases, sandbox_metadata) as database:
        store = SandboxStore(Outbox(database, Clock()), Clock())
        look_together(Held, "find")
        sandbox = Sandbox(id="s", task_id="t", state=sandboxes_pb2.SANDBOX_STATE_CREATING)
        _, buried = await asyncio.gather(database.write(store.add, sandbox, "o", ""), database.write(store.bury, "s"))
        held = await database.read(SANDBOXES.get, "s")
        marked = await database.read(lambda tx: tx.rows(_MARKED))

    assert (held.state == sandboxes_pb2.SANDBOX_STATE_DESTROYED) == buried
    assert [Sandbox.FromString(row.payload) for row in marked] == ([] if buried else [held])


async def test_two_reports_of_github_have_two_revisions(
    databases: Databases, look_together: Callable[[type, str], None]
) -> None:
    async with opened(databases, github_data_metadata) as database:
        store = GithubStore(Outbox(database, Clock()))
        await database.write(store.want_sync, "o", "login")
        look_together(Held, "find")
        reports = [GithubRepository(organization_id="o", github_id=7, full_name=name) for name in ("one", "other")]
        await asyncio.gather(*(database.write(store.save_repository, report) for report in reports))
        (marked,) = await database.read(lambda tx: tx.rows(_MARKED))

    assert sorted(report.revision for report in reports) == [1, 2]
    assert marked.revision == 2


async def test_numbers_of_several_new_scopes_have_no_doubles(
    databases: Databases, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slower one finds no scope to take numbers of, and all of them a moment later."""
    faster_is_done, both, threads = threading.Event(), threading.Barrier(2), list[int]()
    change_many = Tx.change_many
    take_many: Statement = index_module._TAKE_MANY  # pyright: ignore[reportPrivateUsage]

    def waiting(tx: Tx, statement: Statement, parameters: Any) -> int:
        changed = change_many(tx, statement, parameters)
        if statement is take_many:
            with suppress(threading.BrokenBarrierError):
                both.wait(0.5)
                both.abort()
            threads.append(threading.get_ident())
            if threads[-1] != threads[0]:
                faster_is_done.wait(1)
        return changed

    def entries(name: str) -> list[Entry]:
        return [Entry(TASK, scope, name, 1, Task(id=name, revision=1)) for scope in ("a", "b")]

    async with opened(databases, metadata) as database:
        index = Index(database, [IndexTable(TASK, tasks, Task)], Clock())
        await index.start()
        monkeypatch.setattr(Tx, "change_many", waiting)
        writing = [asyncio.create_task(database.write(index.put_many, entries(name))) for name in ("t1", "t2")]
        await asyncio.wait(writing, return_when=asyncio.FIRST_COMPLETED)
        faster_is_done.set()
        await asyncio.gather(*writing)
        monkeypatch.undo()
        await database.write(index.put_many, entries("t3"))
        found = await database.read(lambda tx: tx.rows(Statement(select(tasks.c.scope, tasks.c.change_seq))))

    assert len({(row.scope, row.change_seq) for row in found}) == len(found) == 6


async def test_who_is_overtaken_again_and_again_is_told_to_try_again(databases: Databases) -> None:
    runs = 0

    def overtaken(_: Tx) -> None:
        nonlocal runs
        runs += 1
        raise Raced

    async with opened(databases, metadata) as database:
        with pytest.raises(Raced):
            await database.write(overtaken)

    assert runs == (1 if databases.dialect == "sqlite" else 3)
