"""Channels to other services: keepalive, a deadline on every unary call, the principal in the metadata."""

from collections.abc import Callable
from typing import Any, cast

import grpc

from services.runtime.principal import Signer, principal_or_none

MESSAGE_LIMIT_BYTES = 4 * 1024 * 1024
"""No message is larger: frames, pages and batches end at 1 MiB, after at least one entity."""

UNARY_TIMEOUT_SECONDS = 30.0

CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.max_receive_message_length", MESSAGE_LIMIT_BYTES),
    ("grpc.max_send_message_length", MESSAGE_LIMIT_BYTES),
    ("grpc.default_authority", "localhost"),  # a socket's path is none
)


class SigningChannel:
    """A channel for generated stubs: each call carries the principal, and a unary one a deadline."""

    def __init__(self, channel: grpc.aio.Channel, signer: Signer) -> None:
        self.raw = channel
        self._signer = signer

    async def close(self) -> None:
        """Close the channel."""
        await self.raw.close()

    def unary_unary(self, method: str, *coders: Any, **options: Any) -> Callable[..., Any]:
        """Make a unary call."""
        call = cast("Any", self.raw.unary_unary(method, *coders, **options))

        def make(request: Any, *, timeout: float | None = None, metadata: Any = None, **rest: Any) -> Any:
            seconds = UNARY_TIMEOUT_SECONDS if timeout is None else timeout  # a caller without a deadline leaves None
            return call(request, timeout=seconds, metadata=metadata or self._metadata(), **rest)

        return make

    def unary_stream(self, method: str, *coders: Any, **options: Any) -> Callable[..., Any]:
        """Make a call whose answers stream."""
        call = cast("Any", self.raw.unary_stream(method, *coders, **options))

        def make(request: Any, *, metadata: Any = None, **rest: Any) -> Any:
            return call(request, metadata=metadata or self._metadata(), **rest)

        return make

    def stream_stream(self, method: str, *coders: Any, **options: Any) -> Callable[..., Any]:
        """Make a call that streams both ways."""
        call = cast("Any", self.raw.stream_stream(method, *coders, **options))

        def make(requests: Any = None, *, metadata: Any = None, **rest: Any) -> Any:
            return call(requests, metadata=metadata or self._metadata(), **rest)

        return make

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return self._signer.metadata(principal_or_none())


def open_channel(address: str, signer: Signer) -> SigningChannel:
    """Open a channel to a service of this installation. It connects by itself, and again after a break."""
    return SigningChannel(grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS), signer)
