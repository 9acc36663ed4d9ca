"""Why something stands still or ended badly, cut to what the contract takes. Pure."""

from branchline.v1.common_pb2 import Failure, FailureReason

MESSAGE_BYTES = 2048
OUTPUT_BYTES = 8192


def failed(reason: FailureReason.ValueType, message: str, output: str = "", *, retryable: bool = True) -> Failure:
    """Return a failure: the beginning of its words, the end of the output that shows it. Half characters become "?"."""
    return Failure(
        reason=reason,
        message=_beginning(message, MESSAGE_BYTES),
        output_tail=output.encode(errors="replace")[-OUTPUT_BYTES:].decode(errors="ignore"),
        retryable=retryable,
    )


def _beginning(words: str, most_bytes: int) -> str:
    data = words.encode(errors="replace")
    return data.decode() if len(data) <= most_bytes else data[: most_bytes - 3].decode(errors="ignore") + "…"
