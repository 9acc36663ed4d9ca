"""Makes the certificates of a first installation: a private authority, one for each service, one for the public door.

Each process finds its own in a folder of its name: `tls.crt`, `tls.key`, and `ca.crt`, whom it believes. The key of the
authority lies apart in `ca`, and nothing that runs needs it.
"""

import ipaddress
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cli.installation import SERVICES
from cli.settings import SettingsError
from services.runtime.config import certified_name
from services.runtime.principal import OPERATOR
from services.runtime.secrets import write_whole

AUTHORITY = "ca"
DOOR = "door"
"""Folder of the certificate that the gateway shows its clients."""

_AUTHORITY_DAYS = 3650
_DAYS = 397
_RENEWED_DAYS = 60
_SKEW = timedelta(hours=1)
_HERE = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Authority:
    """Who signs: its certificate, and its key where that is at hand."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey | None


def make_certificates(folder: Path, names: Sequence[str]) -> Iterator[tuple[Path, str]]:
    """Make what is not there, and again what ends within 60 days or is for other names.

    Without `names` the gateway keeps those that its certificate has. Yield each certificate's path with what became of
    it. Raise SettingsError if one is to be made without the authority's key.
    """
    authority, became = _authority(folder / AUTHORITY)
    yield folder / AUTHORITY / "ca.crt", became
    wanted = {name: [certified_name(name)] for name in (*SERVICES, OPERATOR)}
    wanted[DOOR] = list(dict.fromkeys([*names, *_HERE])) if names else _names_of(folder / DOOR / "tls.crt")
    for name, subjects in wanted.items():
        yield folder / name / "tls.crt", _certify(folder / name, authority, subjects)


def _authority(folder: Path) -> tuple[Authority, str]:
    """Return the authority, and what became of it; make it where there is none."""
    certificate, key = folder / "ca.crt", folder / "ca.key"
    if certificate.exists():
        found = x509.load_pem_x509_certificate(certificate.read_bytes())
        return Authority(found, _read_key(key) if key.exists() else None), _until("kept", found)
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Branchline CA {x509.random_serial_number():x}"[:64])])
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    made = (
        _begun(name, name, private.public_key(), datetime.now(UTC) + timedelta(days=_AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(private.public_key()), critical=False)
        .sign(private, hashes.SHA256())
    )
    write_whole(key, _pem_of_key(private))
    write_whole(certificate, made.public_bytes(serialization.Encoding.PEM), 0o644)
    return Authority(made, private), _until("made", made)


def _certify(folder: Path, authority: Authority, names: list[str]) -> str:
    """Have a certificate for names in a folder; say what became of it."""
    path = folder / "tls.crt"
    found = x509.load_pem_x509_certificate(path.read_bytes()) if path.exists() else None
    if found is not None and _fits(folder / "tls.key", found) and _serves(found, authority, names):
        return _until("kept", found)
    if authority.key is None:
        raise SettingsError(f"{path} is to be made, and the key of the authority is not there: put back ca/ca.key")
    made, key = issue(authority.certificate, authority.key, names, datetime.now(UTC) + timedelta(days=_DAYS))
    write_whole(folder / "ca.crt", authority.certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    write_whole(folder / "tls.key", key)
    write_whole(path, made.public_bytes(serialization.Encoding.PEM), 0o644)
    return _until("made" if found is None else "renewed", made)


def issue(
    issuer: x509.Certificate, issuer_key: ec.EllipticCurvePrivateKey, names: Sequence[str], ends: datetime
) -> tuple[x509.Certificate, bytes]:
    """Sign a certificate for names, to show to servers and to clients; return it with its key as PEM."""
    private = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    made = (
        _begun(subject, issuer.subject, private.public_key(), ends)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([_general(name) for name in names]), critical=False)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        .sign(issuer_key, hashes.SHA256())
    )
    return made, _pem_of_key(private)


def _serves(certificate: x509.Certificate, authority: Authority, names: list[str]) -> bool:
    """Say whether a certificate is still good: signed by this authority, for these names, for a while."""
    if certificate.not_valid_after_utc - datetime.now(UTC) < timedelta(days=_RENEWED_DAYS):
        return False
    try:
        certificate.verify_directly_issued_by(authority.certificate)
        subjects = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (InvalidSignature, ValueError, TypeError, x509.ExtensionNotFound):
        return False
    return set(subjects) == {_general(name) for name in names}


def _fits(path: Path, certificate: x509.Certificate) -> bool:
    return path.exists() and _read_key(path).public_key() == certificate.public_key()


def _names_of(path: Path) -> list[str]:
    """Return the names of a certificate; those of this host where there is none."""
    if not path.exists():
        return [*_HERE]
    found = x509.load_pem_x509_certificate(path.read_bytes())
    return [str(name.value) for name in found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value]


def _begun(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, ends: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - _SKEW)
        .not_valid_after(ends)
    )


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        return x509.DNSName(name)
    except ValueError as error:
        raise SettingsError(f'"{name}" is no name of a host: {error}') from error


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise SettingsError(f"{path} is no key that `branchline certs` has made")
    return key


def _pem_of_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _until(became: str, certificate: x509.Certificate) -> str:
    return f"{became}, good until {certificate.not_valid_after_utc:%Y-%m-%d}"
