"""Certificates for tests: what `branchline certs` makes, and what has something wrong."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cli.certificates import DOOR, issue, make_certificates


def certificates(folder: Path, *names: str) -> Path:
    """Make all certificates of an installation."""
    for _ in make_certificates(folder, names):
        pass
    return folder


def replace(folder: Path, of: str, names: Sequence[str], *, days: float = 30.0, key_mode: int = 0o600) -> Path:
    """Put another certificate of the same authority in the place of one; return its folder."""
    authority = x509.load_pem_x509_certificate((folder / "ca" / "ca.crt").read_bytes())
    signing = serialization.load_pem_private_key((folder / "ca" / "ca.key").read_bytes(), None)
    assert isinstance(signing, ec.EllipticCurvePrivateKey)
    made, key = issue(authority, signing, names, datetime.now(UTC) + timedelta(days=days))
    place = folder / of
    (place / "tls.key").write_bytes(key)
    (place / "tls.key").chmod(key_mode)
    (place / "tls.crt").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    return place


def tls_settings(folder: Path) -> dict[str, str]:
    """Return the settings that name certificates as `branchline certs` has made them."""
    return {
        "BRANCHLINE_TLS__CA": str(folder / "{service}" / "ca.crt"),
        "BRANCHLINE_TLS__CERTIFICATE": str(folder / "{service}" / "tls.crt"),
        "BRANCHLINE_TLS__KEY": str(folder / "{service}" / "tls.key"),
        "BRANCHLINE_GATEWAY__CERTIFICATE": str(folder / DOOR / "tls.crt"),
        "BRANCHLINE_GATEWAY__KEY": str(folder / DOOR / "tls.key"),
    }


def serial_of(path: Path) -> int:
    """Return the serial number of a certificate."""
    return x509.load_pem_x509_certificate(path.read_bytes()).serial_number
