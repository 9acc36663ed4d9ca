"""The feed: events go to history, which numbers them, and come back to be indexed for as long as they are shown."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from branchline.v1.common_pb2 import Actor
from branchline.v1.history_pb2 import EventKind, HistoryEvent, HistoryFilter
from branchline.v1.organizations_pb2 import Organization
from sqlalchemy import Float, bindparam, select

from services.organization.destinations import TO_HISTORY
from services.organization.filters import all_of
from services.organization.tables import HISTORY, history_feed, organizations
from services.runtime.actors import current_actor
from services.runtime.clock import Clock, column_seconds
from services.runtime.database import Database, Reader, Statement, Tx, is_in
from services.runtime.loops import for_each
from services.runtime.spine.index import Entry, Index
from services.runtime.spine.outbox import Mark, Outbox
from services.runtime.spine.pages import Page, page_of

RETENTION_SECONDS = 90 * 24 * 3600.0
"""How long the feed shows an event where the organization does not say."""

FORGOTTEN_AT_ONCE = 500

_c = history_feed.c
_ALIVE = Statement(
    select(organizations.c.id).where(is_in(organizations.c.id, "ids"), organizations.c.deleted.is_(False))
)
_ORGANIZATIONS = Statement(
    select(organizations.c.payload)
    .where(organizations.c.deleted.is_(False), organizations.c.id > bindparam("after"))
    .order_by(organizations.c.id)
    .limit(FORGOTTEN_AT_ONCE)
)
_OLD = Statement(
    select(_c.scope, _c.id, _c.change_seq)
    .where(_c.scope == bindparam("of"), _c.event_time < bindparam("before", type_=Float))
    .limit(FORGOTTEN_AT_ONCE)
)


@dataclass(frozen=True, slots=True)
class Feed:
    """The feed of every organization."""

    index: Index
    outbox: Outbox
    clock: Clock

    def record(
        self,
        tx: Tx,
        organization_id: str,
        kind: EventKind.ValueType,
        summary: str,
        repository_id: str = "",
        actor: Actor | None = None,
    ) -> None:
        """Hand an event of the organization itself to history. The caller did it, or the system, unless said."""
        event = HistoryEvent(
            id=self.clock.new_id("evt"),
            organization_id=organization_id,
            event_time=self.clock.timestamp(),
            actor=actor or current_actor(),
            kind=kind,
            repository_id=repository_id,
            summary=summary,
        )
        self.outbox.mark(tx, [Mark(event.id, 1, event, TO_HISTORY)])

    def take(self, tx: Tx, events: Iterable[HistoryEvent]) -> list[HistoryEvent]:
        """Hand new events to history, and index those that it has numbered; return the new ones.

        What belongs to an organization that is gone is forgotten.
        """
        given = list(events)
        ids = {event.organization_id for event in given}
        alive = {row.id for row in tx.rows(_ALIVE, {"ids": sorted(ids)})}
        held = [event for event in given if event.organization_id in alive]
        self.index.put_many(tx, [_entry(event) for event in held if event.sequence])
        new = [event for event in held if not event.sequence]
        self.outbox.mark(tx, [Mark(event.id, 1, event, TO_HISTORY) for event in new])
        return new

    def page(
        self,
        tx: Reader,
        organization_id: str,
        wanted: HistoryFilter,
        after: int | None,
        most: int,
        *,
        oldest_first: bool = False,
    ) -> Page[HistoryEvent]:
        """Return the events behind a place in the feed."""
        since, before = wanted.HasField("start_time"), wanted.HasField("end_time")
        shape = Shape(
            repositories=bool(wanted.repository_ids),
            tasks=bool(wanted.task_ids),
            branches=bool(wanted.branches),
            users=bool(wanted.user_ids),
            kinds=bool(wanted.kinds),
            since=since,
            before=before,
            after=after is not None,
            oldest_first=oldest_first,
        )
        given = {
            "of": organization_id,
            "repositories": list(wanted.repository_ids),
            "tasks": list(wanted.task_ids),
            "branches": list(wanted.branches),
            "users": list(wanted.user_ids),
            "kinds": list(wanted.kinds),
            "since": column_seconds(wanted.start_time) if since else None,
            "before": column_seconds(wanted.end_time) if before else None,
            "after": after,
            "most": most + 1,
        }
        return page_of(HistoryEvent, tx.each(page_statement(shape), given), ["sequence"], most)

    async def expire(self, database: Database) -> None:
        """Drop from the feed what is older than its organization shows, some at a time."""
        after = ""
        while page := await database.read(_organizations_after, after):
            await for_each(page, "expire a feed", lambda organization: self._expire_of(database, organization))
            after = page[-1].id

    async def _expire_of(self, database: Database, organization: Organization) -> None:
        seconds = organization.settings.history_retention.ToNanoseconds() / 1e9 or RETENTION_SECONDS
        given = {"of": organization.id, "before": self.clock.seconds() - seconds}
        while await database.write(self.index.forget_where, HISTORY, _OLD, given):
            pass


@dataclass(frozen=True, slots=True)
class Shape:
    """What a statement is made for: the direction and which filters are set."""

    repositories: bool
    tasks: bool
    branches: bool
    users: bool
    kinds: bool
    since: bool
    before: bool
    after: bool
    oldest_first: bool


@cache
def page_statement(shape: Shape) -> Statement:
    """Return the statement for filters of one shape."""
    behind = _c.sequence > bindparam("after") if shape.oldest_first else _c.sequence < bindparam("after")
    conditions = all_of(
        (shape.repositories, is_in(_c.repository_id, "repositories")),
        (shape.tasks, is_in(_c.task_id, "tasks")),
        (shape.branches, is_in(_c.branch, "branches")),
        (shape.users, is_in(_c.actor_user_id, "users")),
        (shape.kinds, is_in(_c.event_kind, "kinds")),
        (shape.since, _c.event_time >= bindparam("since", type_=Float)),
        (shape.before, _c.event_time < bindparam("before", type_=Float)),
        (shape.after, behind),
    )
    return Statement(
        select(_c.sequence, _c.payload)
        .where(_c.scope == bindparam("of"), *conditions)
        .order_by(_c.sequence if shape.oldest_first else _c.sequence.desc())
        .limit(bindparam("most"))
    )


def _organizations_after(tx: Reader, after: str) -> Sequence[Organization]:
    return [Organization.FromString(row.payload) for row in tx.rows(_ORGANIZATIONS, {"after": after})]


def _entry(event: HistoryEvent) -> Entry:
    columns = {
        "sequence": event.sequence,
        "event_time": column_seconds(event.event_time),
        "event_kind": event.kind,
        "actor_user_id": event.actor.user_id or event.actor.on_behalf_of_user_id,
        "repository_id": event.repository_id,
        "branch": event.branch,
    }
    return Entry(HISTORY.kind, event.organization_id, event.id, 1, event, task_id=event.task_id, columns=columns)
