"""All that the organization keeps, put together."""

from dataclasses import dataclass

from services.organization.asking import InputRequests
from services.organization.blob_bytes import DEFAULT_QUOTA_BYTES
from services.organization.blobs import Blobs
from services.organization.catalogue import Catalogue
from services.organization.claims import Claims
from services.organization.drafts import Drafts
from services.organization.feed import Feed
from services.organization.github import Github
from services.organization.invitations import Invitations
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
    drafts: Drafts
    members: Members
    organizations: Organizations
    tasks: Tasks
    task_states: TaskStates
    repositories: Repositories
    github: Github
    invitations: Invitations
    input_requests: InputRequests
    catalogue: Catalogue
    blobs: Blobs
    claims: Claims
    teardown: Teardown


def open_stores(
    database: Database, outbox: Outbox, clock: Clock, blob_quota_bytes: int = DEFAULT_QUOTA_BYTES
) -> Stores:
    """Put the stores together over one database."""
    index = Index(database, [*WATCHED, HISTORY], clock, UNWATCHED)
    feed = Feed(index, outbox, clock)
    members = Members(index, outbox, feed, clock)
    organizations = Organizations(index, members, feed, clock)
    claims = Claims(clock)
    blobs = Blobs(clock, blob_quota_bytes)
    drafts = Drafts(index.hub, outbox, claims, clock)
    tasks = Tasks(index, outbox, drafts, claims)
    invitations = Invitations(members, feed, clock)
    repositories = Repositories(index, outbox, feed, tasks, clock)
    return Stores(
        index=index,
        feed=feed,
        people=People(index.hub, clock),
        drafts=drafts,
        members=members,
        organizations=organizations,
        tasks=tasks,
        task_states=TaskStates(index, outbox),
        repositories=repositories,
        github=Github(index, outbox, repositories),
        invitations=invitations,
        input_requests=InputRequests(index),
        catalogue=Catalogue(index, tasks),
        blobs=blobs,
        claims=claims,
        teardown=Teardown(outbox, organizations, members, repositories, invitations, drafts, claims, blobs),
    )
