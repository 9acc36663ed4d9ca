"""Any message of the contract, as hypothesis makes it up: boundary numbers, odd words, times out of range."""

from typing import Any, TypeVar, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

M = TypeVar("M", bound=Message)

_DEPTH = 3
_INT32, _INT64 = 2**31, 2**63
_INTEGERS = {
    FieldDescriptor.TYPE_INT32: st.sampled_from([0, 1, -1, 7, _INT32 - 1, -_INT32]),
    FieldDescriptor.TYPE_INT64: st.sampled_from([0, 1, -1, 7, 253402300800, _INT64 - 1, -_INT64]),
    FieldDescriptor.TYPE_UINT32: st.sampled_from([0, 1, 2**32 - 1]),
    FieldDescriptor.TYPE_UINT64: st.sampled_from([0, 1, 2**64 - 1]),
}
_WORDS = st.sampled_from(["", "a", "org_1", "task_1", "é\u0000\u202e", "'; DROP TABLE tasks; --", "x" * 5000])


def messages(message: type[M]) -> st.SearchStrategy[M]:
    """Return messages of a type, with any of their fields set."""
    return _messages(cast("Descriptor", message.DESCRIPTOR), _DEPTH)


def _messages(descriptor: Descriptor, depth: int) -> st.SearchStrategy[Any]:
    made = GetMessageClass(descriptor)
    fields = {
        field.name: strategy
        for field in descriptor.fields
        if (strategy := _values(field, depth)) is not None and field.containing_oneof is None
    }

    def build(values: dict[str, Any]) -> Message:
        return made(**values)

    return st.fixed_dictionaries({}, optional=fields).map(build)


def _values(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any] | None:
    one = _value(field, depth)
    if one is None:
        return None
    if field.is_repeated:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            return st.dictionaries(_WORDS, _WORDS, max_size=2)
        return st.lists(one, max_size=2)
    return one


def _value(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any] | None:
    if field.type in _INTEGERS:
        return _INTEGERS[field.type]
    if field.enum_type is not None:
        known = [value.number for value in field.enum_type.values]
        return st.sampled_from([*known, 9999])
    if field.type == FieldDescriptor.TYPE_BOOL:
        return st.booleans()
    if field.type == FieldDescriptor.TYPE_STRING:
        return _WORDS
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=16)
    if field.type in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT):
        return st.floats(width=32)
    if field.message_type is not None and depth:
        if field.message_type.full_name == "google.protobuf.Any":
            return None
        return _messages(field.message_type, depth - 1)
    return None
