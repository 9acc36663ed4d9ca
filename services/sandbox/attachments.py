"""Puts the blobs that a prompt names where its agent can read them: below its home, beside the working tree."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from branchline.v1.common_pb2 import BlobReference, Prompt

from services.runtime.errors import NotFound
from services.runtime.prompts import blob_ids
from services.sandbox.agent_server import FILE_BYTES, AgentServer
from services.sandbox.blobs import Blobs
from services.sandbox.commands import run
from services.sandbox.reasons import TurnFailed, unprepared
from services.sandbox.words import tail

FOLDER = "attachments"

IMAGES = frozenset({"image/gif", "image/jpeg", "image/png", "image/webp"})
"""Images that models take."""

IMAGE_BYTES = 896 * 1024
"""Most of all images that are given inline: the server takes no request over 2 MiB, and they grow by a third."""

_NAME_BYTES = 200
_JOIN_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Placed:
    """A blob in the sandbox."""

    blob: BlobReference
    path: str
    image: bytes = b""
    """Its bytes, if it is given to the agent as an image."""


async def place(
    blobs: Blobs, server: AgentServer, task_id: str, prompt: Prompt, *, images: bool
) -> Mapping[str, Placed]:
    """Write what a prompt names; return it by the blobs' ids. `images` says whether its agent takes them.

    Raise TurnFailed if something is not there or is not what it should be, AioRpcError if it cannot be fetched.
    """
    named = {one.blob.blob_id: one.blob for one in prompt.attachments if one.HasField("blob")}
    placed: dict[str, Placed] = {}
    room = IMAGE_BYTES if images else 0
    for blob_id in blob_ids(prompt):
        inline = named[blob_id].media_type in IMAGES and 0 < named[blob_id].size_bytes <= room
        placed[blob_id] = await _place(blobs, server, task_id, named[blob_id], inline=inline)
        room -= len(placed[blob_id].image)
    return placed


async def _place(blobs: Blobs, server: AgentServer, task_id: str, blob: BlobReference, *, inline: bool) -> Placed:
    path = f"{server.machine.home}/{FOLDER}/{_safe(blob.blob_id)}/{file_name(blob)}"
    if not inline and await _there(server, path, blob.size_bytes):
        return Placed(blob, path)
    pieces: list[str] = []
    offset, first = 0, b""
    while data := await blobs.fetch(task_id, blob.blob_id, offset):
        first = first or data
        offset += len(data)
        pieces.append(f"{path}.{len(pieces):06d}")
        await server.write_file(pieces[-1], data)
        if offset >= blob.size_bytes:
            break
    if offset != blob.size_bytes or len(first) > FILE_BYTES:
        words = f"the attachment {blob.display_name or blob.blob_id} has {offset} bytes and not {blob.size_bytes}"
        raise TurnFailed(unprepared(words))
    await _join(server, path, pieces)
    return Placed(blob, path, first if inline else b"")


async def _join(server: AgentServer, path: str, pieces: list[str]) -> None:
    """Make one file of its pieces."""
    script = 'cat "$@" > "$0" && rm -f "$@"' if pieces else 'mkdir -p "$(dirname "$0")" && : > "$0"'
    made = await run(server, ["sh", "-c", script, path, *pieces], server.machine.home, {}, _JOIN_SECONDS)
    if made.end.exit_code:
        raise TurnFailed(unprepared("an attachment could not be written", made.stderr))


async def _there(server: AgentServer, path: str, size_bytes: int) -> bool:
    """Say whether a blob, which never changes, was written before."""
    try:
        return (await server.stat_file(path)).size_bytes == size_bytes
    except NotFound:
        return False


def file_name(blob: BlobReference) -> str:
    """Return the name of a blob's file: what people call it, without anything that leads elsewhere."""
    name = _safe(PurePosixPath(blob.display_name).name)
    return tail(name, _NAME_BYTES)[0].lstrip(".") or "attachment"


def _safe(word: str) -> str:
    return "".join(one if one.isprintable() and one != "/" else "_" for one in word) or "_"
