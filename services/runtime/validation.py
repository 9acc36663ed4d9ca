"""What every request must satisfy: the protovalidate rules of the contract, and what no store could take.

protobuf decodes any number as a time and any text; here times and durations are held to the range of their types
(google/protobuf/timestamp.proto and duration.proto), text to what PostgreSQL stores, and what has no rule to its size.
"""

import math
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import protovalidate
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import ListValue, Struct, Value
from google.protobuf.timestamp_pb2 import Timestamp
from protovalidate import Violation

from services.runtime import limits
from services.runtime.clock import EARLIEST_SECONDS, LATEST_SECONDS
from services.runtime.errors import InvalidArgument

_DURATION_SECONDS = 315_576_000_000
_NANOS = 999_999_999

_validator = protovalidate.Validator()


def validate(message: Message) -> None:
    """Raise InvalidArgument naming every field that breaks a rule."""
    violations = list(_unfit(message, ""))
    if not violations:  # protovalidate itself breaks at times out of range
        violations = [(_path(found), found.proto.message) for found in _validator.collect_violations(message)]
    if violations:
        error = InvalidArgument(violations[0][0] or "request", violations[0][1])
        error.violations = violations
        raise error


def _path(violation: Violation) -> str:
    path = violation.proto.field
    return ".".join(element.field_name for element in path.elements) if path else ""


def _unfit(message: Message, within: str) -> Iterator[tuple[str, str]]:
    """Yield (field, words) for every value that is out of the range of its type, however deep."""
    for field in _looked_at(message.DESCRIPTOR):
        name = f"{within}{field.name}"
        most = limits.SUMS.get(field.full_name)
        if most is not None and _size(message, field) > most:
            yield name, f"must have at most {most} bytes"
        for value in _values(message, field):
            if isinstance(value, str):
                if "\0" in value:
                    yield name, "must not hold the character U+0000"
            elif isinstance(value, Timestamp):
                if not (EARLIEST_SECONDS <= value.seconds <= LATEST_SECONDS and 0 <= value.nanos <= _NANOS):
                    yield name, "must be a time from the year 1 to the year 9999"
            elif isinstance(value, Duration):
                if not _is_duration(value):
                    yield name, "must be a duration of at most 10000 years"
            else:
                yield from _too_large(value, name)
                yield from _malformed(value, name) if isinstance(value, Struct) else _unfit(value, f"{name}.")


def _too_large(value: Message, name: str) -> Iterator[tuple[str, str]]:
    most = limits.TYPES.get(value.DESCRIPTOR.full_name)
    if most is not None and value.ByteSize() > most:
        yield name, f"must have at most {most} bytes"


def _malformed(struct: Struct, name: str) -> Iterator[tuple[str, str]]:
    """Yield what keeps a struct from being JSON that every decoder takes."""
    left: list[tuple[Message, int]] = [(struct, 1)]
    while left:
        holder, depth = left.pop()
        if depth > limits.STRUCT_DEPTH:
            yield name, f"must not be nested deeper than {limits.STRUCT_DEPTH} levels"
            return
        held: Iterable[Value]
        if isinstance(holder, Struct):
            held = holder.fields.values()
            if any("\0" in key for key in holder.fields):
                yield name, "must not hold the character U+0000"
        else:
            assert isinstance(holder, ListValue)
            held = holder.values
        for value in held:
            match value.WhichOneof("kind"):
                case None:
                    yield name, "must not hold a value of no kind"
                case "number_value" if not math.isfinite(value.number_value):
                    yield name, "must hold finite numbers"
                case "string_value" if "\0" in value.string_value:
                    yield name, "must not hold the character U+0000"
                case "struct_value":
                    left.append((value.struct_value, depth + 1))
                case "list_value":
                    left.append((value.list_value, depth + 1))
                case _:
                    pass


def _size(message: Message, field: FieldDescriptor) -> int:
    """Return how many bytes a repeated field has with all its elements."""
    alone = type(message)()
    getattr(alone, field.name).MergeFrom(getattr(message, field.name))
    return alone.ByteSize()


def _values(message: Message, field: FieldDescriptor) -> Iterator[Any]:
    """Yield what is set in a field: the one value, each of a list, the keys and values of a map."""
    value = getattr(message, field.name)
    if not field.is_repeated:
        if field.message_type is None or message.HasField(field.name):
            yield value
    elif _is_map(field):
        yield from (key for key in value if isinstance(key, str))
        yield from (held for held in value.values() if isinstance(held, str | Message))
    else:
        yield from value


@cache
def _looked_at(descriptor: Descriptor) -> tuple[FieldDescriptor, ...]:
    return tuple(field for field in descriptor.fields if _concerns(field, frozenset()))


def _concerns(field: FieldDescriptor, above: frozenset[str]) -> bool:
    """Say whether a field can hold text, a time or a duration, itself or within."""
    inner = field.message_type
    if inner is None:
        return field.type == FieldDescriptor.TYPE_STRING
    if inner.full_name in {Timestamp.DESCRIPTOR.full_name, Duration.DESCRIPTOR.full_name}:
        return True
    return inner.full_name not in above and any(_concerns(one, above | {inner.full_name}) for one in inner.fields)


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _is_duration(value: Duration) -> bool:
    signs_agree = value.seconds * value.nanos >= 0
    return abs(value.seconds) <= _DURATION_SECONDS and abs(value.nanos) <= _NANOS and signs_agree
