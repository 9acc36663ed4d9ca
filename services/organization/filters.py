"""What lists are filtered by."""

from sqlalchemy import ColumnElement


def pattern(text: str) -> str:
    """Return the LIKE pattern, with the escape character "/", of what holds a text."""
    for special in "/%_":
        text = text.replace(special, f"/{special}")
    return f"%{text}%"


def all_of(*conditions: tuple[bool, ColumnElement[bool]]) -> list[ColumnElement[bool]]:
    """Return the conditions that are wanted."""
    return [condition for wanted, condition in conditions if wanted]
