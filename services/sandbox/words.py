"""Cuts and cleans what agents say: it may be any JSON of any length. Pure."""

from typing import Any, cast

_DEEPEST = 64


def head(text: str, most_bytes: int) -> str:
    """Return the beginning of a text, at most so many bytes of it."""
    data = text.encode()
    return text if len(data) <= most_bytes else data[: most_bytes - 3].decode(errors="ignore") + "…"


def tail(text: str, most_bytes: int) -> tuple[str, int]:
    """Return the end of a text, at most so many bytes of it, and how many bytes were left out."""
    data = text.encode()
    if len(data) <= most_bytes:
        return text, 0
    kept = data[-most_bytes:].decode(errors="ignore")
    return kept, len(data) - len(kept.encode())


def clean(value: Any, depth: int = 0) -> Any:
    """Return JSON without what cannot be kept: half characters, U+0000, and what is nested without end."""
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").replace("\0", "�")
    if not isinstance(value, dict | list):
        return value
    if depth > _DEEPEST:
        return "…"
    if isinstance(value, list):
        return [clean(one, depth + 1) for one in cast("list[Any]", value)]
    found = cast("dict[str, Any]", value)
    return {clean(name): clean(one, depth + 1) for name, one in found.items()}
