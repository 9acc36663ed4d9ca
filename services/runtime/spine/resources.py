"""Tables that keep resources: the message as payload, beside the columns that queries need.

SESSIONS = Resources(sessions, Session, ENTITY_KIND_SESSION, columns=lambda s: {"task_id": s.task_id})
SESSIONS_OF_TASK = SESSIONS.by("task_id", order="create_time")

session = SESSIONS.get(tx, session_id)                   # raises NotFound
SESSIONS.put(tx, session)                                # unless what is held is as new

An index table, which the index writes, is only read here: `Held`. Its tombstones are not found.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message
from sqlalchemy import ColumnElement, Table, bindparam, delete, select

from services.runtime.database import Reader, Statement, Tx, is_in, upsert
from services.runtime.errors import NotFound
from services.runtime.spine.hub import Kind

M = TypeVar("M", bound=Message)


class Held(Generic[M]):
    """The resources of one table, to be read. `key` are its primary key columns, the id last."""

    def __init__(self, table: Table, message: type[M], kind: Kind, *, key: Sequence[str] = ("id",)) -> None:
        self.table, self._message, self._kind = table, message, kind
        self._key = tuple(key)
        self._this = [table.c[name] == bindparam(f"key_{name}") for name in self._key]
        self._alive = [table.c.deleted.is_(False)] if "deleted" in table.c else []
        found = select(table.c.payload).where(*self._alive)
        self._find = Statement(found.where(*self._this))
        self._find_many = Statement(found.where(is_in(table.c[self._key[-1]], "ids")))

    def find(self, tx: Reader, *key: Any) -> M | None:
        """Return a resource, or None."""
        payload = tx.value(self._find, self._given(key))
        return self._message.FromString(payload) if payload is not None else None

    def get(self, tx: Reader, *key: Any) -> M:
        """Return a resource; raise NotFound naming the last part of the key."""
        found = self.find(tx, *key)
        if found is None:
            raise NotFound(self._kind, str(key[-1]))
        return found

    def find_many(self, tx: Reader, ids: Sequence[str]) -> list[M]:
        """Return the resources that there are of these ids, in no order."""
        return [self._message.FromString(row.payload) for row in tx.rows(self._find_many, {"ids": ids})]

    def by(
        self, *names: str, where: Sequence[ColumnElement[bool]] = (), order: str = "", limit: int | None = None
    ) -> Callable[..., list[M]]:
        """Make a query, at module level: all resources whose columns have the values given as keywords."""
        query = select(self.table.c.payload).where(
            *(self.table.c[name] == bindparam(f"by_{name}") for name in names), *self._alive, *where
        )
        query = query.order_by(self.table.c[order or self._key[-1]])
        statement = Statement(query.limit(limit) if limit is not None else query)

        def find_all(tx: Reader, **given: Any) -> list[M]:
            rows = tx.rows(statement, {f"by_{name}": given[name] for name in names})
            return [self._message.FromString(row.payload) for row in rows]

        return find_all

    def _given(self, key: Sequence[Any]) -> dict[str, Any]:
        return {f"key_{name}": value for name, value in zip(self._key, key, strict=True)}


class Resources(Held[M]):
    """One table of resources.

    `columns` returns the values of all columns but `payload` and `revision` for a message; those in `own` are set by
    their own statements alone.
    """

    def __init__(
        self,
        table: Table,
        message: type[M],
        kind: Kind,
        columns: Callable[[M], Mapping[str, Any]],
        *,
        key: Sequence[str] = ("id",),
        own: Sequence[str] = (),
    ) -> None:
        super().__init__(table, message, kind, key=key)
        self._columns = columns
        self._put = Statement(upsert(table, self._key, newer="revision", leave_out=own))
        self._take = Statement(select(table.c.payload).where(*self._alive, *self._this).with_for_update())
        self._delete = Statement(delete(table).where(*self._this))

    def take(self, tx: Tx, *key: Any) -> M:
        """Return a resource that will be changed; raise NotFound. Who changes the same one takes turns."""
        payload = tx.value(self._take, self._given(key))
        if payload is None:
            raise NotFound(self._kind, str(key[-1]))
        return self._message.FromString(payload)

    def put(self, tx: Tx, message: M) -> bool:
        """Store a state, unless what is held is as new; say whether it was stored."""
        return tx.change(self._put, self._row(message)) > 0

    def put_many(self, tx: Tx, messages: Sequence[M]) -> None:
        """Store states, each unless what is held is as new."""
        tx.change_many(self._put, [self._row(message) for message in messages])

    def save(self, tx: Tx, messages: Sequence[M]) -> None:
        """Store new resources, or the next states of what was read; raise Raced if another was faster."""
        tx.change_each(self._put, [self._row(message) for message in messages])

    def delete(self, tx: Tx, *key: Any) -> bool:
        """Remove a resource; say whether there was one."""
        return tx.change(self._delete, self._given(key)) > 0

    def _row(self, message: M) -> dict[str, Any]:
        revision = getattr(message, "revision")  # noqa: B009 - every resource has one
        return {**self._columns(message), "revision": revision, "payload": message.SerializeToString()}
