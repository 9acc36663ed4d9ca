"""Durable workflows: DBOS, with its state in SQLite.

DBOS is one per process. A workflow that a kill interrupted goes on after the next start; launched inside the event
loop, it runs recovered workflows there too.
"""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dbos import DBOS

_APPLICATION_VERSION = "1"
"""Fixed: workflows of the release before are recovered by the next, so their steps must stay compatible."""


class WorkflowEngine:
    """The process's workflow engine. Register workflows before it starts."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        DBOS(
            config={
                "name": "branchline",
                "system_database_url": f"sqlite:///{path}",
                "application_version": _APPLICATION_VERSION,
                "executor_id": "local",
                "console_log_level": "ERROR",
                "log_level": "ERROR",
            }
        )
        logging.getLogger("dbos").setLevel(logging.ERROR)

    async def start(self) -> None:
        """Launch the engine; unfinished workflows go on."""
        DBOS.launch()

    async def stop(self) -> None:
        """Stop the engine at once; workflows go on after the next start."""
        await asyncio.to_thread(DBOS.destroy, workflow_completion_timeout_sec=0)
        # DBOS had made its own thread pool the loop's default, and has shut it down.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(thread_name_prefix="branchline"))
