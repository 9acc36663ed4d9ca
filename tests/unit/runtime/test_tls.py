"""Certificates in files: what is refused at the start, and what happens when they change."""

from pathlib import Path

import pytest

from services.runtime import tls
from services.runtime.config import TlsConfig, certified_name
from services.runtime.tls import Certificate, open_certificate, require_safe
from tests.support.certificates import certificates, replace

NAME = certified_name("task")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificates(tmp_path_factory.mktemp("certs"))


@pytest.fixture
def folder(tmp_path: Path, made: Path) -> Path:
    """Return the certificates of task and of the authority, to be changed."""
    for path in (*(made / "ca").iterdir(), *(made / "task").iterdir()):
        place = tmp_path / path.parent.name
        place.mkdir(exist_ok=True)
        (place / path.name).write_bytes(path.read_bytes())
        (place / path.name).chmod(0o600)
    return tmp_path


def shown(folder: Path) -> Certificate:
    """Open the certificate that lies in task's place."""
    place = folder / "task"
    return Certificate(place / "tls.crt", place / "tls.key", folder / "ca" / "ca.crt", NAME)


@pytest.mark.parametrize(
    ("names", "days", "mode", "words"),
    [
        ([NAME], -0.001, 0o600, "certificate has expired"),
        ([certified_name("user")], 30, 0o600, "Hostname mismatch"),
        ([NAME], 30, 0o644, "is a key that others can read or change: chmod 600"),
        ([NAME], 30, 0o620, "is a key that others can read or change: chmod 600"),
    ],
)
def test_what_peers_would_refuse_is_refused_at_the_start(
    folder: Path, names: list[str], days: float, mode: int, words: str
) -> None:
    replace(folder, "task", names, days=days, key_mode=mode)

    with pytest.raises(ValueError, match=words):
        shown(folder)


def test_the_words_about_a_certificate_for_clients_name_no_authority(folder: Path) -> None:
    place = replace(folder, "task", ["gateway.example"], days=-0.001)

    with pytest.raises(ValueError, match=r"tls\.crt is refused: certificate has expired"):
        Certificate(place / "tls.crt", place / "tls.key")


def test_the_certificate_of_another_authority_is_refused(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = certificates(tmp_path_factory.mktemp("other"))
    (folder / "ca" / "ca.crt").write_bytes((other / "ca" / "ca.crt").read_bytes())

    with pytest.raises(ValueError, match="unable to get local issuer certificate"):
        shown(folder)


def test_a_key_of_another_certificate_is_refused(folder: Path, made: Path) -> None:
    (folder / "task" / "tls.key").write_bytes((made / "user" / "tls.key").read_bytes())

    with pytest.raises(ValueError, match="are no certificate with its key"):
        shown(folder)


@pytest.mark.parametrize("missing", ["task/tls.crt", "task/tls.key", "ca/ca.crt"])
def test_a_missing_file_is_named(folder: Path, missing: str) -> None:
    (folder / missing).unlink()

    with pytest.raises(ValueError, match=f"{missing} cannot be read: No such file"):
        shown(folder)


def test_a_file_that_is_no_certificate_is_named(folder: Path) -> None:
    (folder / "ca" / "ca.crt").write_text("not a certificate")

    with pytest.raises(ValueError, match=r"ca\.crt holds no certificates"):
        shown(folder)


def test_changed_files_are_read_again_once_they_are_good(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "_LOOK_SECONDS", 0.0)
    certificate = shown(folder)
    first = certificate.current()

    key = (folder / "task" / "tls.key").read_bytes()
    replace(folder, "task", [NAME])
    new_key = (folder / "task" / "tls.key").read_bytes()
    (folder / "task" / "tls.key").write_bytes(key)
    half = certificate.current()
    (folder / "task" / "tls.key").write_bytes(new_key)
    whole = certificate.current()

    assert half is first
    assert whole.key == new_key
    assert certificate.current() is whole


def test_a_part_of_the_settings_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="belong together"):
        open_certificate(TlsConfig(ca=folder / "ca" / "ca.crt"), "task")


@pytest.mark.parametrize("address", ["unix:/run/task", "127.0.0.1:7700", "localhost:7700", "[::1]:7700"])
def test_plaintext_may_stay_on_this_host(address: str) -> None:
    require_safe(address, "task", "remedy", insecure=False)


@pytest.mark.parametrize("address", ["0.0.0.0:7700", "[::]:7700", "10.0.0.1:7700", "task:7706", "localhost.example:1"])
def test_plaintext_leaves_this_host_only_when_told(address: str) -> None:
    with pytest.raises(ValueError, match="would not be encrypted: remedy"):
        require_safe(address, "task", "remedy", insecure=False)
    require_safe(address, "task", "remedy", insecure=True)
