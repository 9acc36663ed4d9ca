"""How large a message can be at most, computed from its descriptor and from the rules that stand on its fields."""

import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from re import _parser  # pyright: ignore  # what `re.compile` itself reads patterns with
from typing import Any

from buf.validate import validate_pb2
from buf.validate.validate_pb2 import FieldRules
from google.protobuf.descriptor import Descriptor, FieldDescriptor, ServiceDescriptor
from google.protobuf.message import Message

_VARINT = 10
_SCALARS = {
    FieldDescriptor.TYPE_BOOL: 1,
    FieldDescriptor.TYPE_DOUBLE: 8,
    FieldDescriptor.TYPE_FIXED64: 8,
    FieldDescriptor.TYPE_SFIXED64: 8,
    FieldDescriptor.TYPE_FLOAT: 4,
    FieldDescriptor.TYPE_FIXED32: 4,
    FieldDescriptor.TYPE_SFIXED32: 4,
    FieldDescriptor.TYPE_UINT32: 5,
}
_LENGTH_DELIMITED = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES, FieldDescriptor.TYPE_MESSAGE)
_UUID = 36
_LONGEST_CHARACTER = 4
_NO_END = 2**31


@dataclass
class Sizes:
    """Computes sizes, and gathers what has no bound.

    `types` bounds messages without rules, such as those of google.protobuf, by their full name; `sums` bounds a field
    with all its elements, by its full name; `paged` are fields that hold what a page or frame holds.
    """

    types: Mapping[str, int]
    sums: Mapping[str, int] = field(default_factory=dict[str, int])
    paged: Mapping[str, int] = field(default_factory=dict[str, int])
    unbounded: set[str] = field(default_factory=set[str])
    used: set[str] = field(default_factory=set[str])
    _known: dict[str, int] = field(default_factory=dict[str, int])

    def largest(self, message: Descriptor, within: tuple[str, ...] = ()) -> int:
        """Return the most bytes that the message has. `within` are the messages around it, which it must not hold."""
        name = message.full_name
        if name in self.types:
            self.used.add(name)
            return self.types[name]
        if name in within:
            self.unbounded.add(f"{' > '.join((*within, name))} (holds itself)")
            return 0
        if name not in self._known:
            self._known[name] = self._sum(message, (*within, name))
        return self._known[name]

    def _sum(self, message: Descriptor, within: tuple[str, ...]) -> int:
        alone = [one for one in message.fields if one.containing_oneof is None]
        either = [oneof.fields for oneof in message.oneofs]
        return sum(self._field(one, within) for one in alone) + sum(
            max(self._field(one, within) for one in fields) for fields in either
        )

    def _field(self, one: FieldDescriptor, within: tuple[str, ...]) -> int:
        rules = one.GetOptions().Extensions[validate_pb2.field]
        if one.full_name in self.sums:
            self.used.add(one.full_name)
            self._element(one, rules.repeated.items, within)
            return self.sums[one.full_name]
        if one.full_name in self.paged:
            return self.paged[one.full_name] + self._element(one, rules.repeated.items, within)
        if _is_map(one):
            return self._most(one, rules.map, "max_pairs") * self._pair(one, rules, within)
        if one.is_repeated:
            return self._most(one, rules.repeated, "max_items") * self._element(one, rules.repeated.items, within)
        return self._element(one, rules, within)

    def _pair(self, one: FieldDescriptor, rules: FieldRules, within: tuple[str, ...]) -> int:
        key, value = one.message_type.fields  # pyright: ignore[reportOptionalMemberAccess]
        size = self._element(key, rules.map.keys, within) + self._element(value, rules.map.values, within)
        return _delimited(one.number, size)

    def _most(self, one: FieldDescriptor, rules: Message, name: str) -> int:
        given = _given(rules)
        if name not in given:
            self.unbounded.add(f"{one.full_name} ({name})")
        return given.get(name, 0)

    def _element(self, one: FieldDescriptor, rules: FieldRules, within: tuple[str, ...]) -> int:
        """Return the most bytes of one value with its tag."""
        if one.message_type is not None:
            return _delimited(one.number, self.largest(one.message_type, within))
        if one.type in _LENGTH_DELIMITED:
            most = _longest_text(rules) if one.type == FieldDescriptor.TYPE_STRING else _longest_bytes(rules)
            if most is None:
                self.unbounded.add(one.full_name)
            return _delimited(one.number, most or 0)
        return _varint(one.number << 3) + _SCALARS.get(one.type, _VARINT)


def _is_map(one: FieldDescriptor) -> bool:
    return one.message_type is not None and one.message_type.GetOptions().map_entry


def _longest_text(rules: FieldRules) -> int | None:
    """Return the most bytes of a string, or None where no rule bounds it."""
    given = _given(rules.string)
    bounds: list[int | None] = [given.get("max_bytes"), given.get("len_bytes")]
    bounds += [given[name] * _LONGEST_CHARACTER for name in ("max_len", "len") if name in given]
    bounds.append(_width(given.get("pattern", "")))
    bounds.append(_UUID if rules.string.uuid else None)
    return min((bound for bound in bounds if bound is not None), default=None)


def _width(pattern: str) -> int | None:
    """Return the most bytes that match a pattern, or None where there is no end to them."""
    if not (pattern.startswith("^") and pattern.endswith("$")):
        return None
    parsed: Any = _parser.parse(pattern)  # pyright: ignore
    characters = int(parsed.getwidth()[1])  # pyright: ignore
    if characters >= _NO_END:
        return None
    plain = pattern.isascii() and not re.search(r"[.\\]|\[\^", pattern)  # what it names is all that it takes
    return characters * (1 if plain else _LONGEST_CHARACTER)


def _longest_bytes(rules: FieldRules) -> int | None:
    given = _given(rules.bytes)
    return given.get("max_len", given.get("len"))


def _given(rules: Message) -> dict[str, Any]:
    """Return the rules that are set, by name."""
    return {one.name: value for one, value in rules.ListFields()}


def _delimited(number: int, size: int) -> int:
    return _varint(number << 3) + _varint(size) + size


def _varint(value: int) -> int:
    return max(1, -(-value.bit_length() // 7))


def reachable(services: list[ServiceDescriptor], known: Container[str]) -> Iterator[Descriptor]:
    """Yield every message that a call can carry, once; nothing of those whose bound is known."""
    methods = [method for service in services for method in service.methods]
    waiting = [message for method in methods for message in (method.input_type, method.output_type)]
    seen: set[str] = set()
    while waiting:
        message = waiting.pop()
        if message.full_name not in seen and message.full_name not in known:
            seen.add(message.full_name)
            yield message
            waiting += [one.message_type for one in message.fields if one.message_type is not None]
