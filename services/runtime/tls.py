"""Certificates: what a process shows to others and whom it believes, read again when the files change.

Between services both ends show one, made for the service by name; `branchline certs` makes them. What is wrong with the
files is found before the first connection: the certificate is shown to itself, as a peer would see it.
"""

import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import grpc
from branchline.tls import is_local

from services.runtime.config import TlsConfig, certified_name
from services.runtime.logging import get_logger
from services.runtime.secrets import require_private

log = get_logger(__name__)

_LOOK_SECONDS = 1.0
_TELL_SECONDS = 21 * 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Pems:
    """What was in the files of a certificate."""

    certificate: bytes
    key: bytes
    ca: bytes | None
    expires: float
    """When the certificate ends, in seconds since the epoch."""


class Certificate:
    """A certificate with its key, and whom it trusts, as its files hold them now."""

    def __init__(self, certificate: Path, key: Path, ca: Path | None = None, name: str = "") -> None:
        """Read the files. With a `ca`, peers show certificates, too, and this one must be good for `name`.

        Raise ValueError, which names the file and says what is wrong.
        """
        self._files = (certificate, key, *([ca] if ca else ()))
        self._name = name
        self._seen = self._stamp()
        self._looked = time.monotonic()
        self._pems = self._read()

    def current(self) -> Pems:
        """Return what the files hold, as of a second ago at most; what they held before where that is no good."""
        now = time.monotonic()
        if now - self._looked >= _LOOK_SECONDS:
            self._looked = now
            try:
                self._look()
            except (OSError, ValueError) as error:
                log.error("the new certificate is no good: the one before it stays", error=str(error))  # noqa: TRY400
        return self._pems

    async def tell_expiry(self) -> None:
        """Warn of a certificate that ends within three weeks."""
        days = (self.current().expires - time.time()) / 86400
        if days * 86400 < _TELL_SECONDS:
            log.warning("a certificate ends soon", file=str(self._files[0]), days=round(days, 1))

    def server_credentials(self) -> grpc.ServerCredentials:
        """Return credentials that show each new peer the current certificate."""
        shown = self.current()

        def look() -> grpc.ServerCertificateConfiguration | None:
            nonlocal shown
            if shown is self.current():
                return None
            shown = self.current()
            return _server_configuration(shown)

        fetch = cast("Callable[[], grpc.ServerCertificateConfiguration]", look)  # None, as it may be: nothing is new
        return grpc.dynamic_ssl_server_credentials(
            _server_configuration(shown), fetch, require_client_authentication=shown.ca is not None
        )

    def _look(self) -> None:
        stamp = self._stamp()
        if stamp == self._seen:
            return
        self._seen = stamp
        self._pems = self._read()
        log.info("certificate read again", file=str(self._files[0]))

    def _stamp(self) -> list[tuple[int, int, int]]:
        """Return what tells whether the files have changed."""
        try:
            states = [path.stat() for path in self._files]
        except OSError as error:
            raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from error
        return [(state.st_mtime_ns, state.st_ino, state.st_size) for state in states]

    def _read(self) -> Pems:
        certificate, key, *authorities = self._files
        require_private(key)
        expires = _examine(certificate, key, authorities[0] if authorities else None, self._name)
        try:
            ca = authorities[0].read_bytes() if authorities else None
            return Pems(certificate.read_bytes(), key.read_bytes(), ca, expires)
        except OSError as error:
            raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from error


def _server_configuration(pems: Pems) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pems.key, pems.certificate)], pems.ca)


def _examine(certificate: Path, key: Path, ca: Path | None, name: str) -> float:
    """Have a client shake hands with a server of these files; return when the certificate ends."""
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        server.load_cert_chain(certificate, key, password="")
    except (ssl.SSLError, OSError) as error:
        raise ValueError(f"{certificate} and {key} are no certificate with its key: {error}") from error
    try:
        client.load_verify_locations(ca or certificate)
    except (ssl.SSLError, OSError) as error:
        raise ValueError(f"{ca or certificate} holds no certificates: {error}") from error
    if ca is None:  # whom its clients believe is not known here
        client.check_hostname = False
        client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking = client.wrap_bio(to_client, to_server, server_hostname=name or None)
    answering = server.wrap_bio(to_server, to_client, server_side=True)
    for end in (asking, answering, asking):
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLCertVerificationError as error:
            believer = f" by who trusts {ca}" if ca else ""
            raise ValueError(f"{certificate} is refused{believer}: {error.verify_message}") from error
    shown = asking.getpeercert() or {}
    return float(ssl.cert_time_to_seconds(str(shown["notAfter"])))


def open_certificate(config: TlsConfig, service: str) -> Certificate | None:
    """Return what a process shows to other services, or None where the configuration names nothing.

    Raise ValueError if it names only a part, or what it names is no good.
    """
    if config.ca is None and config.certificate is None and config.key is None:
        return None
    if config.ca is None or config.certificate is None or config.key is None:
        raise ValueError("tls.ca, tls.certificate and tls.key belong together: set all three")
    return Certificate(config.certificate, config.key, config.ca, certified_name(service))


def require_safe(address: str, what: str, remedy: str, *, insecure: bool) -> None:
    """Raise ValueError if plaintext to an address leaves this host, unless it may; then warn."""
    if is_local(address):
        return
    if not insecure:
        raise ValueError(f"{what} at {address} would not be encrypted: {remedy}")
    log.warning("plaintext leaves this host, as the configuration says", what=what, address=address)
