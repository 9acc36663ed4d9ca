"""`branchline certs`."""

from pathlib import Path

import pytest
from cryptography import x509

from cli.certificates import DOOR, make_certificates
from cli.installation import SERVICES
from cli.settings import SettingsError
from services.runtime.config import certified_name
from services.runtime.tls import Certificate
from tests.support.certificates import certificates, replace, serial_of


def test_every_service_is_given_a_certificate_that_the_others_believe(tmp_path: Path) -> None:
    certificates(tmp_path)

    for name in (*SERVICES, "operator"):
        place = tmp_path / name
        Certificate(place / "tls.crt", place / "tls.key", tmp_path / "ca" / "ca.crt", certified_name(name))


def test_keys_are_for_their_owner_alone_and_that_of_the_authority_lies_apart(tmp_path: Path) -> None:
    certificates(tmp_path)

    keys = list(tmp_path.rglob("*.key"))
    assert {key.stat().st_mode & 0o777 for key in keys} == {0o600}
    assert [key.parent.name for key in keys if key.name == "ca.key"] == ["ca"]


def test_what_is_good_stays_and_what_ends_soon_is_made_anew(tmp_path: Path) -> None:
    certificates(tmp_path, "gateway.example")
    replace(tmp_path, "task", [certified_name("task")], days=59)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}

    became = dict(make_certificates(tmp_path, ["gateway.example"]))

    changed = {path.parent.name for path, data in before.items() if path.read_bytes() != data}
    assert changed == {"task"}
    assert [path for path, word in became.items() if word.startswith("renewed")] == [tmp_path / "task" / "tls.crt"]


def test_a_key_that_is_not_the_certificates_is_replaced_with_it(tmp_path: Path) -> None:
    certificates(tmp_path)
    (tmp_path / "task" / "tls.key").write_bytes((tmp_path / "user" / "tls.key").read_bytes())

    became = dict(make_certificates(tmp_path, []))

    assert became[tmp_path / "task" / "tls.crt"].startswith("renewed")


def test_the_gateway_keeps_its_names_and_takes_others_when_told(tmp_path: Path) -> None:
    certificates(tmp_path, "one.example", "10.0.0.7")
    first = serial_of(tmp_path / DOOR / "tls.crt")

    certificates(tmp_path)
    again = serial_of(tmp_path / DOOR / "tls.crt")
    certificates(tmp_path, "two.example")

    shown = x509.load_pem_x509_certificate((tmp_path / DOOR / "tls.crt").read_bytes())
    names = shown.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert first == again
    assert names.get_values_for_type(x509.DNSName) == ["two.example", "localhost"]


def test_without_the_authoritys_key_what_is_good_stays_and_nothing_is_made(tmp_path: Path) -> None:
    certificates(tmp_path)
    (tmp_path / "ca" / "ca.key").unlink()

    kept = dict(make_certificates(tmp_path, []))
    (tmp_path / "task" / "tls.crt").unlink()

    assert all(word.startswith("kept") for word in kept.values())
    with pytest.raises(SettingsError, match=r"put back ca/ca\.key"):
        certificates(tmp_path)


def test_what_is_no_name_of_a_host_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no name of a host"):
        certificates(tmp_path, "bäum.example")
