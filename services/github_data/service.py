"""Builds the github-data service."""

from pathlib import Path

from branchline.github_data.v1 import github_data_pb2
from githubkit import GitHub
from pydantic import SecretStr

from services.github_data.reading import Account
from services.github_data.servicer import GithubDataServicer
from services.github_data.store import GithubStore
from services.github_data.sync import GithubSync
from services.runtime.config import ServiceConfig
from services.runtime.service import Chassis, Service

_TIMEOUT_SECONDS = 30.0


class GithubDataConfig(ServiceConfig):
    """Configuration of the github-data service."""

    github_url: str = "https://api.github.com"
    github_token: SecretStr = SecretStr("")
    sync_seconds: float = 900.0
    """Longest time that reading one account may take."""


def build(config: GithubDataConfig) -> Service:
    """Build the service."""
    chassis = Chassis("github_data", config, Path(__file__).parent)
    token = config.github_token.get_secret_value()
    github = GitHub(token or None, base_url=config.github_url, timeout=_TIMEOUT_SECONDS)
    store = GithubStore(chassis.outbox)
    sync = GithubSync(chassis.database, store, chassis.clock, lambda login: Account(github, login), config.sync_seconds)
    chassis.serve(GithubDataServicer(chassis.database, store, sync), github_data_pb2.DESCRIPTOR, "GithubDataService")
    chassis.push_to("organization")
    chassis.service.loops.append(sync.run)
    return chassis.service
