"""Tokens of sandboxes, made from the installation's key: the same whoever makes them, and stored nowhere."""

import hashlib
import hmac
from dataclasses import dataclass

SERVER = "sandbox server"
"""For whom speaks to the server in a sandbox."""

DOOR = "sandbox door"
"""For a sandbox that speaks to the door."""


@dataclass(frozen=True, slots=True)
class Minter:
    """Makes tokens, and knows them again."""

    key: bytes

    def token(self, purpose: str, sandbox_id: str) -> str:
        """Return the token of a sandbox for one purpose."""
        return hmac.new(self.key, f"{purpose}\0{sandbox_id}".encode(), hashlib.sha256).hexdigest()

    def knows(self, purpose: str, sandbox_id: str, token: str) -> bool:
        """Say whether a token is that of a sandbox."""
        return hmac.compare_digest(self.token(purpose, sandbox_id).encode(), token.encode(errors="replace"))
