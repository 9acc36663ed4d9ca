"""URLs of git remotes."""

from urllib.parse import urlsplit


def host_of(remote_url: str) -> str:
    """Return the host, with its port if there is one, that credentials for a remote are kept under."""
    if "://" not in remote_url:  # git@host:path
        return remote_url.partition("@")[2].partition(":")[0].lower()
    return urlsplit(remote_url).netloc.rpartition("@")[2].lower()
