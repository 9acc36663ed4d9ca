"""Errors of the domain as clients see them."""

import pytest
from branchline.v1.vocabulary_pb2 import ENTITY_KIND_TASK, ERROR_REASON_TASK_STATUS

from services.runtime.errors import DomainError, FailedPrecondition, InvalidArgument, NotFound

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
        FailedPrecondition(ERROR_REASON_TASK_STATUS, LONG, status=LONG, branch=LONG),
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
