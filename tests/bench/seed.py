"""Puts tasks into the databases of repository and organization as if they had been created and pushed."""

from collections.abc import Iterator, Sequence

from branchline.v1.sessions_pb2 import Session
from branchline.v1.tasks_pb2 import Task

from services.repository.summary import summary_of
from services.repository.tables import WATCHED
from services.repository.workbench import Workbench
from services.runtime.clock import Clock
from services.runtime.database import Tx, open_database
from services.runtime.spine.index import Index
from tests.bench.child import Child

_CHUNK = 1000


async def seed_repository(url: str, tasks: Sequence[Task]) -> None:
    """Write into the database of a repository service that does not run."""
    database = open_database(url)
    await database.start()
    index = Index(database, WATCHED, Clock())
    await index.start()
    for chunk in _chunks(tasks):
        await database.write(_add, Workbench(index), chunk)
    await database.close()


async def seed_organization(repository: Child, tasks: Sequence[Task]) -> None:
    """Push summaries, as the repository service does."""
    for chunk in _chunks(tasks):
        await repository.push_all([summary_of(task) for task in chunk])


def _add(tx: Tx, workbench: Workbench, tasks: Sequence[Task]) -> None:
    for task in tasks:
        workbench.add(tx, task, Session(id=f"ses_{task.id[5:]}", task_id=task.id, display_name="Session 1", revision=1))


def _chunks(tasks: Sequence[Task]) -> Iterator[Sequence[Task]]:
    return (tasks[start : start + _CHUNK] for start in range(0, len(tasks), _CHUNK))
