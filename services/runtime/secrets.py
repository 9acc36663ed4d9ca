"""Secrets: random tokens of which only hashes are stored, and encryption at rest for what must be read again."""

import base64
import contextlib
import hashlib
import os
import secrets
import tempfile
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

    Raise ValueError if others can read it, or if it is empty.
    """
    if not path.exists():
        write_whole(path, base64.urlsafe_b64encode(secrets.token_bytes(_KEY_BYTES)), over=False)
    require_private(path)
    key = path.read_text().strip()
    if not key:
        raise ValueError(f"{path} is an empty key: put back its copy, or remove it if this installation is new")
    return key


def write_whole(path: Path, data: bytes, mode: int = 0o600, *, over: bool = True) -> None:
    """Put a file in its place whole or not at all, never readable by more than its mode says.

    Unless it may go `over` a file that is there, that one stays: of two who make one at once both find the same.
    """
    make_private(path.parent)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        if over:
            Path(name).replace(path)
        else:
            with contextlib.suppress(FileExistsError):
                path.hardlink_to(name)
    finally:
        Path(name).unlink(missing_ok=True)


def require_private(path: Path) -> None:
    """Raise ValueError unless its owner alone can read a key file; a group may that of root's."""
    try:
        state = path.stat()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    shared = 0o027 if state.st_uid == 0 and os.geteuid() != 0 else 0o077
    if state.st_mode & shared:
        raise ValueError(f"{path} is a key that others can read or change: chmod 600 {path}")
