"""The one error of the client: what a call or a watch failed with."""

from collections.abc import Mapping
from datetime import timedelta

import grpc
from google.protobuf.any_pb2 import Any
from google.rpc import error_details_pb2, status_pb2

from branchline.v1.errors_pb2 import ERROR_REASON_UNSPECIFIED, ErrorReason

DOMAIN = "branchline.dev"
_STATUS_KEY = "grpc-status-details-bin"


class BranchlineError(Exception):
    """A call that failed.

    `code` is gRPC's status code, `reason` says why for machines (UNSPECIFIED where the server could not say, such as
    when it cannot be reached), `metadata` holds the facts that the contract names for the reason, `field` the request's
    field that is wrong, and `retry_delay` how long to wait before it may work.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        reason: ErrorReason.ValueType = ERROR_REASON_UNSPECIFIED,
        metadata: Mapping[str, str] | None = None,
        field: str = "",
        retry_delay: timedelta | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.reason = reason
        self.metadata: Mapping[str, str] = metadata or {}
        self.field = field
        self.retry_delay = retry_delay

    def __str__(self) -> str:
        if self.reason == ERROR_REASON_UNSPECIFIED:
            return f"{self.code.name}: {self.message}"
        return f"{self.code.name}, {ErrorReason.Name(self.reason).removeprefix('ERROR_REASON_')}: {self.message}"


def error_of(error: grpc.aio.AioRpcError) -> BranchlineError:
    """Return what a failed call tells."""
    found = BranchlineError(error.code(), error.details() or error.code().name.lower().replace("_", " "))
    for detail in _details(error):
        _read(detail, found)
    return found


def _details(error: grpc.aio.AioRpcError) -> list[Any]:
    for key, value in error.trailing_metadata() or ():
        if key == _STATUS_KEY and isinstance(value, bytes):
            return list(status_pb2.Status.FromString(value).details)
    return []


def _read(detail: Any, into: BranchlineError) -> None:
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    if detail.Unpack(info) and info.domain == DOMAIN:
        name = f"ERROR_REASON_{info.reason}"
        if name in ErrorReason.keys():  # a newer server has more  # noqa: SIM118 - an enum is no mapping
            into.reason = ErrorReason.Value(name)
        into.metadata = dict(info.metadata)
    elif detail.Unpack(bad) and bad.field_violations:
        into.field = bad.field_violations[0].field
    elif detail.Unpack(retry):
        into.retry_delay = retry.retry_delay.ToTimedelta()
