"""Errors of the domain as clients see them."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from branchline.v1.common_pb2 import ENTITY_KIND_TASK
from branchline.v1.errors_pb2 import ERROR_REASON_STATE_FORBIDS, ErrorReason

from services.runtime import errors
from services.runtime.errors import DomainError, FailedPrecondition, InvalidArgument, NotFound

ROOT = Path(__file__).parents[3]
CONTRACT = ROOT / "protos/public/branchline/v1/errors.proto"
TRAILER_BYTES = 16 * 1024
LONG = "\U0001f333" * 100_000


def many_violations() -> InvalidArgument:
    error = InvalidArgument(LONG, LONG)
    error.violations = [(LONG, LONG)] * 10_000
    return error


@pytest.mark.parametrize(
    "error",
    [
        many_violations(),
        NotFound(ENTITY_KIND_TASK, LONG),
        FailedPrecondition(ERROR_REASON_STATE_FORBIDS, LONG, status=LONG, branch=LONG),
    ],
)
def test_a_status_always_fits_the_trailers(error: DomainError) -> None:  # F16
    status = error.to_status()

    percent_encoded, base64_encoded = 3 * len(status.message.encode()), 4 * status.ByteSize() // 3
    assert percent_encoded + base64_encoded < TRAILER_BYTES
    assert status.message.endswith("…")


def test_what_is_short_is_told_whole() -> None:
    status = NotFound(ENTITY_KIND_TASK, "task_é").to_status()

    assert status.message == 'there is no task "task_é"'


def promised() -> dict[str, tuple[str, set[str]]]:
    """Return the code that the contract gives each reason, the first word of its comment, and its metadata's keys."""
    found: dict[str, tuple[str, set[str]]] = {}
    comment = ""
    for line in CONTRACT.read_text().splitlines():
        if words := re.match(r"  // (.*)", line):
            comment += f"{words[1]} "
        elif reason := re.match(r"  (ERROR_REASON_\w+) = [1-9]", line):
            code, keys = re.match(r"([A-Z_]+)\. ", comment), re.search(r"metadata: ([a-z0-9_, ]+)", comment)
            found[reason[1]] = code[1] if code else "", set(re.split(r"[ ,]+", keys[1].strip())) if keys else set()
        comment = comment if words else ""
    return found


BY_ITSELF = {
    "InvalidArgument": {"field"},
    "NotFound": {"resource_type", "id"},
    "AlreadyExists": {"resource_type", "id"},
}
"""Metadata that a kind of error makes of its other arguments."""


def raised() -> Iterator[tuple[str, str, str, set[str] | None]]:
    """Yield (place, reason, code, metadata's keys if they can be seen) of every error made with a reason."""
    for path in [*(ROOT / "services").rglob("*.py"), *(ROOT / "gateway").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            made = getattr(errors, getattr(node.func, "id", getattr(node.func, "attr", "")), None)
            if not (isinstance(made, type) and issubclass(made, DomainError)):
                continue
            given = [*node.args, *(one.value for one in node.keywords)]
            names = [getattr(one, "id", getattr(one, "attr", "")) for one in given]
            for name in names:
                if name.startswith("ERROR_REASON_"):
                    keys = {one.arg or "**" for one in node.keywords} | BY_ITSELF.get(made.__name__, set())
                    place = f"{path.relative_to(ROOT)}:{node.lineno}"
                    yield place, name, made.code.name, None if "**" in keys else keys


def test_every_reason_begins_with_the_code_that_it_comes_with() -> None:
    codes = promised()

    assert set(codes) == set(ErrorReason.keys()) - {"ERROR_REASON_UNSPECIFIED"}
    assert not [reason for reason, (code, _) in codes.items() if not code]


def test_a_reason_comes_with_the_one_code_of_the_contract() -> None:  # INDEX_BEHIND came with two
    codes, made = promised(), [*raised()]

    assert len({reason for _, reason, _, _ in made}) > 40
    assert not [(place, reason, code) for place, reason, code, _ in made if codes[reason][0] != code]


def test_a_reason_comes_with_the_facts_that_the_contract_promises() -> None:
    known, made = promised(), [*raised()]
    missing = {
        f"{place} {reason}": known[reason][1] - keys
        for place, reason, _, keys in made
        if keys is not None and not keys >= known[reason][1]
    }

    assert not missing


def test_every_reason_is_given_somewhere() -> None:
    code = "".join(path.read_text() for folder in ("services", "gateway") for path in (ROOT / folder).rglob("*.py"))

    assert not [reason for reason in promised() if not re.search(rf"\b{reason}\b", code)]
