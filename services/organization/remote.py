"""Rules for the URLs of repositories."""

import re
from urllib.parse import urlsplit

from services.runtime.errors import InvalidArgument

_SCHEMES = frozenset({"https", "http", "ssh", "git", "file"})
_SCP_LIKE = re.compile(r"^[A-Za-z0-9._][A-Za-z0-9._-]*@[A-Za-z0-9][A-Za-z0-9.-]*:[^\s-][^\s]*$")


def check_remote_url(url: str) -> None:
    """Raise InvalidArgument unless git could clone this and it carries no secret."""
    if any(character.isspace() or not character.isprintable() for character in url):
        raise InvalidArgument("remote_url", "must not hold white space or what cannot be seen")
    if _SCP_LIKE.match(url):
        return
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError as error:
        raise InvalidArgument("remote_url", "is not a URL") from error
    if parts.scheme not in _SCHEMES:
        raise InvalidArgument("remote_url", f"must begin with one of {', '.join(sorted(_SCHEMES))}")
    if parts.password is not None or ("@" in parts.netloc and parts.scheme != "ssh"):
        raise InvalidArgument("remote_url", "must not hold credentials; store them as a secret")
    if parts.query or parts.fragment:
        raise InvalidArgument("remote_url", "must not hold a query or a fragment: everybody who sees it would see them")
    if parts.netloc.startswith("-") or host.startswith("-") or ".." in parts.path.split("/"):
        raise InvalidArgument("remote_url", "is nothing that git clones")
    if not parts.path.strip("/") or bool(host) == (parts.scheme == "file"):
        raise InvalidArgument("remote_url", "names no repository")


def name_from_url(url: str) -> str:
    """Derive a name such as "acme/shop" from a URL."""
    path = url.partition(":")[2] if _SCP_LIKE.match(url) else urlsplit(url).path
    parts = [part for part in path.removesuffix(".git").split("/") if part]
    if url.startswith("file:"):
        return parts[-1]
    return "/".join(parts[-2:])
