"""What agents give as JSON of their own, kept as `Struct`s of a bounded size. Pure."""

import json
import math
from collections.abc import Mapping
from typing import Any, cast

from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct

from services.runtime.limits import STRUCT_BYTES, STRUCT_DEPTH
from services.sandbox.words import head

_CUTS = ((8192, 1024, 16), (2048, 256, 12), (512, 64, 10), (128, 24, 8), (64, 8, 4))
"""Most bytes of a text, most members of a list or object, and deepest nesting, harder each time."""

_MOST_EXACT = 2**53


def to_struct(value: Any) -> Struct:
    """Return JSON as a struct of at most `STRUCT_BYTES`; what is no object becomes its member "value".

    Where it has more, long texts, lists and objects in it are cut; what is left out is shown by "…".
    """
    whole = cast("dict[str, Any]", value) if isinstance(value, dict) else {"value": value}
    for cut in ((STRUCT_BYTES, STRUCT_BYTES, STRUCT_DEPTH), *_CUTS):
        made = Struct()
        made.update(_object(whole, *cut))
        if made.ByteSize() <= STRUCT_BYTES:
            return made
    made = Struct()
    made.update({"…": head(json.dumps(value), STRUCT_BYTES // 2)})
    return made


def fits(value: Any) -> bool:
    """Say whether JSON is kept whole."""
    return isinstance(value, dict) and from_struct(to_struct(value)) == value


def from_struct(struct: Struct) -> dict[str, Any]:
    """Return a struct as JSON; numbers that are whole are so again."""
    return cast("dict[str, Any]", _whole_numbers(MessageToDict(struct)))


def _object(value: Mapping[str, Any], most_bytes: int, most: int, depth: int) -> dict[str, Any]:
    kept = {
        head(name, most_bytes): _value(one, most_bytes, most, depth - 1) for name, one in list(value.items())[:most]
    }
    return {**kept, "…": f"{len(value) - most} more"} if len(value) > most else kept


def _value(value: Any, most_bytes: int, most: int, depth: int) -> Any:
    if isinstance(value, str):
        return head(value, most_bytes)
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int | float):
        kept = abs(value) <= _MOST_EXACT if isinstance(value, int) else math.isfinite(value)
        return value if kept else head(str(value), most_bytes)
    if depth <= 0:
        return head(json.dumps(value), most_bytes)
    if isinstance(value, dict):
        return _object(cast("dict[str, Any]", value), most_bytes, most, depth)
    listed = cast("list[Any]", value)
    kept = [_value(one, most_bytes, most, depth - 1) for one in listed[:most]]
    return [*kept, f"… {len(listed) - most} more"] if len(listed) > most else kept


def _whole_numbers(value: Any) -> Any:
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, list):
        return [_whole_numbers(one) for one in cast("list[Any]", value)]
    if isinstance(value, dict):
        return {name: _whole_numbers(one) for name, one in cast("dict[str, Any]", value).items()}
    return value
