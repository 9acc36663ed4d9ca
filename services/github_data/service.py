"""Builds the github-data service."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from branchline_internal.github_data.v1 import github_data_pb2

from services.github_data.servicer import GithubDataServicer
from services.github_data.store import GithubStore
from services.github_data.sync import GithubSync
from services.runtime.config import Secret, ServiceConfig
from services.runtime.service import Chassis, Service

if TYPE_CHECKING:
    from services.github_data.reading import Account


class GithubDataConfig(ServiceConfig, frozen=True):
    """Configuration of the github-data service."""

    github_url: str = "https://api.github.com"
    github_token: Secret = Secret("")
    sync_seconds: float = 900.0
    """Longest time that reading one account may take."""


def build(config: GithubDataConfig) -> Service:
    """Build the service."""
    chassis = Chassis("github_data", config, Path(__file__).parent, callers=("organization",))
    store = GithubStore(chassis.outbox)

    @cache
    def accounts() -> "Callable[[str], Account]":
        # Loaded with the first wish: githubkit and what it needs are 15 MB that most installations do without.
        from services.github_data.reading import open_accounts  # noqa: PLC0415

        return open_accounts(config.github_url, config.github_token.value)

    def account(login: str) -> "Account":
        return accounts()(login)

    sync = GithubSync(chassis.database, store, chassis.clock, account, config.sync_seconds)
    chassis.serve(GithubDataServicer(chassis.database, store, sync), github_data_pb2.DESCRIPTOR, "GithubDataService")
    chassis.push_to("organization")
    chassis.service.loops.append(sync.run)
    return chassis.service
