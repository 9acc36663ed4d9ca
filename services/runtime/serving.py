"""What happens around every call of every server, as one wrapper made at registration.

Decode, let in, validate, serve; whatever is raised becomes one status with details.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import grpc
from branchline.v1.errors_pb2 import (
    ERROR_REASON_DATABASE_UNAVAILABLE,
    ERROR_REASON_DRAINING,
    ERROR_REASON_INTERNAL,
    ERROR_REASON_REQUEST_MALFORMED,
)
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import status_pb2
from grpc_status import rpc_status

from services.runtime.errors import DomainError, InvalidArgument, Unavailable, without_reason
from services.runtime.logging import get_logger
from services.runtime.validation import validate

log = get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


@dataclass(frozen=True, slots=True)
class Call:
    """One call being served."""

    method: str
    """Full name, such as "/branchline.v1.TaskService/GetTask"."""

    context: Context

    def metadata(self, key: str) -> str:
        """Return a metadata value, or an empty string."""
        for name, value in self.context.invocation_metadata() or ():
            if name == key:
                return value if isinstance(value, str) else value.decode(errors="replace")
        return ""

    def certified_names(self) -> list[str]:
        """Return the names for which the caller's certificate is made."""
        return [name.decode(errors="replace") for name in self.context.auth_context().get("peer_dns", ())]

    def address(self) -> str:
        """Return the address that the call comes from, without its port."""
        return self.context.peer().rpartition(":")[0]


@dataclass(frozen=True, slots=True)
class Given:
    """A request as it came: decoded, and its bytes to be passed on."""

    message: Message
    data: bytes


Decode = Callable[[bytes], "Message | Given"]

Admit = Callable[[Call], Awaitable[None]]
"""Lets a call in, binding who makes it to the running task; raises to refuse it."""


Meter = Callable[[MethodDescriptor, bytes, bool], None]
"""Told of every message that travels: its method, its bytes, and whether it is an answer."""


@dataclass(slots=True)
class Serving:
    """Makes a server's handlers, and ends its streams when it stops."""

    service: str
    admit: Admit
    observers: list[Callable[[str], None]] = field(default_factory=list[Callable[[str], None]])
    """Told the full name of every method that is called."""

    meters: list[Meter] = field(default_factory=list[Meter])
    unready: str = "it is starting"
    """Why the service cannot do anything now; calls are refused with these words while there are some."""

    _streams: set["asyncio.Task[Any]"] = field(default_factory=set["asyncio.Task[Any]"])
    _draining: bool = False

    def handler(
        self, method: MethodDescriptor, serve: Callable[..., Any], *, validated: bool = True, forwards: bool = False
    ) -> Handler:
        """Return the handler of a method; `serve` takes its request (or requests) and the context.

        One that `forwards` takes a `Given`, which holds the request's bytes as well, and may return bytes.
        """
        full_name = f"/{method.containing_service.full_name}/{method.name}"
        decode = self._decoder(method, validated=validated, forwards=forwards)
        encode = self._encoder(method)
        if method.server_streaming:
            wrapped = self._streaming(full_name, serve, decode, many=method.client_streaming)
            if method.client_streaming:
                return grpc.stream_stream_rpc_method_handler(wrapped, None, encode)
            return grpc.unary_stream_rpc_method_handler(wrapped, None, encode)
        return grpc.unary_unary_rpc_method_handler(self._unary(full_name, serve, decode), None, encode)

    def drain(self) -> None:
        """End all streams, so that their clients go elsewhere at once."""
        self._draining = True
        for task in self._streams:
            task.cancel()

    def _require_ready(self) -> None:
        if self.unready:
            sentence = f"{self.service} has no database to work with: {self.unready}"
            raise Unavailable(ERROR_REASON_DATABASE_UNAVAILABLE, sentence)

    def _unary(self, name: str, serve: Callable[..., Any], decode: Decode) -> Callable[..., Any]:
        async def wrapped(data: bytes, context: Context) -> Any:
            call, started = Call(name, context), time.monotonic()
            try:
                for observe in self.observers:
                    observe(name)
                self._require_ready()
                await self.admit(call)
                answer = await serve(decode(data), context)
            except BaseException as error:
                await self._fail(call, error, started)
                raise
            log.debug("call", service=self.service, method=name, outcome="OK", elapsed_ms=_elapsed_ms(started))
            return answer

        return wrapped

    def _streaming(self, name: str, serve: Callable[..., Any], decode: Decode, *, many: bool) -> Callable[..., Any]:
        async def wrapped(given: Any, context: Context) -> AsyncIterator[Any]:
            call, started = Call(name, context), time.monotonic()
            task = asyncio.current_task()
            assert task is not None
            self._streams.add(task)
            try:
                for observe in self.observers:
                    observe(name)
                self._require_ready()
                await self.admit(call)
                requests = _decoded(given, decode) if many else decode(given)
                async with aclosing(serve(requests, context)) as answers:
                    async for answer in answers:
                        yield answer
            except asyncio.CancelledError as error:
                if not self._draining:
                    raise
                stopping = Unavailable(ERROR_REASON_DRAINING, "the service stops; connect again")
                await self._fail(call, stopping, started)
                raise stopping from error
            except GeneratorExit:
                raise
            except BaseException as error:
                await self._fail(call, error, started)
                raise
            finally:
                self._streams.discard(task)

        return wrapped

    def _decoder(self, method: MethodDescriptor, *, validated: bool, forwards: bool) -> Decode:
        request = GetMessageClass(method.input_type)

        def decode(data: bytes) -> Message | Given:
            for meter in self.meters:
                meter(method, data, False)
            try:
                message = request.FromString(data)
            except (DecodeError, ValueError) as error:
                words = f"is no {method.input_type.name}: its bytes cannot be decoded"
                raise InvalidArgument("request", words, ERROR_REASON_REQUEST_MALFORMED) from error
            if validated:
                validate(message)
            if not forwards:
                return message
            message.DiscardUnknownFields()  # what nobody knows has no bounds: it would be stored, and shown to others
            return Given(message, message.SerializeToString())

        return decode

    def _encoder(self, method: MethodDescriptor) -> Callable[[Message | bytes], bytes]:
        def encode(answer: Message | bytes) -> bytes:
            data = answer if isinstance(answer, bytes) else answer.SerializeToString()
            for meter in self.meters:
                meter(method, data, True)
            return data

        return encode

    async def _fail(self, call: Call, error: BaseException, started: float) -> None:
        """Abort the call with the status of an error, unless it is no error of the call."""
        if isinstance(error, asyncio.CancelledError | grpc.aio.AbortError | grpc.aio.UsageError):
            return
        outcome = f"{error.code.name} {error.reason}" if isinstance(error, DomainError) else type(error).__name__
        elapsed = _elapsed_ms(started)
        log.debug("call", service=self.service, method=call.method, outcome=outcome, elapsed_ms=elapsed)
        await call.context.abort_with_status(rpc_status.to_status(status_of(error, call.method)))


def status_of(error: BaseException, method: str) -> status_pb2.Status:
    """Return an error as clients see it. What nobody foresaw is logged and shown without its words."""
    if isinstance(error, DomainError):
        return error.to_status()
    if isinstance(error, grpc.aio.AioRpcError):
        passed_on = rpc_status.from_call(error)
        if passed_on is not None:
            return passed_on
        log.warning("call inside failed", method=method, code=error.code().name, words=error.details())
        return without_reason(error).to_status()
    log.error("call failed", method=method, exc_info=error)
    unknown = DomainError(ERROR_REASON_INTERNAL, "something went wrong inside; the server's log has it")
    return unknown.to_status()


def implemented(servicer: object, method: str) -> Callable[..., Any] | None:
    """Return a servicer's own method, or None where it has only the generated one."""
    found = getattr(servicer, method, None)
    return None if found is None or found.__module__.endswith("_pb2_grpc") else found


async def _decoded(given: AsyncIterator[bytes], decode: Decode) -> AsyncIterator[Message | Given]:
    async for data in given:
        yield decode(data)


def _elapsed_ms(started: float) -> float:
    return round((time.monotonic() - started) * 1000, 1)
