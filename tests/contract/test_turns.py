"""Commands on the same thing at the same moment, on both databases: none is lost."""

import asyncio
import time
from collections.abc import Callable

from branchline.v1 import users_pb2
from branchline.v1.repositories_pb2 import Repository
from branchline.v1.users_pb2 import User, UserTaskState
from branchline_internal.repository.v1.repository_pb2 import EnsureRepositoryRequest
from cryptography.fernet import Fernet

from services.repository.deletion import Deletion
from services.repository.store import REPOSITORIES, RepositoryStore
from services.repository.tables import metadata as repository_tables
from services.repository.workbench import Workbench
from services.runtime.clock import Clock
from services.runtime.database import Database, Tx, open_database
from services.runtime.principal import Principal, bind_principal
from services.runtime.spine.commands import Commands
from services.runtime.spine.index import Index
from services.runtime.spine.outbox import Outbox
from services.user.accounts import USERS, Accounts
from services.user.cipher import Cipher
from services.user.public import PublicUserServicer
from services.user.tables import metadata as user_tables
from services.user.task_states import Change, TaskStates
from tests.support.databases import Databases


async def beside(database: Database, slow: Callable[[Tx], object], other: Callable[[Tx], object]) -> None:
    """Run a function that is slow to commit, and another one meanwhile."""

    def dawdle(tx: Tx) -> None:
        slow(tx)
        time.sleep(0.3)

    dawdling = asyncio.ensure_future(database.write(dawdle))
    await asyncio.sleep(0.1)
    await database.write(other)
    await dawdling


async def test_the_deletion_of_a_repository_is_not_lost_beside_a_task_that_touches_it(databases: Databases) -> None:
    database = open_database(databases.make(repository_tables))
    await database.start()
    outbox, clock = Outbox(database, Clock()), Clock()
    store, workbench = RepositoryStore(outbox, clock), Workbench(Index(database, (), clock))
    deletion = Deletion(database, outbox, clock, store, workbench)
    born = EnsureRepositoryRequest(repository=Repository(id="repo_1", organization_id="org_1", revision=1))
    await database.write(store.ensure, born)

    await beside(database, lambda tx: store.touch(tx, ["repo_1"]), lambda tx: deletion.begin(tx, "repo_1"))

    repository = await database.read(REPOSITORIES.get, "repo_1")
    await database.close()
    assert (repository.HasField("delete_time"), repository.revision) == (True, 3)


async def test_what_a_person_changes_in_two_places_is_kept(databases: Databases) -> None:
    database = open_database(databases.make(user_tables))
    await database.start()
    outbox, clock = Outbox(database, Clock()), Clock()
    accounts, states = Accounts(outbox, clock, Cipher(Fernet.generate_key().decode())), TaskStates(outbox, clock)
    await database.write(accounts.create, User(id="usr_1"))
    servicer = PublicUserServicer(database, Commands(database, clock), accounts, states)
    bind_principal(Principal(user_id="usr_1"))
    key = UserTaskState(user_id="usr_1", organization_id="org_1", task_id="task_1", session_id="ses_1")

    def change(change: Change) -> Callable[[Tx], UserTaskState]:
        return lambda tx: states.change(tx, UserTaskState.FromString(key.SerializeToString()), change)

    await database.write(change(Change()))
    await beside(database, change(Change(unread=True)), change(Change(open_session_id="ses_2")))
    state = await database.write(change(Change()))
    preferences = [users_pb2.UpdatePreferencesRequest(request_id=name) for name in ("one", "two")]
    update = servicer._update  # pyright: ignore[reportPrivateUsage]
    await beside(database, lambda tx: update(tx, preferences[0]), lambda tx: update(tx, preferences[1]))

    user = await database.read(USERS.get, "usr_1")
    await database.close()
    assert (state.unread, state.open_session_id) == (True, "ses_2")
    assert user.revision == 3
