"""The sidebar: summaries of all tasks below an organization, and the way to each task."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from branchline.v1.tasks_pb2 import TaskStatus, TaskSummary
from branchline.v1.vocabulary_pb2 import ENTITY_KIND_TASK
from branchline_internal.user.v1.user_pb2 import ForgetTaskStatesRequest
from sqlalchemy import Boolean, String, bindparam, delete, func, or_, select, tuple_

from services.organization.destinations import TO_USER
from services.organization.filters import all_of, pattern
from services.organization.tables import task_lookup, task_summaries
from services.runtime.clock import column_seconds
from services.runtime.database import Reader, Statement, Tx, insert_new, is_in
from services.runtime.spine.index import Entry, Index
from services.runtime.spine.ingest import Pushed, RejectedEntryError
from services.runtime.spine.outbox import Mark, Outbox
from services.runtime.spine.pages import Page, page_of
from services.runtime.statuses import ENDED

_c = task_summaries.c
_ADD_ROUTE = Statement(insert_new(task_lookup, ["task_id"]))
_DROP_ROUTE = Statement(delete(task_lookup).where(task_lookup.c.task_id == bindparam("task")))
_ROUTE = Statement(
    select(task_lookup.c.organization_id, task_lookup.c.repository_id).where(task_lookup.c.task_id == bindparam("task"))
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
class TaskFilter:
    """Which tasks are wanted; what is empty or None does not matter. Without statuses: all that have not ended."""

    organization_id: str
    repository_id: str = ""
    owner_user_id: str = ""
    has_pull_request: bool | None = None
    text: str = ""
    statuses: tuple[TaskStatus.ValueType, ...] = ()


@dataclass(frozen=True, slots=True)
class Tasks:
    """What is indexed of tasks."""

    index: Index
    outbox: Outbox

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
        self, tx: Reader, wanted: TaskFilter, order: Order, after: Sequence[str | int | float] | None, most: int
    ) -> Page[TaskSummary]:
        """Return the tasks behind a place in an order."""
        shape = Shape(
            order=order,
            repository=bool(wanted.repository_id),
            owner=bool(wanted.owner_user_id),
            pull_request=wanted.has_pull_request is not None,
            text=bool(wanted.text),
            statuses=bool(wanted.statuses),
            after=after is not None,
        )
        value, last_id = after or (None, None)
        given = {
            "of": wanted.organization_id,
            "repository": wanted.repository_id,
            "owner": wanted.owner_user_id,
            "pull_request": wanted.has_pull_request,
            "text": pattern(wanted.text),
            "statuses": list(wanted.statuses),
            "after_value": value,
            "after_id": last_id,
            "most": most + 1,
        }
        statement = page_statement(shape)
        halves = {status in ENDED for status in wanted.statuses} or {False}
        found = [tx.each(statement, {**given, "ended": ended}) for ended in halves]
        rows = heapq.merge(*found, key=lambda row: (row.value, row.id), reverse=order.descending)
        return page_of(TaskSummary, rows, ["value", "id"], most)


@dataclass(frozen=True, slots=True)
class Shape:
    """What a statement is made for: the order and which filters are set."""

    order: Order
    repository: bool = False
    owner: bool = False
    pull_request: bool = False
    text: bool = False
    statuses: bool = False
    after: bool = False


@cache
def page_statement(shape: Shape) -> Statement:
    """Return the statement for an order and filters of one shape."""
    column = _c[shape.order.column]
    place = tuple_(column, _c.id)
    last = tuple_(bindparam("after_value", type_=column.type), bindparam("after_id", type_=String))
    text: Any = bindparam("text", type_=String)
    like = or_(
        func.lower(_c.title).like(text, escape="/"),
        func.lower(_c.branch).like(text, escape="/"),
    )
    conditions = all_of(
        (shape.repository, _c.repository_id == bindparam("repository")),
        (shape.owner, _c.owner_user_id == bindparam("owner")),
        (shape.pull_request, _c.has_pull_request == bindparam("pull_request", type_=Boolean)),
        (shape.text, like),
        (shape.statuses, is_in(_c.status, "statuses")),
        (shape.after, place < last if shape.order.descending else place > last),
    )
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


def _entry(task: TaskSummary, revision: int, *, deleted: bool, payload: bytes = b"") -> Entry:
    if not task.organization_id or not task.repository_id:
        raise RejectedEntryError(f"task {task.id} names no organization or repository")
    columns = {
        "repository_id": task.repository_id,
        "title": task.title,
        "branch": task.branch,
        "status": task.status,
        "ended": task.status in ENDED,
        "owner_user_id": task.owner_user_id,
        "create_time": column_seconds(task.create_time),
        "update_time": column_seconds(task.update_time),
        "has_pull_request": task.HasField("pull_request"),
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
