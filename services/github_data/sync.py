"""The loop that reads the accounts that shall be read: several at a time, each with a deadline.

Wishes stand in the database: what was wanted before a restart, or could not be stored, is done after it.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from branchline.v1 import organizations_pb2
from branchline.v1.organizations_pb2 import GithubStatus

from services.github_data.failure import explain
from services.github_data.store import GithubStore, Wish
from services.runtime.clock import Clock
from services.runtime.database import Database, DatabaseError
from services.runtime.errors import reason_of
from services.runtime.logging import get_logger
from services.runtime.signal import Signal

if TYPE_CHECKING:
    from services.github_data.reading import Account

log = get_logger(__name__)

PARALLEL_ACCOUNTS = 8
_PARALLEL_REPOSITORIES = 4
_LOOK_SECONDS = 30.0


@dataclass(slots=True)
class GithubSync:
    """Reads accounts for as long as the service runs."""

    database: Database
    store: GithubStore
    clock: Clock
    account: "Callable[[str], Account]"
    """Makes the account of a login, in a thread: the first takes a while."""
    sync_seconds: float
    """Longest time that reading one account may take."""
    wanted: Signal = field(default_factory=Signal)
    _running: dict[str, "asyncio.Task[bool]"] = field(default_factory=dict[str, "asyncio.Task[bool]"])
    _turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(PARALLEL_ACCOUNTS))

    async def run(self) -> None:
        """Sync for ever."""
        async with asyncio.TaskGroup() as group:
            while True:
                ticket = self.wanted.ticket
                try:
                    for wish in await self.database.read(self.store.wanted):
                        if wish.organization_id not in self._running:
                            self._begin(group, wish)
                except Exception as error:  # noqa: BLE001 - the database; the next look finds it
                    log.warning("wishes not read", reason=reason_of(error))
                await self.wanted.wait(ticket, _LOOK_SECONDS)

    def stop(self, organization_id: str) -> None:
        """Stop reading an organization's account."""
        running = self._running.get(organization_id)
        if running is not None:
            running.cancel()

    def _begin(self, group: asyncio.TaskGroup, wish: Wish) -> None:
        task = self._running[wish.organization_id] = group.create_task(self._fulfil(wish))

        def ended(task: "asyncio.Task[bool]") -> None:
            del self._running[wish.organization_id]
            if not task.cancelled() and task.result():
                self.wanted.notify()  # there may be another wish by now

        task.add_done_callback(ended)

    async def _fulfil(self, wish: Wish) -> bool:
        """Read an account and store how it went; say whether that could be stored."""
        try:
            async with self._turns:
                status = await self._sync(wish)
                await self.database.write(self.store.save_status, status, wish)
        except Exception as error:  # noqa: BLE001 - the wish stands; it is tried again
            log.warning("github sync not stored", organization=wish.organization_id, reason=reason_of(error))
            return False
        return True

    async def _sync(self, wish: Wish) -> GithubStatus:
        status = GithubStatus(organization_id=wish.organization_id, sync_time=self.clock.timestamp())
        try:
            async with asyncio.timeout(self.sync_seconds):
                status.repository_count = await self._read_account(wish)
            status.connection = organizations_pb2.GITHUB_CONNECTION_CONNECTED
        except TimeoutError:
            explain(status, TimeoutError(f"reading GitHub took longer than {self.sync_seconds:.0f} s"))
        except Exception as error:  # whatever GitHub answers, it is said
            cause = _first(error)
            if isinstance(cause, DatabaseError):
                raise
            explain(status, cause)
        log.info("github sync ended", organization=wish.organization_id, detail=status.detail)
        return status

    async def _read_account(self, wish: Wish) -> int:
        account = await asyncio.to_thread(self.account, wish.login)
        repositories = await account.repositories()
        limit = asyncio.Semaphore(_PARALLEL_REPOSITORIES)

        async def read(repository: dict[str, Any]) -> None:
            async with limit:
                reported = await account.read(wish.organization_id, repository)
                await self.database.write(self.store.save_repository, reported)

        async with asyncio.TaskGroup() as group:
            for repository in repositories:
                group.create_task(read(repository))
        return len(repositories)


def _first(error: Exception) -> Exception:
    """Return the first error of a group of errors."""
    while isinstance(error, ExceptionGroup):
        error = cast("ExceptionGroup[Exception]", error).exceptions[0]
    return error
