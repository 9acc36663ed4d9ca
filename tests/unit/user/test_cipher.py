"""Encryption at rest."""

import pytest
from cryptography.fernet import Fernet

from services.user.cipher import Cipher


def test_what_was_encrypted_is_read_again_and_does_not_show() -> None:
    key = Fernet.generate_key().decode()

    encrypted = Cipher(key).encrypt("a secret")

    assert b"a secret" not in encrypted
    assert Cipher(key).decrypt(encrypted) == "a secret"


@pytest.mark.parametrize("key", ["", "c2hvcnQ=", "no base64"])
def test_a_key_that_is_none_is_refused_before_the_first_secret(key: str) -> None:
    with pytest.raises(ValueError):
        Cipher(key)
