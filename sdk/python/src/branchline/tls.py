"""How a connection is kept safe: TLS to anything but this host, and what is wrong where it does not come about."""

import asyncio
import ipaddress
import logging
import ssl
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import grpc

from branchline.errors import BranchlineError

_LOG = logging.getLogger("branchline")
_LOOK_SECONDS = 5.0


class TlsFault(StrEnum):
    """Why client and server cannot talk in safety."""

    UNKNOWN_AUTHORITY = "unknown_authority"
    EXPIRED = "expired"
    NOT_YET_VALID = "not_yet_valid"
    WRONG_NAME = "wrong_name"
    NO_TLS = "no_tls"
    """The server speaks plaintext, the client TLS."""
    TLS_REQUIRED = "tls_required"
    """The server speaks TLS, the client plaintext."""
    UNTRUSTED = "untrusted"
    """The certificate is refused for another reason, which the message says."""


_WORDS = {
    TlsFault.UNKNOWN_AUTHORITY: "its certificate is signed by an authority that is not trusted here",
    TlsFault.EXPIRED: "its certificate has expired",
    TlsFault.NOT_YET_VALID: "its certificate is not valid yet",
    TlsFault.WRONG_NAME: "its certificate is made for another name",
    TlsFault.NO_TLS: "it speaks plaintext, and this client TLS",
    TlsFault.TLS_REQUIRED: "it speaks TLS, and this client plaintext",
    TlsFault.UNTRUSTED: "its certificate is refused",
}

_CODES = {  # https://docs.openssl.org/master/man3/X509_STORE_CTX_get_error/
    9: TlsFault.NOT_YET_VALID,
    10: TlsFault.EXPIRED,
    18: TlsFault.UNKNOWN_AUTHORITY,
    19: TlsFault.UNKNOWN_AUTHORITY,
    20: TlsFault.UNKNOWN_AUTHORITY,
    21: TlsFault.UNKNOWN_AUTHORITY,
    62: TlsFault.WRONG_NAME,
    64: TlsFault.WRONG_NAME,
}


class TlsError(BranchlineError):
    """The server is there, and its certificate, or plaintext where TLS was wanted, keeps the two from talking."""

    def __init__(self, address: str, fault: TlsFault, words: str = "") -> None:
        super().__init__(grpc.StatusCode.UNAVAILABLE, f"{address}: {_WORDS[fault]}" + (f" ({words})" if words else ""))
        self.fault = fault
        """What is wrong, for machines."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a server is, and how it is spoken to."""

    address: str
    secure: bool
    roots: bytes | None = None
    """Authorities that are believed, as PEM; None stands for those of the system."""

    def open(self, options: tuple[tuple[str, int], ...]) -> grpc.aio.Channel:
        """Open a channel."""
        if not self.secure:
            return grpc.aio.insecure_channel(self.address, options=options)
        credentials = grpc.ssl_channel_credentials(self.roots or _system_roots())
        return grpc.aio.secure_channel(self.address, credentials, options=options)

    async def fault(self, seconds: float | None = None) -> TlsError | None:
        """Say what keeps a connection from being made, if it is certificates or their want, and is seen within a time.

        Nobody waits for it longer than 5 seconds.
        """
        if self.address.startswith("unix:"):
            return None
        context = ssl.create_default_context(cadata=self.roots.decode() if self.roots else None)
        if not self.secure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        try:
            async with asyncio.timeout(_LOOK_SECONDS if seconds is None else min(seconds, _LOOK_SECONDS)):
                await _shake_hands(self.address, context)
        except ssl.SSLCertVerificationError as error:
            return TlsError(self.address, _CODES.get(error.verify_code, TlsFault.UNTRUSTED), error.verify_message)
        except ssl.SSLError:
            return TlsError(self.address, TlsFault.NO_TLS) if self.secure else None
        except (OSError, TimeoutError):
            return None
        return None if self.secure else TlsError(self.address, TlsFault.TLS_REQUIRED)


def endpoint(address: str, ca: Path | str | None = None, *, insecure: bool | None = None) -> Endpoint:
    """Return how a server is spoken to: TLS, unless it is on this host and no `ca` is given, or `insecure` says so.

    Raise ValueError for a file without certificates.
    """
    secure = not insecure if insecure is not None else ca is not None or not is_local(address)
    if not secure:
        if ca is not None:
            raise ValueError("a connection without TLS has no use for a CA: leave out one of the two")
        if not is_local(address):
            _LOG.warning("the connection to %s is not encrypted: whoever is between reads the token", address)
        return Endpoint(address, secure=False)
    if ca is None:
        return Endpoint(address, secure=True)
    try:
        roots = Path(ca).read_bytes()
        ssl.create_default_context(cadata=roots.decode())
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ValueError(f"{ca} holds no certificates of authorities: {error}") from error
    return Endpoint(address, secure=True, roots=roots)


def is_local(address: str) -> bool:
    """Say whether an address is on this host, where nobody is between."""
    if address.startswith("unix:"):
        return True
    host = _split(address)[0]
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        host, port = address, "443"
    return host.removeprefix("[").removesuffix("]"), int(port)


async def _shake_hands(address: str, context: ssl.SSLContext) -> None:
    host, port = _split(address)
    context.set_alpn_protocols(["h2"])
    _, writer = await asyncio.open_connection(host, port, ssl=context)
    writer.close()


def _system_roots() -> bytes | None:
    """Return the authorities that this system trusts, as PEM; None, which is gRPC's own list, where it names none.

    gRPC brings a list and would not look (https://grpc.github.io/grpc/python/grpc.html#grpc.ssl_channel_credentials).
    """
    paths = ssl.get_default_verify_paths()
    if paths.cafile:
        return Path(paths.cafile).read_bytes()
    hashed = sorted(Path(paths.capath).glob("*.[0-9]")) if paths.capath else []
    if hashed:
        return b"\n".join(path.read_bytes() for path in hashed)
    loaded = ssl.create_default_context().get_ca_certs(binary_form=True)  # Windows
    return "".join(map(ssl.DER_cert_to_PEM_cert, loaded)).encode() or None
