"""Which tasks a filter means: the database's list, its snapshot and the gateway's watch give one answer."""

import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass

import pytest
from branchline.v1.common_pb2 import ENTITY_KIND_TASK
from branchline.v1.tasks_pb2 import TaskActivity, TaskFilter, TaskState, TaskSummary
from branchline_internal.spine.v1.push_pb2 import WatchChange
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.selection import task_matcher
from services.organization.stores import Stores, open_stores
from services.organization.tables import metadata
from services.organization.tasks import BY_TITLE
from services.runtime.clock import Clock
from services.runtime.database import Database, open_database
from services.runtime.spine.ingest import Pushed
from services.runtime.spine.outbox import Outbox
from services.runtime.spine.tokens import Position
from tests.support.databases import Databases

LETTERS = "aAsSßẞöÖσΣςİıkK\u212a%_/ '\\\n"
"""Letters that lose their case in different ways, and what LIKE gives a meaning to."""

texts = st.text(LETTERS, max_size=6)
repositories, owners = st.sampled_from(["repo_1", "repo_2", "repo_3"]), st.sampled_from(["usr_1", "usr_2", ""])
states = st.sampled_from([one for one in TaskState.values() if one])
activities = st.sampled_from(TaskActivity.values())


@st.composite
def summaries(draw: st.DrawFn) -> TaskSummary:
    """Return a task without its id."""
    task = TaskSummary(
        repository_id=draw(repositories),
        owner_user_id=draw(owners),
        title=draw(texts),
        branch=draw(texts),
        state=draw(states),
        activity=draw(activities),
        revision=1,
    )
    if draw(st.booleans()):
        task.pull_request.number = 7
    return task


@st.composite
def filters(draw: st.DrawFn) -> TaskFilter:
    return TaskFilter(
        repository_ids=draw(st.lists(repositories, max_size=2, unique=True)),
        owner_user_ids=draw(st.lists(owners.filter(bool), max_size=1)),
        states=draw(st.just([]) | st.lists(states, max_size=3, unique=True)),
        activities=draw(st.just([]) | st.lists(activities.filter(bool), max_size=2, unique=True)),
        has_pull_request=draw(st.none() | st.booleans()),
        query=draw(st.just("") | st.text(LETTERS, max_size=3)),
        include_ended=draw(st.booleans()),
    )


@dataclass
class Sidebar:
    """The sidebars of many organizations, in one database."""

    database: Database
    stores: Stores

    async def fill(self, tasks: list[TaskSummary]) -> str:
        """Return a new organization with tasks."""
        organization_id = f"org_{uuid.uuid4().hex}"
        for number, task in enumerate(tasks):
            task.organization_id, task.id = organization_id, f"{organization_id}_{number}"
        pushed = [Pushed(task.id, 1, deleted=False, state=task, payload=task.SerializeToString()) for task in tasks]
        await self.database.write(self.stores.tasks.take, pushed)
        return organization_id

    async def listed(self, organization_id: str, wanted: TaskFilter) -> set[str]:
        given = (organization_id, wanted, BY_TITLE, None, 100)
        return {task.id for task in (await self.database.read(self.stores.tasks.page, *given)).found}

    async def shown(self, organization_id: str, wanted: TaskFilter) -> set[str]:
        """Return what a snapshot of these tasks alone holds."""
        narrow = {ENTITY_KIND_TASK: self.stores.tasks.narrowed(wanted)}
        pages = self.stores.index.catch_up(organization_id, [ENTITY_KIND_TASK], None, "u", narrow=narrow)
        return {change.id async for page in pages for change in page.changes}

    async def changes(self, organization_id: str) -> list[WatchChange]:
        """Return every change, as a gateway gets it."""
        begin = Position(self.stores.index.epoch, 0)
        pages = self.stores.index.catch_up(organization_id, [ENTITY_KIND_TASK], begin, "u")
        return [change async for page in pages for change in page.changes]


@pytest.fixture
async def sidebar(databases: Databases) -> AsyncGenerator[Sidebar, None]:
    database = open_database(databases.make(metadata))
    await database.start()
    stores = open_stores(database, Outbox(database, Clock()), Clock())
    await stores.index.start()
    yield Sidebar(database, stores)
    await database.close()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(summaries(), min_size=1, max_size=8), st.lists(filters(), min_size=1, max_size=6))
async def test_lists_snapshots_and_watches_mean_the_same_tasks(
    sidebar: Sidebar, tasks: list[TaskSummary], wanted: list[TaskFilter]
) -> None:
    organization_id = await sidebar.fill(tasks)
    changes = await sidebar.changes(organization_id)
    assert len(changes) == len(tasks)
    for one in wanted:
        matches = task_matcher(one)
        watched = {change.id for change in changes if matches(change)}
        assert await sidebar.listed(organization_id, one) == watched
        assert await sidebar.shown(organization_id, one) == watched


@pytest.mark.parametrize("query", ["GRÖSSE", "größe", "straße", "STRASSE", "fix/ÄRGER", "50%_"])
async def test_a_text_is_found_in_any_case(sidebar: Sidebar, query: str) -> None:
    found = TaskSummary(
        repository_id="r", title="Größe: 50%_ STRAßE", branch="fix/ärger", state=TaskState.Value("TASK_STATE_ACTIVE")
    )
    other = TaskSummary(repository_id="r", title="Grosse 50 Prozent", branch="fix/arger", state=found.state)
    organization_id = await sidebar.fill([found, other])

    assert await sidebar.listed(organization_id, TaskFilter(query=query)) == {found.id}
