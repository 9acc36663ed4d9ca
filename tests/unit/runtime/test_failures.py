"""Why something ended badly: it takes any words."""

from branchline.v1.common_pb2 import FAILURE_REASON_INTERNAL

from services.runtime.failures import MESSAGE_BYTES, OUTPUT_BYTES, failed


def test_half_characters_do_not_keep_a_failure_from_being_told() -> None:
    failure = failed(FAILURE_REASON_INTERNAL, "a\ud800", "\udc00b")
    assert (failure.message, failure.output_tail) == ("a?", "?b")
    long = failed(FAILURE_REASON_INTERNAL, "\ud800" * MESSAGE_BYTES + "a", "\udc00" * OUTPUT_BYTES + "b")
    assert len(long.message.encode()) <= MESSAGE_BYTES
    assert long.output_tail.endswith("?b")
