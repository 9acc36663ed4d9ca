"""Requests to any method, as descriptors tell of them."""

from collections.abc import Mapping
from typing import Any

import grpc
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

PACKAGE = "branchline.v1."


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
    if one.is_repeated and one.message_type is not None and one.message_type.GetOptions().map_entry:
        return
    if one.is_repeated:
        message.ClearField(one.name)
        getattr(message, one.name).extend(value if isinstance(value, list) else [value])
    elif one.message_type is not None:
        getattr(message, one.name).ParseFromString(value.SerializeToString())
    else:
        setattr(message, one.name, value)
