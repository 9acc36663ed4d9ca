"""Encryption at rest of what must be read again."""

import base64
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryptography.fernet import Fernet

_KEY_BYTES = 32


class Cipher:
    """Encrypts text with one key, as Fernet (https://github.com/fernet/spec) does."""

    def __init__(self, key: str) -> None:
        """Take a key in URL-safe base64. Raise ValueError if it is none."""
        if len(base64.urlsafe_b64decode(key)) != _KEY_BYTES:
            raise ValueError(f"a Fernet key has {_KEY_BYTES} bytes")
        self._key = key

    @cached_property
    def _fernet(self) -> "Fernet":
        # Loaded with the first secret: 6 MB that a service whose people store none does without.
        from cryptography.fernet import Fernet  # noqa: PLC0415

        return Fernet(self._key)

    def encrypt(self, text: str) -> bytes:
        """Return the text encrypted."""
        return self._fernet.encrypt(text.encode())

    def decrypt(self, encrypted: bytes) -> str:
        """Return the text. Raise InvalidToken if it was not encrypted with this key."""
        return self._fernet.decrypt(encrypted).decode()
