"""The sidebar: summaries of all tasks below an organization, and the way to each task."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from branchline.v1.common_pb2 import ENTITY_KIND_TASK
from branchline.v1.tasks_pb2 import TaskFilter, TaskSummary
from branchline.v1.transcripts_pb2 import InputRequest
from branchline_internal.user.v1.user_pb2 import ForgetTaskStatesRequest
from sqlalchemy import Boolean, ColumnElement, String, bindparam, delete, select, tuple_

from services.organization.asking import input_entry
from services.organization.claims import Claims
from services.organization.destinations import TO_USER
from services.organization.drafts import Drafts
from services.organization.filters import all_of, pattern
from services.organization.tables import TASKS, input_requests, task_lookup, task_summaries
from services.runtime.clock import column_seconds
from services.runtime.database import Reader, Statement, Tx, insert_new, is_in
from services.runtime.sidebar import folded, has_pull_request, search_text
from services.runtime.spine.index import Entry, Index, Narrowed
from services.runtime.spine.ingest import Pushed, RejectedEntryError
from services.runtime.spine.outbox import Mark, Outbox
from services.runtime.spine.pages import Page, page_of
from services.runtime.spine.tokens import Value
from services.runtime.states import ENDED

_c = task_summaries.c
_ADD_ROUTE = Statement(insert_new(task_lookup, ["task_id"]))
_DROP_ROUTE = Statement(delete(task_lookup).where(task_lookup.c.task_id == bindparam("task")))
_ROUTE = Statement(
    select(task_lookup.c.organization_id, task_lookup.c.repository_id).where(task_lookup.c.task_id == bindparam("task"))
)
_ASKED = Statement(
    select(input_requests.c.revision, input_requests.c.payload).where(
        is_in(input_requests.c.task_id, "tasks"), input_requests.c.deleted.is_(False)
    )
)
_OF_REPOSITORY = Statement(
    select(_c.revision, _c.payload)
    .where(_c.scope == bindparam("of"), _c.repository_id == bindparam("repository"), _c.deleted.is_(False))
    .limit(bindparam("most"))
)


@dataclass(frozen=True, slots=True)
class Order:
    """An order of the sidebar. Each has an index of its own."""

    column: str
    cursor: type[str | float]
    """Type of the column's values."""

    descending: bool = False


BY_UPDATE_TIME = Order("update_time", float, descending=True)
BY_CREATE_TIME = Order("create_time", float, descending=True)
BY_TITLE = Order("title", str)


@dataclass(frozen=True, slots=True)
class Tasks:
    """What is indexed of tasks."""

    index: Index
    outbox: Outbox
    drafts: Drafts
    claims: Claims

    def take(self, tx: Tx, pushed: Sequence[Pushed[TaskSummary]]) -> None:
        """Index pushed summaries. Those that are gone leave with their routes and with what people had open of them."""
        self._put(tx, [_entry(one.state, one.revision, deleted=one.deleted, payload=one.payload) for one in pushed])

    def forget_of(self, tx: Tx, organization_id: str, repository_id: str, most: int) -> int:
        """Remove what is indexed of some tasks of a repository; return how many."""
        given = {"of": organization_id, "repository": repository_id, "most": most}
        rows: list[Any] = tx.rows(_OF_REPOSITORY, given)
        entries = [_entry(TaskSummary.FromString(row.payload), row.revision + 1, deleted=True) for row in rows]
        self._put(tx, entries)
        return len(entries)

    def _put(self, tx: Tx, entries: Sequence[Entry]) -> None:
        fresh = self.index.put_many(tx, entries)
        tx.change_many(
            _ADD_ROUTE,
            [
                {"task_id": one.id, "organization_id": one.scope, "repository_id": one.columns["repository_id"]}
                for one in fresh
                if not one.deleted
            ],
        )
        gone = [one for one in fresh if one.deleted]
        tx.change_many(_DROP_ROUTE, [{"task": one.id} for one in gone])
        if gone:
            ended = {"tasks": [one.id for one in gone]}
            self.drafts.drop_of_tasks(tx, ended["tasks"])
            self.claims.release_gone(tx, ended["tasks"])
            self.index.put_many(
                tx,
                [
                    input_entry(InputRequest.FromString(row.payload), row.revision + 1, deleted=True)
                    for row in tx.rows(_ASKED, ended)
                ],
            )
        self.outbox.mark(
            tx,
            [
                Mark(one.id, 1, ForgetTaskStatesRequest(organization_id=one.scope, task_id=one.id), TO_USER)
                for one in gone
            ],
        )

    def route(self, tx: Reader, task_id: str) -> tuple[str, str] | None:
        """Return (organization id, repository id) of a task, or None."""
        row: Any = tx.row(_ROUTE, {"task": task_id})
        return (row.organization_id, row.repository_id) if row is not None else None

    def page(
        self,
        tx: Reader,
        organization_id: str,
        wanted: TaskFilter,
        order: Order,
        after: Sequence[Value] | None,
        most: int,
    ) -> Page[TaskSummary]:
        """Return the tasks behind a place in an order."""
        value, last_id = after or (None, None)
        given = filter_values(wanted) | {
            "of": organization_id,
            "after_value": value,
            "after_id": last_id,
            "most": most + 1,
        }
        statement = page_statement(Shape(order=order, chosen=Chosen.by(wanted), after=after is not None))
        found = [tx.each(statement, {**given, "ended": ended}) for ended in halves(wanted)]
        rows = heapq.merge(*found, key=lambda row: (row.value, row.id), reverse=order.descending)
        return page_of(TaskSummary, rows, ["value", "id"], most)

    def narrowed(self, wanted: TaskFilter) -> Narrowed:
        """Return what makes a watch's snapshot show these tasks alone."""
        given = filter_values(wanted) | {"halves": sorted(halves(wanted))}
        return Narrowed(_snapshot(Chosen.by(wanted)), given)


class Chosen(NamedTuple):
    """Which parts of a filter are set."""

    repository: bool = False
    """One alone, whose tasks have an index."""

    repositories: bool = False
    owners: bool = False
    pull_request: bool = False
    text: bool = False
    states: bool = False
    activities: bool = False

    @classmethod
    def by(cls, wanted: TaskFilter) -> "Chosen":
        """Return what a filter sets."""
        return cls(
            len(wanted.repository_ids) == 1,
            len(wanted.repository_ids) > 1,
            bool(wanted.owner_user_ids),
            wanted.HasField("has_pull_request"),
            bool(wanted.query),
            bool(wanted.states),
            bool(wanted.activities),
        )


def filter_values(wanted: TaskFilter) -> dict[str, Any]:
    """Return the parameters of a filter."""
    return {
        "repository": wanted.repository_ids[0] if wanted.repository_ids else "",
        "repositories": list(wanted.repository_ids),
        "owners": list(wanted.owner_user_ids),
        "pull_request": wanted.has_pull_request,
        "text": pattern(folded(wanted.query)),
        "states": list(wanted.states),
        "activities": list(wanted.activities),
    }


def halves(wanted: TaskFilter) -> set[bool]:
    """Return whether ended tasks, others or both are wanted. Without states: those that have not ended."""
    if wanted.states:
        return {state in ENDED for state in wanted.states}
    return {False, True} if wanted.include_ended else {False}


@dataclass(frozen=True, slots=True)
class Shape:
    """What a statement is made for: the order and which filters are set."""

    order: Order
    chosen: Chosen
    after: bool = False


@cache
def page_statement(shape: Shape) -> Statement:
    """Return the statement for an order and filters of one shape."""
    column = _c[shape.order.column]
    place = tuple_(column, _c.id)
    last = tuple_(bindparam("after_value", type_=column.type), bindparam("after_id", type_=String))
    conditions = [
        *_conditions(shape.chosen),
        *all_of((shape.after, place < last if shape.order.descending else place > last)),
    ]
    order = (column.desc(), _c.id.desc()) if shape.order.descending else (column, _c.id)
    return Statement(
        select(column.label("value"), _c.id, _c.payload)
        .where(
            _c.scope == bindparam("of"),
            _c.ended == bindparam("ended", type_=Boolean),
            _c.deleted.is_(False),
            *conditions,
        )
        .order_by(*order)
        .limit(bindparam("most"))
    )


@cache
def _snapshot(chosen: Chosen) -> Statement:
    return TASKS.narrowed(is_in(_c.ended, "halves"), *_conditions(chosen), hidden=True)


def _conditions(chosen: Chosen) -> list[ColumnElement[bool]]:
    return all_of(
        (chosen.repository, _c.repository_id == bindparam("repository", type_=String)),
        (chosen.repositories, is_in(_c.repository_id, "repositories")),
        (chosen.owners, is_in(_c.owner_user_id, "owners")),
        (chosen.pull_request, _c.has_pull_request == bindparam("pull_request", type_=Boolean)),
        (chosen.text, _c.search.like(bindparam("text", type_=String), escape="/")),
        (chosen.states, is_in(_c.state, "states")),
        (chosen.activities, is_in(_c.activity, "activities")),
    )


def _entry(task: TaskSummary, revision: int, *, deleted: bool, payload: bytes = b"") -> Entry:
    if not task.organization_id or not task.repository_id:
        raise RejectedEntryError(f"task {task.id} names no organization or repository")
    columns = {
        "repository_id": task.repository_id,
        "title": task.title,
        "search": search_text(task),
        "state": task.state,
        "activity": task.activity,
        "ended": task.state in ENDED,
        "owner_user_id": task.owner_user_id,
        "create_time": column_seconds(task.create_time),
        "update_time": column_seconds(task.update_time),
        "has_pull_request": has_pull_request(task),
    }
    return Entry(
        ENTITY_KIND_TASK,
        task.organization_id,
        task.id,
        revision,
        task,
        task_id=task.id,
        deleted=deleted,
        columns=columns,
        payload=payload,
    )
