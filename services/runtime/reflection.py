"""Server reflection, in both versions that clients ask for: they differ by their package alone.

The library brings `grpc.reflection.v1alpha`; newer clients look for `grpc.reflection.v1` first.
Source: https://github.com/grpc/grpc/blob/master/doc/server-reflection.md
"""

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import grpc
from google.protobuf import descriptor_pool, text_format
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection, reflection_pb2

V1 = "grpc.reflection.v1.ServerReflection"
_METHOD = "ServerReflectionInfo"


class _Pool:
    """The default pool, in which methods and values of enums are found by their full names, too."""

    def __getattr__(self, name: str) -> Any:
        return getattr(descriptor_pool.Default(), name)

    def FindFileContainingSymbol(self, symbol: str) -> FileDescriptor:
        """Return the file that declares a symbol; raise KeyError."""
        pool: Any = descriptor_pool.Default()
        with suppress(KeyError):
            return pool.FindFileContainingSymbol(symbol)
        with suppress(KeyError):
            return pool.FindMethodByName(symbol).containing_service.file
        parent, _, name = symbol.rpartition(".")
        return pool.FindEnumTypeByName(parent).values_by_name[name].type.file


def add_reflection(server: grpc.aio.Server, services: Iterable[str]) -> None:
    """Have a server tell of its services."""
    _describe_v1()
    servicer: Any = reflection.aio.ReflectionServicer([*services, reflection.SERVICE_NAME, V1], pool=_Pool())
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    for name in (reflection.SERVICE_NAME, V1):
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, {_METHOD: handler}),))


def _describe_v1() -> None:
    """Make the newer version's descriptor, which is the older one's with another name."""
    older = FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(older)
    newer = text_format.Parse(text_format.MessageToString(older).replace("v1alpha", "v1"), FileDescriptorProto())
    descriptor_pool.Default().Add(newer)  # again and again is no error
