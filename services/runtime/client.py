"""Channels to other services: keepalive, a deadline on every unary call, the principal in the metadata.

Off this host they are TLS: the other end must be the service that was meant, and sees who calls.
"""

from collections.abc import Callable, Mapping
from typing import Any

import grpc

from services.runtime.config import Secret, TlsConfig, certified_name
from services.runtime.principal import Metadata, Principal, Signer, principal_or_none
from services.runtime.tls import Certificate, Pems, open_certificate, require_safe

MESSAGE_LIMIT_BYTES = 4 * 1024 * 1024
"""No message is larger: frames, pages and batches end at 1 MiB, after at least one entity."""

UNARY_TIMEOUT_SECONDS = 30.0

REMEDY = "set tls.ca, tls.certificate and tls.key (see `branchline certs`), or tls.insecure = true on a trusted network"
"""What to do where services would speak plaintext off their host."""

CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.max_receive_message_length", MESSAGE_LIMIT_BYTES),
    ("grpc.max_send_message_length", MESSAGE_LIMIT_BYTES),
)

Opener = Callable[[], grpc.aio.Channel]
"""Returns the channel for a call that begins: the same one, until its certificate has changed."""


class SigningChannel:
    """A channel for generated stubs: each call carries the principal, and a unary one a deadline."""

    def __init__(self, service: str, current: Opener, signer: Signer) -> None:
        """`service` is the one at the other end."""
        self._service = service
        self._current = current
        self._signer = signer

    async def close(self) -> None:
        """Close the channel."""
        await self._current().close()

    def metadata(self, principal: Principal | None = None) -> Metadata:
        """Return a call's metadata for the principal, that of the running call, or the service itself."""
        return self._signer.metadata(self._service, principal or principal_or_none())

    def unary_unary(self, method: str, *coders: Any, **options: Any) -> Callable[..., Any]:
        """Make a unary call."""
        call = self._callable("unary_unary", method, *coders, **options)

        def make(request: Any, *, timeout: float | None = None, metadata: Any = None, **rest: Any) -> Any:
            seconds = UNARY_TIMEOUT_SECONDS if timeout is None else timeout  # a caller without a deadline leaves None
            return call()(request, timeout=seconds, metadata=metadata or self.metadata(), **rest)

        return make

    def unary_stream(self, method: str, *coders: Any, **options: Any) -> Callable[..., Any]:
        """Make a call whose answers stream."""
        call = self._callable("unary_stream", method, *coders, **options)

        def make(request: Any, *, metadata: Any = None, **rest: Any) -> Any:
            return call()(request, metadata=metadata or self.metadata(), **rest)

        return make

    def stream_stream(self, method: str, *coders: Any, **options: Any) -> Callable[..., Any]:
        """Make a call that streams both ways."""
        call = self._callable("stream_stream", method, *coders, **options)

        def make(requests: Any = None, *, metadata: Any = None, **rest: Any) -> Any:
            return call()(requests, metadata=metadata or self.metadata(), **rest)

        return make

    def _callable(self, kind: str, method: str, *coders: Any, **options: Any) -> Callable[[], Any]:
        """Return what gives a method's callable of the current channel."""
        made: tuple[grpc.aio.Channel, Any] | None = None

        def current() -> Any:
            nonlocal made
            channel = self._current()
            if made is None or made[0] is not channel:
                made = channel, getattr(channel, kind)(method, *coders, **options)
            return made[1]

        return current


def open_channel(service: str, address: str, signer: Signer, certificate: Certificate | None = None) -> SigningChannel:
    """Open a channel to a service of this installation. It connects by itself, and again after a break.

    With a certificate it is TLS, and opened anew when the certificate has changed; what runs on the old one goes on.
    """
    if certificate is None or address.startswith("unix:"):
        plain = grpc.aio.insecure_channel(address, options=(*CHANNEL_OPTIONS, _named("localhost")))
        return SigningChannel(service, lambda: plain, signer)
    name = certified_name(service)
    options = (*CHANNEL_OPTIONS, _named(name), ("grpc.ssl_target_name_override", name))
    made: tuple[Pems, grpc.aio.Channel] | None = None

    def current() -> grpc.aio.Channel:
        nonlocal made
        pems = certificate.current()
        if made is None or made[0] is not pems:
            credentials = grpc.ssl_channel_credentials(pems.ca, pems.key, pems.certificate)
            made = pems, grpc.aio.secure_channel(address, credentials, options=options)
        return made[1]

    return SigningChannel(service, current, signer)


def _named(authority: str) -> tuple[str, str]:
    """Return who the other end is called in HTTP: a socket's path is no name."""
    return "grpc.default_authority", authority


class Neighbours:
    """The other services of the installation, as one of them reaches them."""

    def __init__(self, service: str, addresses: Mapping[str, str], signing_key: Secret, tls: TlsConfig) -> None:
        """`service` is the one that calls. Raise ValueError if what it shows the others is no good."""
        self.signer = Signer(signing_key.value, service)
        self.certificate = open_certificate(tls, service)
        """What it shows the others; None where it speaks plaintext."""
        self._addresses = addresses
        self._insecure = tls.insecure

    def open(self, service: str) -> SigningChannel:
        """Open a channel to a service. Raise ValueError if that would be plaintext, and it may not be."""
        address = self._addresses[service]
        if self.certificate is None:
            require_safe(address, f"calls of {service}", REMEDY, insecure=self._insecure)
        return open_channel(service, address, self.signer, self.certificate)
