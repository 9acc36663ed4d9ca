"""Requests to any method, as descriptors tell of them, and what their answers must be like."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar, cast

import grpc
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.support.stack import Failure, failure_of, request_id

PACKAGE = "branchline.v1."
_SECONDS = 60.0

T = TypeVar("T")

CLEAR = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.OUT_OF_RANGE,
    }
)
PASSING = frozenset({"INDEX_BEHIND", "SANDBOX_UNREACHABLE", "NOT_ANSWERED"})
"""Reasons of UNAVAILABLE that a request can bring about."""

LAST = ("ArchiveTask", "KillTask", "DeleteRepository", "DeleteOrganization")
"""Methods that take away what the others are tried on, in this order."""


def reflected(address: str) -> list[MethodDescriptor]:
    """Ask the gateway what it serves."""
    with grpc.insecure_channel(address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        pool = DescriptorPool(database)
        names = [name for name in database.get_services() if name.startswith(PACKAGE)]
        return [method for name in names for method in pool.FindServiceByName(name).methods]


def good(method: MethodDescriptor, given: Mapping[str, Any]) -> Any:
    """Return a request with a good value in every field that has one."""
    request: Any = GetMessageClass(method.input_type)()
    for one in method.input_type.fields:
        value = given.get(f"{method.name}.{one.name}", given.get(one.name))
        if value is not None:
            put(request, one, value() if callable(value) else value)
    return request


def put(message: Any, one: FieldDescriptor, value: Any) -> None:
    """Give a field a value; a map gets what a mapping holds, and None clears it."""
    if value is None:
        message.ClearField(one.name)
    elif isinstance(value, Mapping):
        message.ClearField(one.name)
        getattr(message, one.name).update(value)
    elif one.is_repeated:
        message.ClearField(one.name)
        getattr(message, one.name).extend(value if isinstance(value, list) else [value])
    elif one.message_type is not None:
        getattr(message, one.name).ParseFromString(value.SerializeToString())
    else:
        setattr(message, one.name, value)


async def answered(channel: Any, method: MethodDescriptor, data: bytes, metadata: Any = None) -> Failure | None:
    """Return how a call fails, or None. Of a stream the first answer is enough."""
    return (await exchanged(channel, method, data, metadata))[0]


async def exchanged(
    channel: Any, method: MethodDescriptor, data: bytes, metadata: Any = None
) -> tuple[Failure | None, bytes]:
    """Return how a call fails, or None, and what it answers. Of a stream the first answer is enough."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    try:
        if not method.server_streaming:
            return None, await channel.unary_unary(path)(data, timeout=_SECONDS, metadata=metadata)
        call = (
            channel.stream_stream(path)(iter([data]), timeout=_SECONDS, metadata=metadata)
            if method.client_streaming
            else channel.unary_stream(path)(data, timeout=_SECONDS, metadata=metadata)
        )
        try:
            answer = await call.read()
        finally:
            call.cancel()
        return None, b"" if answer is grpc.aio.EOF else answer
    except grpc.aio.AioRpcError as error:
        return failure_of(error), b""


def unclear(problem: Failure) -> str:
    """Say what is wrong with a refusal; nothing if it is a clear one."""
    said = f"{problem.code.name} {problem.reason}: {problem.message[:200]}"
    passes = problem.code == grpc.StatusCode.UNAVAILABLE and problem.reason in PASSING
    if not passes and (problem.code not in CLEAR or not problem.reason):
        return said
    if problem.code == grpc.StatusCode.INVALID_ARGUMENT and not all(problem.fields or [""]):
        return f"names no field: {said}"
    return ""


def bent(
    message: Any, values: Callable[[Any, FieldDescriptor], Iterable[tuple[T, Any]]]
) -> Iterator[tuple[str, T, Any]]:
    """Yield (path, what, message), each with one field, however deep, given a value; they come as (what, value)."""
    for path, what, copy in _bent(message, values, ""):
        if path != "request_id" and getattr(copy, "request_id", ""):
            copy.request_id = request_id()  # it is another request
        yield path, what, copy


def _bent(
    message: Any, values: Callable[[Any, FieldDescriptor], Iterable[tuple[T, Any]]], within: str
) -> Iterator[tuple[str, T, Any]]:
    for one in cast("list[FieldDescriptor]", message.DESCRIPTOR.fields):
        name = f"{within}{one.name}"
        for what, value in values(message, one):
            copy = _copy(message)
            put(copy, one, value)
            yield name, what, copy
        if one.message_type is None or is_map(one):
            continue
        held = getattr(message, one.name)
        if one.is_repeated and not held:
            continue
        first, deeper = (held[0], f"{name}[0].") if one.is_repeated else (held, f"{name}.")
        for path, what, inner in _bent(first, values, deeper):
            copy = _copy(message)
            place = getattr(copy, one.name)
            (place[0] if one.is_repeated else place).CopyFrom(inner)
            yield path, what, copy


def is_map(one: FieldDescriptor) -> bool:
    return one.message_type is not None and one.message_type.GetOptions().map_entry


def _copy(message: Any) -> Any:
    copy = type(message)()
    copy.CopyFrom(message)
    return copy
