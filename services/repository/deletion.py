"""Deletion of a repository: its tasks are told to go, what they leave is buried, then the repository is gone.

What is to be done stands in the rows, and each step does a bounded part of it: a service that was killed goes on
where it was.
"""

from dataclasses import dataclass, field

from branchline.v1.repositories_pb2 import Repository
from branchline_internal.task.v1.task_pb2 import DeleteTaskRequest
from sqlalchemy import bindparam, delete, exists, select, update

from services.repository.downward import TO_TASK
from services.repository.store import REPOSITORIES, RepositoryStore
from services.repository.tables import deleted_repositories, repositories, task_index
from services.repository.workbench import Workbench
from services.runtime.clock import Clock
from services.runtime.database import Database, Statement, Tx, is_in
from services.runtime.logging import get_logger
from services.runtime.signal import Signal
from services.runtime.spine.outbox import Mark, Outbox

log = get_logger(__name__)

TELL_AGAIN_SECONDS = 600.0
"""When a task that is still there is told again, so that no lost word leaves a deletion unfinished."""

REMEMBER_SECONDS = 7 * 24 * 3600.0
"""How long a repository that is gone is remembered."""

_LOOK_SECONDS = 60.0
_TOLD_AT_ONCE = 100
_BURIED_TASKS = 20
_FINISHED_AT_ONCE = 20

_TO_TELL = Statement(
    select(task_index.c.task_id)
    .join(repositories, repositories.c.id == task_index.c.repository_id)
    .where(
        repositories.c.deleting.is_(True),
        task_index.c.gone.is_(False),
        task_index.c.told_time < bindparam("before"),
    )
    .order_by(task_index.c.task_id)
    .limit(_TOLD_AT_ONCE)
)
_TOLD = Statement(update(task_index).where(is_in(task_index.c.task_id, "ids")).values(told_time=bindparam("now")))
_GONE = Statement(select(task_index.c.task_id).where(task_index.c.gone.is_(True)).limit(_BURIED_TASKS))
_FORGET_TASKS = Statement(delete(task_index).where(is_in(task_index.c.task_id, "ids")))
_EMPTY = Statement(
    select(repositories.c.payload)
    .where(repositories.c.deleting.is_(True), ~exists().where(task_index.c.repository_id == repositories.c.id))
    .limit(_FINISHED_AT_ONCE)
)
_FORGET_REPOSITORIES = Statement(
    delete(deleted_repositories).where(deleted_repositories.c.delete_time < bindparam("before"))
)


@dataclass(frozen=True, slots=True)
class Deletion:
    """Brings deletions to their end."""

    database: Database
    outbox: Outbox
    clock: Clock
    store: RepositoryStore
    workbench: Workbench
    wanted: Signal = field(default_factory=Signal)
    """There is something to do."""

    def begin(self, tx: Tx, repository_id: str) -> None:
        """Have a repository deleted; raise NotFound if there is none. One that is being deleted already stays so."""
        repository = REPOSITORIES.take(tx, repository_id)
        if not repository.HasField("delete_time"):
            repository.delete_time.CopyFrom(self.clock.timestamp())
            self.store.save(tx, [repository])
            tx.after_commit(self.wanted.notify)

    async def sweep(self) -> None:
        """Do what there is to do, then wait for more."""
        ticket = self.wanted.ticket
        while await self.database.write(self.step):
            pass
        await self.wanted.wait(ticket, _LOOK_SECONDS)

    def step(self, tx: Tx) -> bool:
        """Do a bounded part of what there is to do; say whether there was any."""
        done = self._tell(tx) + self._bury(tx) + self._finish(tx)
        tx.change(_FORGET_REPOSITORIES, {"before": self.clock.seconds() - REMEMBER_SECONDS})
        return done > 0

    def _tell(self, tx: Tx) -> int:
        now = self.clock.seconds()
        ids = [row.task_id for row in tx.rows(_TO_TELL, {"before": now - TELL_AGAIN_SECONDS})]
        if ids:
            tx.change(_TOLD, {"ids": ids, "now": now})
            self.outbox.mark(tx, [Mark(one, 1, DeleteTaskRequest(task_id=one), TO_TASK) for one in ids])
        return len(ids)

    def _bury(self, tx: Tx) -> int:
        ids = [row.task_id for row in tx.rows(_GONE)]
        if ids and not self.workbench.bury(tx, ids):
            tx.change(_FORGET_TASKS, {"ids": ids})
        return len(ids)

    def _finish(self, tx: Tx) -> int:
        empty = [Repository.FromString(row.payload) for row in tx.rows(_EMPTY)]
        for repository in empty:
            self.store.remove(tx, repository)
            log.info("repository deleted", repository=repository.id)
        return len(empty)
