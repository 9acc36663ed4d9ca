"""Watch frames as they go out: what the coordinator has serialized is spliced in unread.

The response of each public watch has a header and changes, and each change a type and one entity in a field named after
its kind: what is needed to write one is read from the descriptors once.
"""

from collections.abc import Mapping

from branchline.v1.common_pb2 import EntityKind
from branchline.v1.watches_pb2 import FrameHeader
from branchline_internal.spine.v1.push_pb2 import WatchChange, WatchFrame
from google.protobuf.descriptor import Descriptor, FieldDescriptor

_LENGTH_DELIMITED = 2
_CONTINUES, _SEVEN_BITS = 0x80, 7


class FrameWriter:
    """Writes the responses of one public watch."""

    def __init__(self, response: Descriptor) -> None:
        changes = response.fields_by_name["changes"]
        change = changes.message_type
        assert change is not None
        self._header = _tag(response.fields_by_name["header"])
        self._change = _tag(changes)
        self._type = _varint(change.fields_by_name["type"].number << 3)
        self._entities: Mapping[int, bytes] = {
            EntityKind.Value(f"ENTITY_KIND_{field.name.upper()}"): _tag(field)
            for field in change.oneofs_by_name["entity"].fields
        }

    @property
    def kinds(self) -> frozenset[int]:
        """Kinds of entities that the watch can show."""
        return frozenset(self._entities)

    def write(self, frame: WatchFrame, heartbeat_seconds: float) -> bytes:
        """Return a response with the frame; kinds that it has no field for are left out."""
        header = FrameHeader(
            kind=frame.kind,
            resume_token=frame.resume_token,
            reset_reason=frame.reset_reason,
        )
        header.heartbeat_interval.FromMicroseconds(round(heartbeat_seconds * 1e6))
        parts = [_delimited(self._header, header.SerializeToString())]
        parts += [self._written(change) for change in frame.changes if change.kind in self._entities]
        return b"".join(parts)

    def _written(self, change: WatchChange) -> bytes:
        entity = _delimited(self._entities[change.kind], change.entity)
        return _delimited(self._change, self._type + _varint(change.type) + entity)


def _delimited(tag: bytes, value: bytes) -> bytes:
    return tag + _varint(len(value)) + value


def _tag(field: FieldDescriptor) -> bytes:
    return _varint(field.number << 3 | _LENGTH_DELIMITED)


def _varint(number: int) -> bytes:
    """Return a whole number as protobuf writes it."""
    out = bytearray()
    while number >= _CONTINUES:
        out.append(number % _CONTINUES | _CONTINUES)
        number >>= _SEVEN_BITS
    out.append(number)
    return bytes(out)
