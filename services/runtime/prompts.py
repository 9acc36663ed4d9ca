"""What members tell agents: bounds that no rule of a field can hold, and the blobs that prompts name."""

from collections.abc import Iterable

from branchline.v1.common_pb2 import BlobReference, Prompt

from services.runtime.errors import InvalidArgument

EXCERPTS_BYTES = 256 * 1024
"""Most that the file excerpts of one prompt have in sum."""


def check_prompt(prompt: Prompt, field: str) -> None:
    """Raise InvalidArgument for a prompt that says nothing or whose excerpts are too large together."""
    if not prompt.text.strip():
        raise InvalidArgument(f"{field}.text", "must hold more than white space")
    size = sum(
        len(one.file_excerpt.path.encode()) + len(one.file_excerpt.text.encode())
        for one in prompt.attachments
        if one.HasField("file_excerpt")
    )
    if size > EXCERPTS_BYTES:
        words = f"have {size} bytes of file excerpts in sum; at most {EXCERPTS_BYTES} are taken"
        raise InvalidArgument(f"{field}.attachments", words)


def blob_ids(prompt: Prompt) -> list[str]:
    """Return the blobs that a prompt names, each once."""
    return list(dict.fromkeys(one.blob.blob_id for one in prompt.attachments if one.HasField("blob")))


def with_blobs(prompt: Prompt, blobs: Iterable[BlobReference]) -> Prompt:
    """Return a prompt whose blobs are told as the organization knows them."""
    known = {blob.blob_id: blob for blob in blobs}
    told = Prompt()
    told.CopyFrom(prompt)
    for one in told.attachments:
        if one.HasField("blob") and one.blob.blob_id in known:
            one.blob.CopyFrom(known[one.blob.blob_id])
    return told
