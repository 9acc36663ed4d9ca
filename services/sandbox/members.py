"""Members of what an agent says, which may be any JSON: what is not of the wanted kind counts as not said."""

from collections.abc import Mapping
from typing import Any, cast


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
