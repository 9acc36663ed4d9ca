"""Asks one service on this host whether it is well, as gRPC's health protocol does: exit code 0 if it serves.

    python -m cli.health SERVICE

Compose runs it every few seconds in each container, so it imports little: 0.15 s, most of it gRPC. The message of the
request is empty, and that of the answer two bytes (https://github.com/grpc/grpc/blob/master/doc/health-checking.md).
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import grpc

from cli.settings import Settings, SettingsError, load_settings
from services.runtime.config import certified_name

_SERVING = b"\x08\x01"
_TIMEOUT_SECONDS = 3.0
_GATEWAY = "gateway"


def check(service: str) -> str:
    """Return why a service is not well, or nothing."""
    settings = load_settings()
    address = settings.addresses.by_name()[service]
    with _channel(settings, service, address) as channel:
        ask = cast("Callable[..., bytes]", channel.unary_unary("/grpc.health.v1.Health/Check"))
        try:
            answer = ask(b"", timeout=_TIMEOUT_SECONDS)
        except grpc.RpcError as error:
            return f"{service} at {address}: {error.code().name} {error.details()}"
    return "" if answer == _SERVING else f"{service} at {address} does not serve"


def _channel(settings: Settings, service: str, address: str) -> grpc.Channel:
    """Open a channel that believes nothing but the service's own certificate, and shows it, too."""
    if service == _GATEWAY:
        gateway = settings.section(_GATEWAY)
        certificate, key = gateway.get("certificate"), gateway.get("key")
    else:
        tls = settings.tls.of(service)
        certificate, key = tls.certificate, tls.key
    if not certificate or not key:
        return grpc.insecure_channel(address)
    shown = Path(certificate).read_bytes()
    name = _name_of(shown) if service == _GATEWAY else certified_name(service)
    credentials = grpc.ssl_channel_credentials(shown, Path(key).read_bytes(), shown)
    return grpc.secure_channel(address, credentials, options=(("grpc.ssl_target_name_override", name),))


def _name_of(certificate: bytes) -> str:
    """Return a name for which a certificate is good."""
    from cryptography import x509  # noqa: PLC0415 - it takes as long as all the rest, and a service does without

    found = x509.load_pem_x509_certificate(certificate).extensions
    names = found.get_extension_for_class(x509.SubjectAlternativeName).value
    return str(next(iter(names)).value)


if __name__ == "__main__":
    try:
        sys.exit(check(sys.argv[1]) or 0)
    except (SettingsError, ValueError, KeyError) as error:
        sys.exit(str(error))
