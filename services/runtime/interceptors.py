"""What happens around every call of every server: errors, logging, principal, validation."""

import asyncio
import time
from abc import ABC
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
from google.protobuf.message import Message
from google.rpc import status_pb2
from grpc_status import rpc_status

from services.runtime.errors import DomainError, Unavailable
from services.runtime.principal import METADATA_KEY, Signer, bind_principal
from services.runtime.validation import validate

log = structlog.get_logger()

OPEN_SERVICES = ("/grpc.health.v1.Health/", "/grpc.reflection.")
"""Methods with these beginnings answer without a principal or token."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call being served."""

    method: str
    context: grpc.aio.ServicerContext[Any, Any]
    streaming: bool = False

    @property
    def is_open(self) -> bool:
        """Say whether anybody may make it."""
        return self.method.startswith(OPEN_SERVICES)

    def metadata(self, key: str) -> str:
        """Return a metadata value, or an empty string."""
        for name, value in self.context.invocation_metadata() or ():
            if name == key:
                return value if isinstance(value, str) else value.decode()
        return ""


class AroundInterceptor(grpc.aio.ServerInterceptor, ABC):
    """Runs code around each call, whether its sides stream or not."""

    def around(self, call: Call) -> AbstractAsyncContextManager[None]:
        """Return a context that the call runs in."""
        return nullcontext()

    def check(self, call: Call, request: Message) -> None:
        """Look at a request message; raise to refuse it."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the handler of the method."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        coders = (handler.request_deserializer, handler.response_serializer)
        if handler.response_streaming:
            if handler.request_streaming:
                wrapped = self._streaming(method, handler.stream_stream, checked=False)
                return grpc.stream_stream_rpc_method_handler(wrapped, *coders)
            wrapped = self._streaming(method, handler.unary_stream, checked=True)
            return grpc.unary_stream_rpc_method_handler(wrapped, *coders)
        if handler.request_streaming:
            wrapped = self._unary(method, handler.stream_unary, checked=False)
            return grpc.stream_unary_rpc_method_handler(wrapped, *coders)
        return grpc.unary_unary_rpc_method_handler(self._unary(method, handler.unary_unary, checked=True), *coders)

    def _unary(self, method: str, serve: Callable[..., Any], *, checked: bool) -> Callable[..., Any]:
        async def wrapped(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            call = Call(method, context)
            async with self.around(call):
                if checked:
                    self.check(call, request)
                return await serve(request, context)

        return wrapped

    def _streaming(self, method: str, serve: Callable[..., Any], *, checked: bool) -> Callable[..., Any]:
        async def wrapped(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            call = Call(method, context, streaming=True)
            async with self.around(call):
                if checked:
                    self.check(call, request)
                served = serve(request, context)
                if not hasattr(served, "__aiter__"):
                    await served  # a handler in the style that writes to the context
                    return
                async for response in served:
                    yield response

        return wrapped


class ErrorInterceptor(AroundInterceptor):
    """Turns domain errors, and errors of calls made on the way, into one status with details."""

    @asynccontextmanager
    async def around(self, call: Call) -> AsyncGenerator[None, None]:
        """Abort the call with the status of what it raises."""
        try:
            yield
        except DomainError as error:
            await call.context.abort_with_status(rpc_status.to_status(error.to_status()))
        except grpc.aio.AioRpcError as error:
            passed_on = rpc_status.from_call(error)  # pyright: ignore[reportArgumentType]
            if passed_on is None:
                passed_on = status_pb2.Status(code=error.code().value[0], message=error.details() or "")
            await call.context.abort_with_status(rpc_status.to_status(passed_on))
        except (grpc.aio.AbortError, grpc.aio.UsageError):
            raise
        except Exception:
            log.exception("call failed", method=call.method)
            unknown = DomainError("INTERNAL", "something went wrong inside; the server's log has it")
            await call.context.abort_with_status(rpc_status.to_status(unknown.to_status()))


class LoggingInterceptor(AroundInterceptor):
    """Logs each call with its method, time and outcome."""

    def __init__(self, service: str) -> None:
        self._service = service

    @asynccontextmanager
    async def around(self, call: Call) -> AsyncGenerator[None, None]:
        """Log when the call ends."""
        started = time.monotonic()
        outcome = "OK"
        try:
            yield
        except DomainError as error:
            outcome = f"{error.code.name} {error.reason}"
            raise
        except BaseException as error:
            outcome = type(error).__name__
            raise
        finally:
            elapsed_ms = round((time.monotonic() - started) * 1000, 1)
            log.debug("call", service=self._service, method=call.method, outcome=outcome, elapsed_ms=elapsed_ms)


class DrainInterceptor(AroundInterceptor):
    """Ends long-lived streams when the service stops, so that their clients go elsewhere at once."""

    def __init__(self) -> None:
        self._streams: set[asyncio.Task[Any]] = set()
        self._draining = False

    @asynccontextmanager
    async def around(self, call: Call) -> AsyncGenerator[None, None]:
        """Keep track of a stream for its length."""
        task = asyncio.current_task()
        if not call.streaming or task is None:
            yield
            return
        self._streams.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if not self._draining:
                raise
            raise Unavailable("DRAINING", "the service stops; connect again") from None
        finally:
            self._streams.discard(task)

    def drain(self) -> None:
        """End all streams."""
        self._draining = True
        for task in self._streams:
            task.cancel()


class PrincipalInterceptor(AroundInterceptor):
    """Lets in only calls that carry a principal signed by one of our own."""

    def __init__(self, signer: Signer) -> None:
        self._signer = signer

    @asynccontextmanager
    async def around(self, call: Call) -> AsyncGenerator[None, None]:
        """Bind the principal for the length of the call."""
        if not call.is_open:
            bind_principal(self._signer.verify(call.metadata(METADATA_KEY)))
        yield


class ValidationInterceptor(AroundInterceptor):
    """Enforces the protovalidate rules of request messages."""

    def check(self, call: Call, request: Message) -> None:
        """Raise InvalidArgument if the request breaks a rule."""
        if not call.is_open:
            validate(request)
