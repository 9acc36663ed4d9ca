"""All that the organization keeps, put together."""

from dataclasses import dataclass

from services.organization.feed import Feed
from services.organization.github import Github
from services.organization.members import Members
from services.organization.organizations import Organizations
from services.organization.people import People
from services.organization.repositories import Repositories
from services.organization.tables import HISTORY, UNWATCHED, WATCHED
from services.organization.task_states import TaskStates
from services.organization.tasks import Tasks
from services.organization.teardown import Teardown
from services.runtime.clock import Clock
from services.runtime.database import Database
from services.runtime.spine.index import Index
from services.runtime.spine.outbox import Outbox


@dataclass(frozen=True, slots=True)
class Stores:
    """The nouns of the organization, by name."""

    index: Index
    feed: Feed
    people: People
    members: Members
    organizations: Organizations
    tasks: Tasks
    task_states: TaskStates
    repositories: Repositories
    github: Github
    teardown: Teardown


def open_stores(database: Database, outbox: Outbox, clock: Clock) -> Stores:
    """Put the stores together over one database."""
    index = Index(database, [*WATCHED, HISTORY], clock, UNWATCHED)
    feed = Feed(index, outbox, clock)
    members = Members(index, outbox, feed, clock)
    organizations = Organizations(index, members, feed, clock)
    tasks = Tasks(index, outbox)
    repositories = Repositories(index, outbox, feed, tasks, clock)
    return Stores(
        index=index,
        feed=feed,
        people=People(index.hub),
        members=members,
        organizations=organizations,
        tasks=tasks,
        task_states=TaskStates(index, outbox),
        repositories=repositories,
        github=Github(index, outbox, repositories),
        teardown=Teardown(outbox, organizations, members, repositories),
    )
