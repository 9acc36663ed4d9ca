"""Time and ids, in one place so that tests can hold them."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import uuid_utils
from google.protobuf.timestamp_pb2 import Timestamp


def new_id(prefix: str) -> str:
    """Make an id such as `task_0192...`: the prefix and a time-ordered UUID (version 7) in hex."""
    return f"{prefix}_{uuid_utils.uuid7().hex}"


@dataclass(frozen=True, slots=True)
class Clock:
    """Where a service takes time and ids from."""

    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    new_id: Callable[[str], str] = new_id

    def timestamp(self) -> Timestamp:
        """Return the present as a protobuf timestamp."""
        stamp = Timestamp()
        stamp.FromDatetime(self.now())
        return stamp

    def seconds(self) -> float:
        """Return the present in seconds since 1970, for columns."""
        return self.now().timestamp()


EARLIEST_SECONDS, LATEST_SECONDS = -62_135_596_800, 253_402_300_799
"""The range of a protobuf timestamp: the years that have four digits."""


def column_seconds(time: Timestamp) -> float:
    """Return a timestamp as a column holds it: seconds since 1970, within the years that have four digits."""
    seconds = time.seconds
    if not EARLIEST_SECONDS <= seconds <= LATEST_SECONDS:
        seconds = min(max(seconds, EARLIEST_SECONDS), LATEST_SECONDS)
    return seconds + time.nanos / 1e9
