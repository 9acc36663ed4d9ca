"""What the rules of the contract cannot say: how large a thing may be whose size is a sum, or that has no rules.

Whoever makes such a thing cuts it to fit; `validation.validate` refuses what does not. A size is that of the serialized
message or field. `tests/contract/test_sizes.py` adds them to the rules that stand in the protos.
"""

from collections.abc import Mapping

from services.runtime.spine.chunks import PART_BYTES

ENTITY_BYTES = 512 * 1024
"""The largest entity: what is stored, pushed, and shown in lists and watches."""

MESSAGE_BYTES = 2 * 1024 * 1024
"""The largest request, response or frame of a watch."""

BLOB_BYTES = 64 * 1024 * 1024
"""The largest blob."""

CHUNK_BYTES = 1024 * 1024
"""The largest part of a blob or file that is written or read at once; also a segment in which blobs are kept."""

PAGE_BYTES = PART_BYTES
"""Where pages and frames end, after at least one entity."""

SUMMARY_BYTES = 2560
"""The largest `TaskSummary`: there are ten thousand of them in a sidebar."""

STRUCT_BYTES = 16 * 1024
"""One `google.protobuf.Struct`, such as a tool call's input or the schema of a question."""

STRUCT_DEPTH = 16
"""How deep objects and lists of a `google.protobuf.Struct` may be nested: decoders end at 100 messages."""

MASK_BYTES = 4 * 1024
"""One `google.protobuf.FieldMask`; it names fields of one resource."""

COMMAND_BYTES = 64 * 1024
"""All words of `ProcessSpec.command`."""

OUTPUTS_BYTES = 64 * 1024
"""All `ToolCall.outputs`; one of them always fits."""

SUMMARY_SESSIONS_BYTES = 1536
"""All `TaskSummary.sessions`; what does not fit is left out, the newest first."""

TYPES: Mapping[str, int] = {
    "google.protobuf.Struct": STRUCT_BYTES,
    "google.protobuf.FieldMask": MASK_BYTES,
}
"""Limits of messages that have no rules."""

SUMS: Mapping[str, int] = {
    "branchline.v1.ProcessSpec.command": COMMAND_BYTES,
    "branchline.v1.ToolCall.outputs": OUTPUTS_BYTES,
    "branchline.v1.TaskSummary.sessions": SUMMARY_SESSIONS_BYTES,
}
"""Limits of all elements of a field together, because all at their largest would be too much."""
