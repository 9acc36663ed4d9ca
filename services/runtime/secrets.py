"""Secrets: random tokens of which only hashes are stored, and encryption at rest for what must be read again."""

import base64
import hashlib
import os
import secrets
from pathlib import Path

from services.runtime.config import make_private

_KEY_BYTES = 32
TOKEN_PREFIX = "bl_"  # noqa: S105 - the beginning of every token


def new_token() -> str:
    """Make a token with 256 random bits, recognisable by its prefix."""
    return TOKEN_PREFIX + secrets.token_urlsafe(32)


def token_hash(token: str) -> str:
    """Return the SHA-256 of a token in hex. A token is random, so it needs no salt or slow hash."""
    return hashlib.sha256(token.encode()).hexdigest()


def read_or_create_key(path: Path) -> str:
    """Return the Fernet key in a file that only its owner can read; make it on first use.

    Raise ValueError if others can read it.
    """
    if not path.exists():
        make_private(path.parent)
        path.touch(mode=0o600)
        path.write_bytes(base64.urlsafe_b64encode(secrets.token_bytes(_KEY_BYTES)))
    require_private(path)
    return path.read_text()


def require_private(path: Path) -> None:
    """Raise ValueError unless its owner alone can read a key file; a group may that of root's."""
    try:
        state = path.stat()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    shared = 0o027 if state.st_uid == 0 and os.geteuid() != 0 else 0o077
    if state.st_mode & shared:
        raise ValueError(f"{path} is a key that others can read or change: chmod 600 {path}")
