"""Why turns and machines fail, in the words of the contract."""

from collections.abc import Mapping

from branchline.v1 import common_pb2 as common
from branchline.v1 import errors_pb2 as errors
from branchline.v1.common_pb2 import Failure, FailureReason
from branchline.v1.errors_pb2 import ErrorReason

from services.runtime.errors import DomainError, error_reason, reason_of
from services.runtime.failures import failed
from services.sandbox.agent_server import AgentError

_REASONS: Mapping[ErrorReason.ValueType, FailureReason.ValueType] = {
    errors.ERROR_REASON_AGENT_NOT_STARTED: common.FAILURE_REASON_AGENT_NOT_STARTED,
    errors.ERROR_REASON_AGENT_UNKNOWN: common.FAILURE_REASON_AGENT_UNKNOWN,
    errors.ERROR_REASON_NO_SANDBOX: common.FAILURE_REASON_SANDBOX_LOST,
    errors.ERROR_REASON_RESOURCE_NOT_FOUND: common.FAILURE_REASON_SANDBOX_LOST,
    errors.ERROR_REASON_SANDBOX_GONE: common.FAILURE_REASON_SANDBOX_LOST,
    errors.ERROR_REASON_SANDBOX_UNREACHABLE: common.FAILURE_REASON_SANDBOX_LOST,
    errors.ERROR_REASON_SANDBOX_NOT_STARTED: common.FAILURE_REASON_SANDBOX_FAILED,
}

_FINAL = frozenset({common.FAILURE_REASON_AGENT_UNKNOWN})
"""Trying again does not help without a change."""


class TurnFailed(Exception):
    """The turn is over and did not end well."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def exited(words: str) -> Failure:
    """Return the failure of an agent whose process is gone."""
    return failed(common.FAILURE_REASON_AGENT_EXITED, words)


def refused(words: str, error: AgentError | None = None) -> Failure:
    """Return the failure of an agent that answered with an error."""
    return failed(common.FAILURE_REASON_AGENT_REFUSED, words, error.output if error is not None else "")


def unprepared(words: str, output: str = "") -> Failure:
    """Return the failure of a turn whose prompt could not be made ready."""
    return failed(common.FAILURE_REASON_INTERNAL, words, output)


def failure_of(error: BaseException) -> Failure:
    """Return the failure that an error is for a turn."""
    if isinstance(error, TurnFailed):
        return error.failure
    if isinstance(error, AgentError):
        return refused(str(error), error)
    if isinstance(error, TimeoutError):
        return failed(common.FAILURE_REASON_TIMED_OUT, "something that the turn needs took too long")
    if isinstance(error, DomainError):
        reason = _REASONS.get(error_reason(error), common.FAILURE_REASON_INTERNAL)
        return failed(reason, reason_of(error), retryable=reason not in _FINAL)
    return failed(common.FAILURE_REASON_INTERNAL, "something went wrong inside; the server's log has it")
