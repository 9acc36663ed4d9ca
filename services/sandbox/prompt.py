"""What an agent is given: a message and what is attached as ACP content blocks. Pure.

Source: https://agentclientprotocol.com/protocol/content. Text and links to files are what every agent takes.
"""

import base64
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from branchline.v1.common_pb2 import FileExcerpt, Prompt

from services.sandbox.attachments import Placed

_SHORT_COMMIT = 12


def prompt_blocks(prompt: Prompt, placed: Mapping[str, Placed]) -> list[dict[str, Any]]:
    """Return the content blocks of a prompt whose blobs were written to the sandbox."""
    blocks: list[dict[str, Any]] = [{"type": "text", "text": prompt.text}]
    for one in prompt.attachments:
        if one.HasField("file_excerpt"):
            blocks.append({"type": "text", "text": _excerpt(one.file_excerpt)})
        else:
            blocks.append(_file(placed[one.blob.blob_id]))
    return blocks


def _excerpt(excerpt: FileExcerpt) -> str:
    place = excerpt.path
    if excerpt.start_line:
        last = excerpt.end_line
        place += f":{excerpt.start_line}-{last}" if last > excerpt.start_line else f":{excerpt.start_line}"
    if excerpt.commit:
        place += f" at commit {excerpt.commit[:_SHORT_COMMIT]}"
    return f"Attached from {place}:\n{excerpt.text}" if excerpt.text else f"Attached: {place}"


def _file(placed: Placed) -> dict[str, Any]:
    uri = f"file://{quote(placed.path)}"
    media_type = placed.blob.media_type or "application/octet-stream"
    if placed.image:
        return {"type": "image", "data": base64.b64encode(placed.image).decode(), "mimeType": media_type, "uri": uri}
    return {
        "type": "resource_link",
        "uri": uri,
        "name": placed.blob.display_name or placed.path,
        "mimeType": media_type,
        "size": placed.blob.size_bytes,
    }
