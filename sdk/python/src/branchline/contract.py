"""What the contract says in words: the comments of its services, methods, messages, fields and values.

They come from `contract.binpb`, the descriptors of `branchline.v1` with their source information, which `make generate`
writes.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.descriptor_pb2 import DescriptorProto, EnumDescriptorProto, FileDescriptorProto, FileDescriptorSet

PACKAGE = "branchline.v1"

_SERVICE, _MESSAGE, _ENUM = 6, 4, 5  # numbers of the fields of FileDescriptorProto that hold them
_METHOD, _FIELD, _NESTED, _NESTED_ENUM, _VALUE = 2, 2, 3, 4, 2
Place = tuple[int, ...]
"""Where a thing stands in its file, in the field numbers and places of `SourceCodeInfo.Location.path`."""


def words(thing: ServiceDescriptor | MethodDescriptor | Descriptor | FieldDescriptor | EnumDescriptor) -> str:
    """Return what is written above a thing of the contract, on one line; empty if nothing is."""
    return _shipped().get(thing.full_name, "")


@cache
def _shipped() -> Mapping[str, str]:
    content = Path(__file__).with_name("contract.binpb").read_bytes()
    return {name: text for file in public_files(content) for name, text in _named(file)}


def public_files(descriptors: bytes) -> Sequence[FileDescriptorProto]:
    """Return the files of the contract in a serialized `FileDescriptorSet`, by name."""
    files = FileDescriptorSet.FromString(descriptors).file
    return sorted((file for file in files if file.package == PACKAGE), key=lambda file: file.name)


def comments(file: FileDescriptorProto) -> dict[Place, str]:
    """Return the comments of a file with source information, each on one line, by the place of what they are about."""
    found = {tuple(one.path): one.leading_comments for one in file.source_code_info.location if one.leading_comments}
    return {path: re.sub(r"\s*\n\s*", " ", text.strip()) for path, text in found.items()}


def _named(file: FileDescriptorProto) -> Iterator[tuple[str, str]]:
    said = comments(file)
    for place, name in _places(file):
        if place in said:
            yield name, said[place]


def _places(file: FileDescriptorProto) -> Iterator[tuple[Place, str]]:
    for number, service in enumerate(file.service):
        name = f"{file.package}.{service.name}"
        yield (_SERVICE, number), name
        yield from (((_SERVICE, number, _METHOD, one), f"{name}.{it.name}") for one, it in enumerate(service.method))
    for number, message in enumerate(file.message_type):
        yield from _in_message((_MESSAGE, number), file.package, message)
    for number, enum in enumerate(file.enum_type):
        yield from _in_enum((_ENUM, number), file.package, enum)


def _in_message(place: Place, within: str, message: DescriptorProto) -> Iterator[tuple[Place, str]]:
    name = f"{within}.{message.name}"
    yield place, name
    yield from (((*place, _FIELD, one), f"{name}.{it.name}") for one, it in enumerate(message.field))
    for number, nested in enumerate(message.nested_type):
        yield from _in_message((*place, _NESTED, number), name, nested)
    for number, enum in enumerate(message.enum_type):
        yield from _in_enum((*place, _NESTED_ENUM, number), name, enum)


def _in_enum(place: Place, within: str, enum: EnumDescriptorProto) -> Iterator[tuple[Place, str]]:
    name = f"{within}.{enum.name}"
    yield place, name
    yield from (((*place, _VALUE, one), f"{name}.{it.name}") for one, it in enumerate(enum.value))
