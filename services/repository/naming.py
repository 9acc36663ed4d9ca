"""Titles and branch names: derived from a task's text. Pure."""

import re
import unicodedata
from collections.abc import Set

TITLE_LENGTH = 62
"""Most characters of a title."""

BRANCH_LENGTH = 50
"""Most characters of a derived name."""

_PREFIXES = (
    ("fix", ("fix", "bug", "broken", "crash", "error", "repair", "wrong", "fails")),
    ("docs", ("document", "documentation", "docs", "readme", "changelog")),
    ("refactor", ("refactor", "rename", "clean", "simplify", "restructure", "tidy")),
)
_DEFAULT_PREFIX = "feat"


def derive_title(text: str) -> str:
    """Return the first line of a text, cut at a word."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "Task")
    line = re.sub(r"\s+", " ", line)
    if len(line) <= TITLE_LENGTH:
        return line
    cut = line[: TITLE_LENGTH - 1]
    return (cut[: cut.rfind(" ")] if " " in cut else cut).rstrip() + "…"


def derive_branch(title: str) -> str:
    """Return a branch name such as "fix/login-loops" for a title."""
    ascii_title = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode().lower()
    words = re.findall(r"[a-z0-9]+", ascii_title)
    prefix = next((prefix for prefix, signs in _PREFIXES if any(word in signs for word in words)), _DEFAULT_PREFIX)
    room = BRANCH_LENGTH - len(prefix) - 1
    slug = "-".join(words)[:room].strip("-") or "task"
    return f"{prefix}/{slug}"


def unique_branch(wanted: str, taken: Set[str]) -> str:
    """Return the wanted name, or one much like it that git can have beside those that are taken.

    A name cannot be another's folder: where there is "feat", there is no "feat/x".
    """
    folder = wanted.partition("/")[0]
    wanted = wanted.replace("/", "-", 1) if folder in taken else wanted
    used = taken | {parent for name in taken for parent in _folders(name)}
    name, number = wanted, 1
    while name in used:
        number += 1
        suffix = f"-{number}"
        name = wanted[: BRANCH_LENGTH - len(suffix)].rstrip("-") + suffix
    return name


def _folders(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:end]) for end in range(1, len(parts))]
