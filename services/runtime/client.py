"""Channels to other services: keepalive, a deadline on every unary call, the principal in the metadata."""

from collections.abc import Callable
from typing import Any

import grpc

from services.runtime.principal import METADATA_KEY, Signer, principal_or_none

MESSAGE_LIMIT_BYTES = 16 * 1024 * 1024
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
)


class _Signing:
    """Adds the principal to the metadata of a call, and a deadline where there is none."""

    def __init__(self, signer: Signer) -> None:
        self._signer = signer

    def details(self, given: grpc.aio.ClientCallDetails, timeout: float | None) -> grpc.aio.ClientCallDetails:
        metadata = grpc.aio.Metadata(*(given.metadata or ()))
        if METADATA_KEY not in metadata:
            metadata.add(METADATA_KEY, self._signer.sign(principal_or_none()))
        return grpc.aio.ClientCallDetails(
            method=given.method,
            timeout=given.timeout if given.timeout is not None else timeout,
            metadata=metadata,
            credentials=given.credentials,
            wait_for_ready=given.wait_for_ready,
        )


class _UnaryUnary(_Signing, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(
        self, continuation: Callable[..., Any], client_call_details: grpc.aio.ClientCallDetails, request: Any
    ) -> Any:
        return await continuation(self.details(client_call_details, UNARY_TIMEOUT_SECONDS), request)


class _UnaryStream(_Signing, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(
        self, continuation: Callable[..., Any], client_call_details: grpc.aio.ClientCallDetails, request: Any
    ) -> Any:
        return await continuation(self.details(client_call_details, None), request)


class _StreamStream(_Signing, grpc.aio.StreamStreamClientInterceptor):
    async def intercept_stream_stream(
        self, continuation: Callable[..., Any], client_call_details: grpc.aio.ClientCallDetails, request_iterator: Any
    ) -> Any:
        return await continuation(self.details(client_call_details, None), request_iterator)


def open_channel(address: str, signer: Signer) -> grpc.aio.Channel:
    """Open a channel to a service of this installation. It connects by itself, and again after a break."""
    interceptors = [_UnaryUnary(signer), _UnaryStream(signer), _StreamStream(signer)]
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS, interceptors=interceptors)
