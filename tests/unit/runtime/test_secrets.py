"""Keys in files: there whole or not at all, and refused where they are nothing."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from services.runtime import secrets
from services.runtime.secrets import read_or_create_key


class Killed(BaseException):
    """The process ends here."""


def test_a_start_that_is_killed_leaves_no_key_that_is_half_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> bytes:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(secrets.base64, "urlsafe_b64encode", killed)
        with pytest.raises(Killed):
            read_or_create_key(tmp_path / "signing.key")

    assert len(read_or_create_key(tmp_path / "signing.key")) == 44
    assert [path.name for path in tmp_path.iterdir()] == ["signing.key"]


def test_an_empty_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "signing.key").touch(mode=0o600)
    with pytest.raises(ValueError, match=r"signing\.key is an empty key"):
        read_or_create_key(tmp_path / "signing.key")


def test_all_who_make_a_key_at_once_find_the_same(tmp_path: Path) -> None:
    for number in range(20):
        with ThreadPoolExecutor(8) as threads:
            keys = set(threads.map(read_or_create_key, [tmp_path / str(number)] * 8))
        assert len(keys) == 1
