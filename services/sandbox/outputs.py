"""What comes of tool calls, as the agent shows it: words, changes of files, terminals, images, pages. Pure.

What is too long is cut here, and what is no text cannot be in a transcript at all: its bytes are kept beside it, to be
stored in a blob.
"""

import base64
import binascii
import json
import mimetypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from branchline.v1.common_pb2 import BlobReference
from branchline.v1.transcripts_pb2 import FileDiff, ToolOutput

from services.runtime.limits import OUTPUTS_BYTES
from services.sandbox.members import member, text_of
from services.sandbox.words import head, tail

TEXT_BYTES = 16 * 1024
"""Most of one output's words, and of each side of a change."""

WHOLE_BYTES = 16 * 1024 * 1024
"""Most of what is stored in the blobs of one entry, and so in one of them: an agent says no more at once."""

MOST_OUTPUTS = 64
MOST_WHOLES = 16

_PATH_BYTES = 4096
_NAME_BYTES = 256
_TYPE_BYTES = 128
_URI_BYTES = 2048
_TERMINAL_BYTES = 256
_FRAME_BYTES = 4  # of one element of a repeated field, beside the element itself


@dataclass(frozen=True, slots=True)
class Whole:
    """Bytes that an output cannot hold."""

    data: bytes
    media_type: str
    display_name: str
    omitted_bytes: int = 0
    """Bytes before these that a blob cannot hold, or that are lost."""

    @property
    def words(self) -> str:
        """What stands in its place where it is not stored."""
        return _named(self.media_type, len(self.data))


@dataclass(frozen=True, slots=True)
class Shown:
    """One output, and what it could not hold. Of what is no words the blob takes the output's place."""

    output: ToolOutput
    wholes: tuple[Whole, ...] = ()
    replaced: bool = False


def outputs_of(blocks: Sequence[Mapping[str, Any]], root: str) -> list[Shown]:
    """Return the outputs of a tool call's content."""
    return bounded([_shown(block, root) for block in blocks])


def bounded(shown: Sequence[Shown]) -> list[Shown]:
    """Leave out earlier outputs where all are too many or too much, and wholes where those are."""
    kept: list[Shown] = []
    wholes: list[Whole] = []
    size = 0
    for one in reversed(shown):
        size += one.output.ByteSize() + _FRAME_BYTES
        if len(kept) == MOST_OUTPUTS or size > OUTPUTS_BYTES:
            break
        fits = storable([*wholes, *one.wholes])
        wholes += one.wholes if fits else ()
        kept.append(one if fits else Shown(one.output))
    return kept[::-1]


def storable(wholes: Sequence[Whole]) -> bool:
    """Say whether one entry may have so many and so large wholes stored."""
    return len(wholes) <= MOST_WHOLES and sum(len(one.data) for one in wholes) <= WHOLE_BYTES


def with_blobs(shown: Sequence[Shown], blobs: Sequence[BlobReference | None]) -> list[Shown]:
    """Return outputs with the blobs in which their wholes were stored, in order; where one is None it was not."""
    rest = iter(blobs)
    made: list[Shown] = []
    for one in shown:
        stored = [(whole, blob) for whole, blob in zip(one.wholes, rest, strict=False) if blob is not None]
        if not (stored and one.replaced):
            made.append(Shown(one.output))
        made += [Shown(ToolOutput(blob=blob, omitted_bytes=whole.omitted_bytes)) for whole, blob in stored]
    return bounded(made)


def text_shown(text: str, omitted: int = 0) -> Shown:
    """Return words as an output: their end, with the whole beside it. `omitted` bytes before them are lost."""
    kept, left_out = tail(text, TEXT_BYTES)
    output = ToolOutput(text=kept, omitted_bytes=left_out + omitted)
    return Shown(output, (_words(text, "output.txt", omitted),) if left_out else ())


def block_text(block: Mapping[str, Any]) -> str:
    """Return the words of an ACP content block; what is none is named in brackets, and shown whole if unknown."""
    kind = block.get("type")
    if size := block_bytes(block):
        return _named(_media_type(block), size)
    if kind == "text":
        return text_of(block, "text")
    if kind == "resource_link":
        return text_of(block, "uri")
    if kind == "resource":
        resource = member(block, "resource")
        return text_of(resource, "text") or text_of(resource, "uri")
    if kind in ("image", "audio"):
        return f"[{text_of(block, 'mimeType') or kind}]"
    return json.dumps(block, ensure_ascii=False) if kind else ""


def block_whole(block: Mapping[str, Any]) -> Whole | None:
    """Return the bytes of a content block that is no words; None for words, and for what is too large or broken."""
    if not 0 < block_bytes(block) <= WHOLE_BYTES:
        return None
    try:
        whole = base64.b64decode(_data(block))
    except (binascii.Error, ValueError):
        return None
    media_type = _media_type(block)
    uri = text_of(block, "uri") or text_of(member(block, "resource"), "uri")
    name = PurePosixPath(uri).name or f"{block['type']}{mimetypes.guess_extension(media_type) or ''}"
    return Whole(whole, media_type, head(name, _NAME_BYTES)) if 0 < len(whole) <= WHOLE_BYTES else None


def block_bytes(block: Mapping[str, Any]) -> int:
    """Return how many bytes a content block has that is no words, as its length says; 0 for words."""
    data = _data(block)
    return max(0, len(data) // 4 * 3 - data[-2:].count("="))


def relative(path: str, root: str) -> str:
    """Return a path relative to the working tree where it is within it."""
    inside = path.removeprefix("file://")
    if root and (inside == root or inside.startswith(f"{root}/")):
        inside = inside[len(root) + 1 :] or "."
    return head(inside, _PATH_BYTES)


def _shown(block: Mapping[str, Any], root: str) -> Shown:
    kind = block.get("type")
    if kind == "content":
        return _content(member(block, "content"))
    if kind == "diff":
        return _diff(block, root)
    if kind == "terminal":
        return Shown(ToolOutput(terminal_id=head(text_of(block, "terminalId"), _TERMINAL_BYTES)))
    return text_shown(json.dumps(block, ensure_ascii=False))


def _data(block: Mapping[str, Any]) -> str:
    """Return what a content block has beside words, in base64; empty for words."""
    if block.get("type") == "resource":
        return text_of(member(block, "resource"), "blob")
    return text_of(block, "data") if block.get("type") in ("image", "audio") else ""


def _media_type(block: Mapping[str, Any]) -> str:
    said = text_of(block, "mimeType") or text_of(member(block, "resource"), "mimeType")
    return head(said or "application/octet-stream", _TYPE_BYTES)


def _named(media_type: str, size_bytes: int) -> str:
    return f"[{media_type}, {size_bytes} bytes]"


def _content(block: Mapping[str, Any]) -> Shown:
    uri = text_of(block, "uri")
    if block.get("type") == "resource_link" and len(uri.encode()) <= _URI_BYTES:
        return Shown(ToolOutput(uri=uri))
    whole = block_whole(block)
    if whole is None:
        return text_shown(block_text(block), block_bytes(block))
    return Shown(ToolOutput(text=whole.words, omitted_bytes=len(whole.data)), (whole,), replaced=True)


def _diff(block: Mapping[str, Any], root: str) -> Shown:
    """Return a change of a file: the beginning of each side."""
    path = relative(text_of(block, "path"), root)
    diff = FileDiff(path=path)
    wholes: list[Whole] = []
    omitted = 0
    name = PurePosixPath(path).name
    for side, field in (("oldText", "old_text"), ("newText", "new_text")):
        text = block.get(side)
        if not isinstance(text, str):
            continue
        kept = head(text, TEXT_BYTES)
        setattr(diff, field, kept)
        if kept != text:
            omitted += len(text.encode()) - len(kept.encode()) + len("…".encode())
            wholes.append(_words(text, name if side == "newText" else f"{name} (before)"))
    return Shown(ToolOutput(diff=diff, omitted_bytes=omitted), tuple(wholes))


def _words(text: str, name: str, omitted: int = 0) -> Whole:
    kept, left_out = tail(text, WHOLE_BYTES)
    return Whole(kept.encode(), "text/plain", head(name, _NAME_BYTES), left_out + omitted)
