"""Commands on the same thing at the same moment, on both databases: none is lost."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from branchline.v1 import users_pb2
from branchline.v1.common_pb2 import Prompt
from branchline.v1.repositories_pb2 import Repository
from branchline.v1.users_pb2 import Draft, User, UserPreferences, UserTaskState
from branchline_internal.repository.v1.repository_pb2 import EnsureRepositoryRequest

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
from services.user.drafts import Drafts
from services.user.public import PublicUserServicer
from services.user.tables import metadata as user_tables
from services.user.task_states import TaskStates
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
    accounts, states = Accounts(outbox, clock), TaskStates(outbox, clock)
    servicer = PublicUserServicer(Commands(database, clock), accounts, states, Drafts(outbox, clock))
    await database.write(accounts.create, User(id="usr_1", display_name="Ada"))
    bind_principal(Principal(user_id="usr_1", organization_id="org_1"))
    key = UserTaskState(user_id="usr_1", organization_id="org_1", task_id="task_1", session_id="ses_1")

    def change(**wanted: Any) -> Callable[[Tx], object]:
        given = UserTaskState(task_id=key.task_id, session_id=key.session_id, **wanted)
        request = users_pb2.UpdateUserTaskStateRequest(user_task_state=given)
        return lambda tx: servicer._update_state(tx, request)  # pyright: ignore[reportPrivateUsage]

    def write(text: str) -> Callable[[Tx], object]:
        draft = Draft(task_id=key.task_id, session_id=key.session_id, prompt=Prompt(text=text))
        request = users_pb2.UpdateDraftRequest(draft=draft)
        return lambda tx: servicer._update_draft(tx, request)  # pyright: ignore[reportPrivateUsage]

    def prefer(**wanted: Any) -> Callable[[Tx], object]:
        request = users_pb2.UpdateUserRequest(user=User(**wanted))
        return lambda tx: servicer._update(tx, request)  # pyright: ignore[reportPrivateUsage]

    await database.write(change(open_session_id="ses_1"))
    await beside(database, change(unread=True), change(open_session_id="ses_2"))
    await beside(database, write("half"), change(open_session_id="ses_3"))
    await beside(database, write("half a"), write("half a word"))
    state = await database.write(states.take, key)
    preferences = UserPreferences(default_agent="mock")
    await beside(database, prefer(display_name="Ada L."), prefer(preferences=preferences))

    user = await database.read(USERS.get, "usr_1")
    await database.close()
    assert (state.unread, state.open_session_id, state.HasField("draft_time"), state.revision) == (
        True,
        "ses_3",
        True,
        7,
    )
    assert (user.display_name, user.preferences, user.revision) == ("Ada L.", preferences, 3)
