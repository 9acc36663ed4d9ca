"""Durable workflows: DBOS, with its state in a SQLite file, or beside the service's tables in a schema of its own.

DBOS is one per process. A workflow that a kill interrupted goes on after the next start; launched inside the event
loop, it runs recovered workflows there too.
"""

import asyncio
import functools
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from dbos import DBOS, DBOSConfig
from dbos._dbos import _get_or_create_dbos_registry  # pyright: ignore[reportPrivateUsage]
from sqlalchemy import URL
from sqlalchemy.exc import OperationalError

from services.runtime.config import make_private
from services.runtime.database import DatabaseUnavailable
from services.runtime.errors import reason_of

_APPLICATION_VERSION = "1"
"""Fixed: workflows of the release before are recovered by the next, so their steps must stay compatible."""

_LIVE = frozenset({"PENDING", "ENQUEUED", "DELAYED"})
_OVER = ["SUCCESS", "ERROR", "CANCELLED", "MAX_RECOVERY_ATTEMPTS_EXCEEDED"]
SCHEMA = "dbos"
"""Of DBOS's tables in a database on a server."""

_CONNECTIONS = 8
"""Most that DBOS may have to a server, one of them to listen."""

_KEEP = timedelta(days=7)
_PART = 500

P = ParamSpec("P")
T = TypeVar("T")


class StepError(Exception):
    """What went wrong in a step, as words alone: it is kept in the workflow's record."""


def durable_step(step: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Make a step that is tried six times within some seconds before it fails its workflow."""

    @functools.wraps(step)
    async def in_words(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await step(*args, **kwargs)
        except Exception as error:
            raise StepError(reason_of(error)) from error

    return DBOS.step(retries_allowed=True, max_attempts=6, interval_seconds=0.2)(in_words)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a workflow stands."""

    live: bool
    reason: str
    """How it ended, in words."""


class WorkflowEngine:
    """The process's workflow engine. Register workflows before it starts."""

    def __init__(self, database_url: str) -> None:
        config: DBOSConfig = {
            "name": "branchline",
            "application_version": _APPLICATION_VERSION,
            "executor_id": "local",  # who starts with this name recovers all: the service is one process at a time
            "console_log_level": "ERROR",
            "log_level": "ERROR",
        }
        self._url = database_url
        self._config: DBOSConfig = {**config, **_state(database_url)}
        DBOS(config=self._config)
        logging.getLogger("dbos").setLevel(logging.ERROR)

    async def start(self) -> None:
        """Launch the engine; unfinished workflows go on. Raise DatabaseUnavailable if its server is away."""
        await asyncio.to_thread(_reach, self._url)  # while DBOS launches it holds up the event loop
        try:
            DBOS.launch()
        except OperationalError as error:
            await self._destroy()
            DBOS(config=self._config)
            raise DatabaseUnavailable(reason_of(error)) from error

    async def stop(self) -> None:
        """Stop the engine at once; workflows go on after the next start."""
        await self._destroy()
        # So that the service can be built again in this process. DBOS forgets instances only together with workflows.
        _get_or_create_dbos_registry().instance_info_map.clear()

    async def _destroy(self) -> None:
        await asyncio.to_thread(DBOS.destroy, workflow_completion_timeout_sec=0)
        # DBOS had made its own thread pool the loop's default, and has shut it down.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(thread_name_prefix="branchline"))

    async def outcomes(self, ids: Sequence[str]) -> Mapping[str, Outcome]:
        """Say how workflows stand, by their ids; one that was never started is missing."""
        found = await DBOS.list_workflows_async(workflow_ids=list(ids), load_input=False)
        return {
            one.workflow_id: Outcome(
                one.status in _LIVE, failure_of(one.error) if one.error else f"its workflow ended in {one.status}"
            )
            for one in found
        }

    async def forget_old(self) -> None:
        """Forget workflows that ended a week ago."""
        before = (datetime.now(UTC) - _KEEP).isoformat()
        while True:
            old = await DBOS.list_workflows_async(
                completed_before=before, status=_OVER, limit=_PART, load_input=False, load_output=False
            )
            await DBOS.delete_workflows_async([one.workflow_id for one in old])
            if len(old) < _PART:
                return


def _state(database_url: str) -> "DBOSConfig":
    """Say where DBOS keeps its state: beside a service's SQLite file, or in its database on a server."""
    if database_url.startswith("sqlite:///"):
        path = Path(database_url.removeprefix("sqlite:///")).parent / "workflows.sqlite"
        make_private(path.parent)
        return {"system_database_url": f"sqlite:///{path}"}
    from services.runtime.database.server import named, open_connection  # noqa: PLC0415 - only where there is a server

    options = {"creator": partial(open_connection, database_url), "max_overflow": 0, "pool_pre_ping": True}
    return {
        "system_database_url": f"postgresql:///{named(database_url)['dbname']}",  # the creator knows the rest
        "dbos_system_schema": SCHEMA,
        "sys_db_pool_size": _CONNECTIONS,
        "db_engine_kwargs": options,
    }


def _reach(database_url: str) -> None:
    """Raise DatabaseUnavailable if the database is on a server that cannot be reached."""
    if database_url.startswith("sqlite:///"):
        return
    from services.runtime.database.server import connect  # noqa: PLC0415

    connect(database_url).close()


def make_state(database_url: str) -> None:
    """Make DBOS's tables in a database on a server."""
    from services.runtime.database.server import named  # noqa: PLC0415

    given = named(database_url)
    url = URL.create(
        "postgresql",
        given.pop("user", None),
        given.pop("password", None),
        database=given.pop("dbname"),
        query=given,
    )
    DBOS.migrate(url.render_as_string(hide_password=False), schema=SCHEMA)


def failure_of(error: BaseException) -> str:
    """Return words for people about what made a workflow fail: of a step that was tried often, the last error."""
    tried: Sequence[BaseException] = getattr(error, "errors", ())
    return reason_of(tried[-1] if tried else error)
