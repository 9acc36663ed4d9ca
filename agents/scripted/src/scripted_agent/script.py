"""Reads instructions out of a prompt. Pure."""

import re
from dataclasses import dataclass, replace
from typing import Literal

_VERBS = "write|append|run|commit|push|ask|question|say|think|plan|repeat|wait|fail|die"
_STRICT = (
    r"image(?=\s*\d*\s*$)|usage(?=\s+\d+\s+\d+\s*$)|stop(?=\s+[a-z_]+\s*$)|(?:mode|model)(?=\s+\S+\s*$)|update(?=\s*\{)"
)
"""Verbs that are words of every day, and so only meant with what belongs to them."""

_LINE = re.compile(rf"^\s*(?:[-*]\s+)?({_VERBS}|{_STRICT})\b\s*(.*)$", re.IGNORECASE)


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


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a plan, in ACP's words."""

    text: str
    priority: Literal["high", "medium", "low"] = "medium"
    status: Literal["pending", "in_progress", "completed"] = "pending"


_PRIORITIES: dict[str, Literal["high", "medium", "low"]] = {"high": "high", "medium": "medium", "low": "low"}
_STATES: dict[str, Literal["pending", "in_progress", "completed"]] = {
    "todo": "pending",
    "doing": "in_progress",
    "done": "completed",
}


def read_plan(argument: str) -> list[Step]:
    """Return the steps of a plan, which semicolons part."""
    steps: list[Step] = []
    for part in argument.split(";"):
        step, words = Step(""), part.split()
        while words and words[0] in (_PRIORITIES.keys() | _STATES.keys()):
            word = words.pop(0)
            if word in _PRIORITIES:
                step = replace(step, priority=_PRIORITIES[word])
            else:
                step = replace(step, status=_STATES[word])
        steps.append(replace(step, text=" ".join(words)))
    return steps


def split_file(argument: str) -> tuple[str, str]:
    """Return path and text of a write or append instruction."""
    path, _, text = argument.partition(":")
    return path.strip(), text.strip().replace("\\n", "\n")
