"""How a sync fails, and what is said of it."""

from branchline.v1 import organizations_pb2
from branchline.v1.organizations_pb2 import GithubStatus

_FORBIDDEN = frozenset({401, 403})
_WORDS = 500


class GithubRefused(Exception):
    """GitHub answered a request with an error. `status_code` is HTTP's."""

    def __init__(self, status_code: int, text: str) -> None:
        super().__init__(f"GitHub answered {status_code}: {text[:_WORDS]}")
        self.status_code = status_code


def explain(status: GithubStatus, error: Exception) -> None:
    """Say in the status why a sync failed."""
    status.connection = organizations_pb2.GITHUB_CONNECTION_FAILING
    status.detail = f"{type(error).__name__}: {error}"[:_WORDS]
    if isinstance(error, GithubRefused):
        status.detail = str(error)
        if error.status_code in _FORBIDDEN:
            status.connection = organizations_pb2.GITHUB_CONNECTION_RECONNECT_REQUIRED
