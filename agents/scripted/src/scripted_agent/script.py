"""Reads instructions out of a prompt. Pure."""

import re
from dataclasses import dataclass

_LINE = re.compile(r"^\s*(?:[-*]\s+)?(write|append|run|commit|push|ask|say|think|repeat|wait|fail|die)\b\s*(.*)$", re.I)


@dataclass(frozen=True, slots=True)
class Instruction:
    """One thing to do."""

    verb: str
    argument: str


def read_script(text: str) -> list[Instruction]:
    """Return the instructions of a prompt, one per line; other lines are things to talk about."""
    found: list[Instruction] = []
    for line in text.splitlines():
        if not line.strip():
            continue
        match = _LINE.match(line)
        if match:
            found.append(Instruction(match[1].lower(), match[2].strip()))
        else:
            found.append(Instruction("talk", line.strip()))
    return found


def split_file(argument: str) -> tuple[str, str]:
    """Return path and text of a write or append instruction."""
    path, _, text = argument.partition(":")
    return path.strip(), text.strip().replace("\\n", "\n")
