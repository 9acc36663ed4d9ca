"""GitHub data: the cache of GitHub, pushed up to organization. Child of organization, coordinator of nothing."""

from pathlib import Path

from branchline.github_data.v1 import github_data_pb2_grpc
from branchline.spine.v1 import push_pb2_grpc
from githubkit import GitHub
from pydantic import SecretStr

from services.github_data.servicer import GithubDataServicer
from services.github_data.store import GithubStore
from services.github_data.sync import GithubSync
from services.github_data.tables import spine
from services.runtime.config import ServiceConfig
from services.runtime.service import Service, chassis
from services.runtime.spine.push import PushClient

_TIMEOUT_SECONDS = 30.0


class GithubDataConfig(ServiceConfig):
    """Configuration of the github-data service."""

    organization_address: str
    github_url: str = "https://api.github.com"
    github_token: SecretStr = SecretStr("")


def build(config: GithubDataConfig) -> Service:
    """Build the service."""
    parts = chassis("github_data", config, spine, Path(__file__).parent)
    token = config.github_token.get_secret_value()
    github = GitHub(token or None, base_url=config.github_url, timeout=_TIMEOUT_SECONDS)
    store = GithubStore(parts)
    sync = GithubSync(github, store, parts.clock)
    servicer = GithubDataServicer(store, sync)
    parts.service.serves(
        "branchline.github_data.v1.GithubDataService",
        lambda server: github_data_pb2_grpc.add_GithubDataServiceServicer_to_server(servicer, server),
    )
    organization = parts.channel(config.organization_address)
    push = PushClient(parts.outbox, lambda: push_pb2_grpc.PushServiceStub(organization), "github_data")
    parts.service.loops += [push.run, sync.run]
    return parts.service
