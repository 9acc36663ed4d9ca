"""Errors of the domain, and the one place that maps them to `google.rpc.Status`.

Every error has a machine-readable reason (`ErrorReason` of the contract, in `ErrorInfo.reason`) and says which field or
resource it is about.
"""

from collections.abc import Mapping
from typing import TypeVar

import grpc
from branchline.v1 import errors_pb2
from branchline.v1.common_pb2 import EntityKind
from branchline.v1.errors_pb2 import ErrorReason
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

D = TypeVar("D", bound=Message)

DOMAIN = "branchline.dev"

_MESSAGE_BYTES = 1024
_WORDS_BYTES = 256
_VIOLATIONS = 8
_PERMANENT = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.DATA_LOSS,
    }
)


class DomainError(Exception):
    """An error that a caller can act on."""

    code = grpc.StatusCode.INTERNAL

    def __init__(self, reason: ErrorReason.ValueType, message: str, **metadata: str) -> None:
        super().__init__(message)
        self.reason = ErrorReason.Name(reason).removeprefix("ERROR_REASON_")
        self.message = message
        self.metadata: Mapping[str, str] = metadata

    def details(self) -> list[Message]:
        """Return further details beside `ErrorInfo`."""
        return []

    def to_status(self) -> status_pb2.Status:
        """Return the error as clients see it.

        What it quotes is cut: a status travels in trailers, which take 16 KiB, and one that is larger never arrives.
        """
        metadata = {name: _cut(value) for name, value in self.metadata.items()}
        info = error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=metadata)
        status = status_pb2.Status(code=self.code.value[0], message=_cut(self.message, _MESSAGE_BYTES))
        for detail in (info, *self.details()):
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        return status


class InvalidArgument(DomainError):
    """A field of the request is wrong."""

    code = grpc.StatusCode.INVALID_ARGUMENT

    def __init__(
        self,
        field: str,
        message: str,
        reason: ErrorReason.ValueType = errors_pb2.ERROR_REASON_FIELD_INVALID,
        **metadata: str,
    ) -> None:
        super().__init__(reason, f"{field}: {message}", field=field, **metadata)
        self.violations = [(field, message)]

    def details(self) -> list[Message]:
        """Name the wrong fields."""
        violations = [
            error_details_pb2.BadRequest.FieldViolation(field=_cut(field), description=_cut(message))
            for field, message in self.violations[:_VIOLATIONS]
        ]
        return [error_details_pb2.BadRequest(field_violations=violations)]


class _ResourceError(DomainError):
    """An error about one resource."""

    def __init__(
        self,
        kind: EntityKind.ValueType,
        name: str,
        message: str,
        reason: ErrorReason.ValueType,
        **metadata: str,
    ) -> None:
        super().__init__(reason, message, **metadata)
        self.kind = kind_name(kind)
        self.name = name
        self.metadata = {"resource_type": self.kind, "id": name, **metadata}

    def details(self) -> list[Message]:
        """Name the resource."""
        return [error_details_pb2.ResourceInfo(resource_type=self.kind, resource_name=_cut(self.name))]


class NotFound(_ResourceError):
    """There is no such resource, or the caller may not know of it."""

    code = grpc.StatusCode.NOT_FOUND

    def __init__(
        self,
        kind: EntityKind.ValueType,
        name: str,
        reason: ErrorReason.ValueType = errors_pb2.ERROR_REASON_RESOURCE_NOT_FOUND,
        **metadata: str,
    ) -> None:
        sentence = f'there is no {kind_name(kind).replace("_", " ")} "{name}"'
        super().__init__(kind, name, sentence, reason, **metadata)


class AlreadyExists(_ResourceError):
    """The name is taken; `name` is the id of the holder."""

    code = grpc.StatusCode.ALREADY_EXISTS


class FailedPrecondition(DomainError):
    """The state of the resource does not allow the command."""

    code = grpc.StatusCode.FAILED_PRECONDITION

    def details(self) -> list[Message]:
        """Name the precondition."""
        violation = error_details_pb2.PreconditionFailure.Violation(type=self.reason, description=_cut(self.message))
        return [error_details_pb2.PreconditionFailure(violations=[violation])]


class Aborted(DomainError):
    """What is there is not what the caller knows."""

    code = grpc.StatusCode.ABORTED


class OutOfRange(DomainError):
    """An offset lies behind what is there."""

    code = grpc.StatusCode.OUT_OF_RANGE


class DataLoss(DomainError):
    """What was received is not what was meant to be sent."""

    code = grpc.StatusCode.DATA_LOSS


class Unauthenticated(DomainError):
    """Nobody is known by the token."""

    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(DomainError):
    """The caller's role does not allow the command."""

    code = grpc.StatusCode.PERMISSION_DENIED


class ResourceExhausted(DomainError):
    """The caller has used up what is allowed. `limit` names it, where it is a total; else waiting helps."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED

    def details(self) -> list[Message]:
        """Name the total, or say when to try again."""
        limit = self.metadata.get("limit")
        if limit is None:
            return [error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=1))]
        violation = error_details_pb2.QuotaFailure.Violation(subject=_cut(limit), description=_cut(self.message))
        return [error_details_pb2.QuotaFailure(violations=[violation])]


class DeadlineExceeded(DomainError):
    """Something took longer than the caller or the service would wait."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Unavailable(DomainError):
    """Something that is needed cannot be reached now; trying again may help."""

    code = grpc.StatusCode.UNAVAILABLE

    def details(self) -> list[Message]:
        """Say when to try again."""
        return [error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=1))]


def without_reason(error: grpc.aio.AioRpcError) -> DomainError:
    """Return what clients are told of a call to another service that failed and bears no status of ours.

    gRPC's own words name the addresses inside, so they are not passed on.
    """
    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        sentence = "it was not answered in time and may be done all the same; a command can be asked for again"
        return DeadlineExceeded(errors_pb2.ERROR_REASON_NOT_ANSWERED, sentence)
    if error.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}:
        return Unavailable(errors_pb2.ERROR_REASON_SERVICE_UNREACHABLE, "a service inside cannot be reached; try again")
    unknown = DomainError(errors_pb2.ERROR_REASON_INTERNAL, "something went wrong inside; the server's log has it")
    unknown.code = error.code()
    return unknown


def _cut(words: str, most_bytes: int = _WORDS_BYTES) -> str:
    """Return the beginning of words that are too long."""
    data = words.encode(errors="replace")
    return words if len(data) <= most_bytes else data[:most_bytes].decode(errors="ignore") + "…"


def kind_name(kind: EntityKind.ValueType) -> str:
    """Return a kind as people and `ResourceInfo` know it, such as "task"."""
    return EntityKind.Name(kind).removeprefix("ENTITY_KIND_").lower()


def is_permanent(error: BaseException) -> bool:
    """Say whether repeating the call that failed in this way is useless."""
    return status_code(error) in _PERMANENT


def detail_of(error: grpc.aio.AioRpcError, kind: type[D]) -> D:
    """Return the detail of one kind that a failed call carries, empty if it carries none."""
    found = kind()
    try:
        status = rpc_status.from_call(error)
    except ValueError:  # details of something else than the call's own status
        return found
    for detail in status.details if status else ():
        detail.Unpack(found)
    return found


def status_code(error: BaseException) -> grpc.StatusCode | None:
    """Return the status that an error of ours or of a call stands for, or None."""
    if isinstance(error, DomainError):
        return error.code
    return error.code() if isinstance(error, grpc.aio.AioRpcError) else None


def error_reason(error: BaseException) -> ErrorReason.ValueType:
    """Return why one of our services refused, or UNSPECIFIED if it did not: a connection broke, somebody else did."""
    name = error.reason if isinstance(error, DomainError) else ""
    if isinstance(error, grpc.aio.AioRpcError):
        info = detail_of(error, error_details_pb2.ErrorInfo)
        name = info.reason if info.domain == DOMAIN else ""
    known = dict(ErrorReason.items())
    return known.get(f"ERROR_REASON_{name}", errors_pb2.ERROR_REASON_UNSPECIFIED)


def reason_of(error: BaseException) -> str:
    """Return words for people about a failed call."""
    if isinstance(error, DomainError):
        return error.message
    if isinstance(error, grpc.aio.AioRpcError):
        return error.details() or error.code().name
    return str(error) or type(error).__name__
