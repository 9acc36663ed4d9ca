"""Why tasks, sessions and turns fail, in the words of the contract. Pure."""

import asyncio
from collections.abc import Mapping

import grpc
from branchline.v1 import common_pb2 as common
from branchline.v1 import errors_pb2 as errors
from branchline.v1.common_pb2 import Failure, FailureReason
from branchline.v1.errors_pb2 import ErrorReason

from services.runtime.errors import error_reason, reason_of, status_code
from services.runtime.failures import failed

Reason = FailureReason.ValueType

_REASONS: Mapping[ErrorReason.ValueType, Reason] = {
    errors.ERROR_REASON_AGENT_NOT_STARTED: common.FAILURE_REASON_AGENT_NOT_STARTED,
    errors.ERROR_REASON_AGENT_UNKNOWN: common.FAILURE_REASON_AGENT_UNKNOWN,
    errors.ERROR_REASON_NO_SANDBOX: common.FAILURE_REASON_SANDBOX_LOST,
    errors.ERROR_REASON_SANDBOX_GONE: common.FAILURE_REASON_SANDBOX_LOST,
    errors.ERROR_REASON_SANDBOX_UNREACHABLE: common.FAILURE_REASON_SANDBOX_LOST,
    errors.ERROR_REASON_SANDBOX_NOT_STARTED: common.FAILURE_REASON_SANDBOX_FAILED,
    errors.ERROR_REASON_PROVIDER_UNKNOWN: common.FAILURE_REASON_SANDBOX_FAILED,
    errors.ERROR_REASON_QUOTA_EXCEEDED: common.FAILURE_REASON_PROVIDER_CAPACITY,
}
_NOT_BY_REPEATING = frozenset({errors.ERROR_REASON_AGENT_UNKNOWN, errors.ERROR_REASON_PROVIDER_UNKNOWN})


def failure_of(error: BaseException, otherwise: Reason, what: str = "") -> Failure:
    """Return the failure that an error is. `otherwise` is its reason where the error says none; `what` could not be."""
    why = error_reason(error)
    reason = common.FAILURE_REASON_TIMED_OUT if is_late(error) else _REASONS.get(why, otherwise)
    words = "it took too long" if isinstance(error, TimeoutError) else reason_of(error)
    return failed(reason, f"{what}: {words}" if what else words, retryable=why not in _NOT_BY_REPEATING)


def is_late(error: BaseException) -> bool:
    """Say whether something was not done in the time that it had."""
    return isinstance(error, TimeoutError | asyncio.TimeoutError) or (
        status_code(error) == grpc.StatusCode.DEADLINE_EXCEEDED
    )
