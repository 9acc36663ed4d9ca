"""Members of what comes out of a sandbox, which may be any JSON: what is not of the wanted kind counts as not said."""

from collections.abc import Mapping
from typing import Any, TypeGuard, cast


def member(of: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the object under a name, empty if there is none."""
    found = of.get(name)
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


def members(of: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Return the objects in the list under a name."""
    found = of.get(name)
    if not isinstance(found, list):
        return []
    return [cast("dict[str, Any]", one) for one in cast("list[Any]", found) if isinstance(one, dict)]


def text_of(of: Mapping[str, Any], name: str) -> str:
    """Return the words under a name, empty if there are none. Some number what others name."""
    found = of.get(name)
    if isinstance(found, str):
        return found
    return str(found) if is_whole(found) else ""


def count_of(of: Mapping[str, Any], name: str, most: int) -> int | None:
    """Return the whole number under a name, None if there is none from 0 to `most`."""
    found = of.get(name)
    return found if is_whole(found) and 0 <= found <= most else None


def is_whole(found: object) -> TypeGuard[int]:
    """Say whether something is a whole number; `true` is none."""
    return isinstance(found, int) and not isinstance(found, bool)
