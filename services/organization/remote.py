"""Rules for the URLs of repositories."""

import re
from urllib.parse import urlsplit

from services.runtime.errors import InvalidArgument

_SCHEMES = frozenset({"https", "http", "ssh", "git", "file"})
_SCP_LIKE = re.compile(r"^[A-Za-z0-9._-]+@[A-Za-z0-9.-]+:[^\s]+$")


def check_remote_url(url: str) -> None:
    """Raise InvalidArgument unless git could clone this and it carries no secret."""
    if any(character.isspace() or ord(character) < 32 for character in url):
        raise InvalidArgument("remote_url", "must not hold white space")
    if _SCP_LIKE.match(url):
        return
    try:
        parts = urlsplit(url)
        password = parts.password
    except ValueError as error:
        raise InvalidArgument("remote_url", "is not a URL") from error
    if parts.scheme not in _SCHEMES:
        raise InvalidArgument("remote_url", f"must begin with one of {', '.join(sorted(_SCHEMES))}")
    if password or (parts.username and parts.scheme in {"http", "https"}):
        raise InvalidArgument("remote_url", "must not hold credentials; store them with SetGitCredential")
    if not parts.path.strip("/") or (parts.scheme != "file" and not parts.hostname):
        raise InvalidArgument("remote_url", "names no repository")


def name_from_url(url: str) -> str:
    """Derive a name such as "acme/shop" from a URL."""
    path = url.partition(":")[2] if _SCP_LIKE.match(url) else urlsplit(url).path
    parts = [part for part in path.removesuffix(".git").split("/") if part]
    if url.startswith("file:"):
        return parts[-1]
    return "/".join(parts[-2:])
